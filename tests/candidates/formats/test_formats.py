"""What a format promises, and the packing of int4."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torchao.quantization import Int8Tensor

from autoquant.candidates import A8_ROW, A16, ACTIVATION_ROUNDING, Format, Kernel, get_format
from autoquant.candidates.base import round_float8, round_row_int8
from autoquant.candidates.flat import flatten_tensor, stored_bytes, unflatten_tensor
from autoquant.candidates.formats.int4 import rows_per_block, unpack_int4
from autoquant.candidates.formats.int4_gemlite import Int4GemliteTensor
from autoquant.candidates.formats.int4_rounding import tinygemm_rounding
from autoquant.errors import CandidateError

MATMUL = Kernel(id="matmul", numerics=A16, linear=F.linear)


def own_format(quantize=lambda weight: weight, *, name="own/plain", kernels=(MATMUL,), **rest):
    return Format(
        id=name,
        quantize=quantize,
        dequantize=lambda stored: stored.float(),
        kernels=kernels,
        **rest,
    )


@pytest.mark.parametrize(
    ("quantize", "tensor_type"),
    [
        (lambda weight: weight, Int8Tensor),
        (lambda weight: weight.t(), torch.Tensor),
        (lambda weight: weight.reshape(-1), torch.Tensor),
        (lambda weight: torch.nn.Parameter(weight, requires_grad=False), torch.Tensor),
    ],
    ids=["left alone", "transposed", "flat", "a parameter"],
)
def test_a_quantizer_that_does_not_give_what_its_format_promises_is_an_error(quantize, tensor_type):
    fmt = own_format(quantize, tensor_type=tensor_type)
    with pytest.raises(CandidateError, match=r"own/plain gave .* the weight was not quantized"):
        fmt.store(torch.randn(8, 16))


def test_storing_takes_a_parameter_and_leaves_it_alone():
    weight = torch.nn.Parameter(torch.randn(8, 16))
    before = weight.detach().clone()
    stored = get_format("int8-row/plain").store(weight)
    assert isinstance(stored, Int8Tensor) and not stored.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["own", "own/", "/plain", "own/plain/more", ""])
def test_a_format_id_of_another_form_is_refused(name):
    with pytest.raises(CandidateError, match="VALUES/LAYOUT"):
        own_format(name=name)


@pytest.mark.parametrize("kernels", [(), (MATMUL, MATMUL)], ids=["none", "two of one id"])
def test_a_format_needs_kernels_with_ids_of_their_own(kernels):
    with pytest.raises(CandidateError, match="own/plain needs at least one kernel"):
        own_format(kernels=kernels)


def test_a_format_finds_its_kernels_by_id():
    fmt = own_format()
    assert fmt.kernel("matmul") is MATMUL and fmt.values == "own"
    with pytest.raises(CandidateError, match="no kernel 'int-mm'; it has matmul"):
        fmt.kernel("int-mm")


def test_activation_rows_are_rounded_to_symmetric_int8():
    x = torch.tensor([[127.0, -63.4, 0.4, 0.6], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.0, 0.0, 2.0]])
    rounded, scale = round_row_int8(x)
    assert rounded.dtype == torch.int8 and scale.shape == (3, 1)
    assert rounded.tolist() == [[127, -63, 0, 1], [0, 0, 0, 0], [-127, 50, 0, 100]]
    torch.testing.assert_close(scale[[0, 2], 0], torch.tensor([1.0, 0.02]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_rounding_keeps_shape_and_dtype(dtype):
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = ACTIVATION_ROUNDING[A8_ROW](x)
    assert (rounded.shape, rounded.dtype) == (x.shape, dtype)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    assert ((rounded.float() - x.float()).abs() <= step * 0.51 + x.float().abs() * 2**-8).all()
    assert not torch.equal(rounded, x)
    assert ACTIVATION_ROUNDING[A16](x) is x


@pytest.mark.parametrize(
    ("format_id", "size"),
    [
        ("float32/plain", 4 * 64 * 128),
        ("bfloat16/plain", 2 * 64 * 128),
        ("float16/plain", 2 * 64 * 128),
        ("int8-row/plain", 64 * 128 + 64 * 2),
        ("float8-row/plain", 64 * 128 + 64 * 4),
        ("mxfp8/swizzled", 64 * 128 + 128 * 4),  # scales in tiles of 128 x 4
        ("mxfp4/swizzled", 64 * 128 // 2 + 128 * 4),
        ("nvfp4/swizzled", 64 * 128 // 2 + 128 * 8 + 4),
    ],
)
def test_a_stored_weight_takes_its_values_and_its_scales(format_id, size):
    assert stored_bytes(get_format(format_id).store(torch.randn(64, 128).bfloat16())) == size


@pytest.mark.skipif(rows_per_block() is None, reason="this CPU has no packing for int4")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_stored_int4_weight_takes_half_a_byte_and_a_scale_and_zero_a_group(group):
    stored = get_format(f"int4-g{group}/cpu-packed").store(torch.randn(64, 128).bfloat16())
    assert stored_bytes(stored) == 64 * 128 // 2 + 64 * (128 // group) * 2 * 2


@pytest.mark.skipif(rows_per_block() is None, reason="this CPU has no packing for int4")
@pytest.mark.parametrize(("n", "k"), [(64, 32), (64, 256), (192, 96)])
def test_unpacking_int4_inverts_the_packing_of_aten(n, k):
    values = torch.randint(
        0, 16, (n, k), generator=torch.Generator().manual_seed(n + k), dtype=torch.int32
    )
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    unpacked = unpack_int4(packed, n, k)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, values.t().to(torch.uint8))


@pytest.mark.parametrize("group", [32, 128])
def test_gemlites_packing_holds_the_numbers_of_the_other_int4_layouts(group):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, scale, zero = tinygemm_rounding(weight, group)
    expected = (q.reshape(64, -1, group).float() - 8) * scale.float().unsqueeze(
        -1
    ) + zero.float().unsqueeze(-1)
    stored = Int4GemliteTensor.pack(q, scale, zero)
    assert (stored.shape, stored.dtype) == (weight.shape, weight.dtype)
    assert (stored.qdata.shape, stored.scale.shape) == ((256 // 8, 64), (256 // group, 64))
    # The offset is rounded to 16 bits once more.
    torch.testing.assert_close(
        stored.unpack(torch.float32), expected.reshape(64, 256), rtol=0, atol=0.02
    )
    assert stored_bytes(stored) == 64 * 256 // 2 + 2 * 2 * 64 * 256 // group
    error = (stored.unpack(torch.float32) - weight.float()).norm() / weight.float().norm()
    assert error < (0.09 if group == 32 else 0.11)


def test_gemlites_words_hold_eight_weights_along_k_lowest_bits_first():
    q = torch.zeros(32, 32, dtype=torch.int32)
    q[3, 8:16] = torch.arange(1, 9)
    stored = Int4GemliteTensor.pack(q, torch.ones(32, 1), torch.zeros(32, 1))
    assert f"{stored.qdata[1, 3].item() & 0xFFFFFFFF:08x}" == "87654321"
    assert stored.qdata.count_nonzero() == 1


def test_a_packed_tensor_survives_taking_apart_copying_and_saving():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored = Int4GemliteTensor.pack(*tinygemm_rounding(weight, 32))
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    parts, rebuild = flatten_tensor(stored)
    for again in (
        torch.load(file, weights_only=True),
        copy.deepcopy(stored),
        unflatten_tensor(rebuild, parts),
    ):
        assert type(again) is Int4GemliteTensor and again.shape == stored.shape
        assert torch.equal(again.unpack(torch.float32), stored.unpack(torch.float32))


@pytest.mark.parametrize("per_row", [True, False])
def test_float8_rounding_uses_the_whole_range(per_row):
    x = torch.tensor([[448.0, -100.0, 1.0], [4.48, 2.0, -0.1], [0.0, 0.0, 0.0]])
    rounded, scale = round_float8(x, per_row=per_row)
    assert rounded.dtype == torch.float8_e4m3fn and scale.shape == ((3, 1) if per_row else ())
    assert rounded.float().abs().amax(-1)[0] == 448 and not rounded.float().isnan().any()
    assert (rounded.float()[1].abs().max() == 448) == per_row
    torch.testing.assert_close(
        rounded.float() * scale, x, rtol=2**-4, atol=1e-2 if not per_row else 1e-6
    )
