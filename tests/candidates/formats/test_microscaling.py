"""Blocks that share a scale.

The same numbers as torchao's, emulated or in hardware, and who is told what.
"""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.mx_formats.utils import from_blocked

from autoquant.candidates import A16, ACTIVATION_ROUNDING, get_format, select
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery import shards
from autoquant.records import LinearShape, RouteStep

VALUES = ("mxfp8", "mxfp4", "nvfp4")
N, K = 48, 160
each_format = pytest.mark.parametrize("values", VALUES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def blocks(values):
    return get_format(f"{values}/swizzled")


def wide_range(*shape, dtype=torch.bfloat16, seed=0):
    """Numbers whose blocks differ by many powers of two, a row of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x = x * torch.exp2(
        torch.randint(-12, 12, (*shape[:-1], shape[-1] // 16), generator=generator)
    ).repeat_interleave(16, -1)
    x[1] = 0
    return x.to(dtype)


def by_torchao(values, x):
    """x `[m, k]` rounded by torchao's tensors in their plain layout, in float32."""
    if values == "nvfp4":
        return NVFP4Tensor.to_nvfp4(
            x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max())
        ).dequantize(torch.float32)
    elements = torch.float8_e4m3fn if values == "mxfp8" else torch.float4_e2m1fn_x2
    return MXTensor.to_mx(x, elements, 32, ScaleCalculationMode.RCEIL).dequantize(torch.float32)


def assert_same(numbers, expected, rtol=3e-7):
    """Equal, but for the order in which nvfp4's two scales are multiplied."""
    torch.testing.assert_close(numbers, expected, rtol=rtol, atol=0)


@each_format
@each_dtype
def test_the_stored_numbers_are_those_of_torchao(values, dtype):
    weight = wide_range(N, K, dtype=dtype)
    assert_same(blocks(values).dequantize(blocks(values).store(weight)), by_torchao(values, weight))


@each_format
@each_dtype
def test_an_activation_is_rounded_as_torchao_rounds_it(values, dtype):
    x = wide_range(6, K, dtype=dtype)
    rounded = ACTIVATION_ROUNDING[f"a-{values}"](x.reshape(2, 3, K))
    assert (rounded.shape, rounded.dtype) == ((2, 3, K), dtype)
    assert_same(
        rounded.reshape(6, K).float(),
        by_torchao(values, x).to(dtype).float(),
        2**-7 if dtype != torch.float32 else 3e-7,
    )


@each_format
@each_dtype
def test_emulated_is_the_product_of_the_rounded_activation_and_the_stored_numbers(values, dtype):
    fmt = blocks(values)
    weight, x, bias = (
        torch.randn(N, K).to(dtype),
        torch.randn(2, 3, K).to(dtype),
        torch.randn(N).to(dtype),
    )
    stored, kernel = fmt.store(weight), fmt.kernel("emulated")
    expected = F.linear(
        by_torchao(values, x.reshape(6, K)), by_torchao(values, weight), bias.float()
    ).reshape(2, 3, N)
    y = kernel.linear(x, stored, bias)
    assert y.dtype == dtype
    error = (y.float() - expected).norm() / expected.norm()
    assert error < (2**-7 if dtype == torch.bfloat16 else 1e-5)
    unrounded = fmt.kernel("dequantize-matmul").linear(x, stored, bias)
    assert (unrounded.float() - expected).norm() / expected.norm() > 2 * 2**-7


def test_every_e8m0_scale_is_read_as_its_power_of_two():
    """Blocks of ones under all scales that a block of bfloat16 numbers can get."""
    exponents = torch.arange(-118, 119)
    weight = (torch.ones(len(exponents), 32) * torch.exp2(exponents.float())[:, None]).bfloat16()
    stored = blocks("mxfp8").store(weight)
    assert torch.equal(blocks("mxfp8").dequantize(stored), weight.float())


@each_format
def test_a_tensor_of_zeros_stays_zero(values):
    fmt, zeros = blocks(values), torch.zeros(N, K).bfloat16()
    stored = fmt.store(zeros)
    assert torch.equal(fmt.dequantize(stored), zeros.float())
    assert torch.equal(ACTIVATION_ROUNDING[f"a-{values}"](zeros), zeros)
    assert torch.equal(
        fmt.kernel("emulated").linear(zeros, stored, None), torch.zeros(N, N).bfloat16()
    )


def scaled_product(a, b, scale_a, scale_b, bias=None, out_dtype=None, output_dtype=None, **_rest):
    """What `torch._scaled_mm` and `F.scaled_mm` compute on Blackwell, from the very bytes that they
    are given.
    """
    y = _numbers(a, scale_a) @ _numbers(b.t(), scale_b).t()
    return (y if bias is None else y + bias.float()).to(out_dtype or output_dtype)


def _numbers(elements, scale):
    """Elements `[rows, k]`, packed or not, times their scales in 128 x 4 tiles."""
    block = 32 if scale.dtype == torch.float8_e8m0fnu else 16
    if elements.dtype == torch.float4_e2m1fn_x2:
        wide = f4_unpacked_to_f32(unpack_uint4(elements.view(torch.uint8)))
    else:
        wide = elements.float()
    rows, k = wide.shape
    assert scale.numel() == -(-rows // 128) * 128 * -(-k // block // 4) * 4
    scales = from_blocked(scale, rows, k // block).float()
    return (wide.reshape(rows, -1, block) * scales.unsqueeze(-1)).reshape(rows, k)


@pytest.fixture
def hardware(monkeypatch):
    """A stand-in for the products of a Blackwell GPU."""
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    monkeypatch.setattr(F, "scaled_mm", scaled_product)


HARDWARE_CASES = [
    ("mxfp8", torch.bfloat16),
    ("mxfp4", torch.bfloat16),
    ("nvfp4", torch.bfloat16),
    ("nvfp4", torch.float32),
]


@pytest.mark.parametrize(("values", "dtype"), HARDWARE_CASES)
@pytest.mark.parametrize("shape", [(1, K), (2, 3, K)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_hardware_is_given_the_numbers_that_emulated_multiplies(
    hardware, values, dtype, shape, with_bias
):
    fmt = blocks(values)
    stored = fmt.store(torch.randn(N, K).to(dtype))
    x, bias = torch.randn(shape).to(dtype), torch.randn(N).to(dtype) if with_bias else None
    y, expected = (
        fmt.kernel(kernel).linear(x, stored, bias) for kernel in ("scaled-mm", "emulated")
    )
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert (y.float() - expected.float()).norm() / expected.float().norm() < 2**-7


@each_format
def test_the_hardware_product_is_traced_in_one_graph(hardware, values):
    torch._dynamo.reset()
    fmt = blocks(values)
    module = nn.Linear(K, N, dtype=torch.bfloat16)
    weight = RoutedWeight.wrap(
        fmt.store(module.weight),
        fmt.id,
        (RouteStep(upper_m=None, kernel="scaled-mm"),),
        torch.bfloat16,
    )
    module.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(2, 3, K).bfloat16()
    with torch.no_grad():
        y = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")(x)
    expected = fmt.kernel("emulated").linear(x, weight.stored, module.bias)
    assert (y.float() - expected.float()).norm() / expected.float().norm() < 2**-7


@pytest.mark.parametrize(("values", "dtype"), HARDWARE_CASES)
def test_torchao_itself_computes_with_the_stored_tensor(hardware, values, dtype):
    stored = blocks(values).store(torch.randn(N, K).to(dtype))
    x = torch.randn(6, K).to(dtype)
    expected = blocks(values).kernel("emulated").linear(x, stored, None)
    assert (F.linear(x, stored).float() - expected.float()).norm() / expected.float().norm() < 2**-7


def gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def reason(values, n=N, k=K, dtype="bfloat16", device="cuda", kernel="scaled-mm"):
    fmt = blocks(values)
    return fmt.unsupported_reason(
        fmt.kernel(kernel), LinearShape(n=n, k=k, bias=False, dtype=dtype), 1, device
    )


@each_format
@pytest.mark.parametrize(
    ("capability", "told"),
    [
        ((9, 0), "needs a GPU of compute capability 10.0 (Blackwell); this is sm_90"),
        (None, "needs a GPU of compute capability 10.0 (Blackwell); there is none here"),
        ((10, 0), None),
        ((12, 0), None),
    ],
)
def test_the_hardware_product_is_for_blackwell(monkeypatch, values, capability, told):
    gpu(monkeypatch, capability)
    assert reason(values) == told
    assert reason(values, kernel="emulated") is None
    assert blocks(values).by_default("cuda") is (told is None)
    assert (blocks(values) in [each.format for each in select(["*"], "cuda")]) is (told is None)


@each_format
def test_no_gpu_is_asked_about_where_none_is_used(monkeypatch, values):
    def refuse():
        raise AssertionError("asked")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    assert reason(values, device="cpu") == "block-scaled products are for CUDA"
    assert not blocks(values).by_default("cpu")
    assert blocks(values) not in [each.format for each in select(["*"], "cpu")]


@pytest.mark.parametrize(
    ("values", "case", "told"),
    [
        ("mxfp8", {"n": 40}, "needs n divisible by 16 and k by 32, not 40x160"),
        ("nvfp4", {"k": 144}, "needs n divisible by 16 and k by 32, not 48x144"),
        ("mxfp4", {"dtype": "float32"}, "gives bfloat16, not float32"),
        ("nvfp4", {"dtype": "float32"}, None),
        (
            "nvfp4",
            {"dtype": "float16"},
            "torchao makes blocks of bfloat16 and float32 weights, not of float16",
        ),
    ],
)
def test_the_hardware_product_says_what_does_not_fit(monkeypatch, values, case, told):
    gpu(monkeypatch, (10, 0))
    assert reason(values, **case) == told


@each_format
def test_the_activation_rounding_is_a_numerics_of_its_own(values):
    numerics = {kernel.id: kernel.numerics for kernel in blocks(values).kernels}
    assert numerics == {
        "dequantize-matmul": A16,
        "scaled-mm": f"a-{values}",
        "emulated": f"a-{values}",
    }


@each_format
def test_a_stored_weight_is_kept_in_a_checkpoints_safetensors(values, tmp_path):
    stored = blocks(values).store(torch.randn(N, K).bfloat16())
    writer = shards.ShardWriter(tmp_path)
    writer.add("one.weight", stored)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [shards.SAFETENSORS]
    again = shards.read_tensors(tmp_path, None, "cpu")["one.weight"]
    assert type(again) is type(stored) and again._quantization_type() == stored._quantization_type()
    assert torch.equal(blocks(values).dequantize(again), blocks(values).dequantize(stored))


@each_format
def test_a_stored_weight_is_saved_and_loaded_without_pickled_code(values):
    stored = blocks(values).store(torch.randn(N, K).bfloat16())
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert type(again) is type(stored) and again._quantization_type() == stored._quantization_type()
    assert torch.equal(blocks(values).dequantize(again), blocks(values).dequantize(stored))
