"""Every CPU candidate against the float32 product of the numbers that it stores."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import get_format, multiplied_numbers, select, timed
from autoquant.candidates.routed import RoutedWeight
from autoquant.records import LinearShape, RouteStep

N, K = 64, 128
CANDIDATES = {each.id: (each.format, each.kernel) for each in timed(select(["*"]))}
WEIGHT_ERROR = {  # relative error of the stored numbers of a bfloat16 weight, in norm
    "float32": 0.0,
    "bfloat16": 0.0,
    "float16": 1e-4,
    "float8-row": 0.04,
    "float8-tensor": 0.04,
    "mxfp8": 0.03,
    "mxfp4": 0.12,
    "nvfp4": 0.1,
    "int8-row": 0.012,
    "static-int8": 0.012,
    "static-float8": 0.04,
    "smooth-int8": 0.02,
    "awq-int4-g32": 0.12,  # GPTQ counts the output's error, not the weight's
    "awq-int4-g64": 0.13,
    "awq-int4-g128": 0.14,
    "nf4-g64": 0.1,
    "sparse24": 0.4,  # half of the numbers are dropped
    "sparse24-int8": 0.4,
    "sparse24-float8": 0.4,
    "int4-g32": 0.09,
    "int4-g64": 0.1,
    "int4-g128": 0.11,
    "int4s-g32": 0.1,
    "int4s-g64": 0.11,
    "int4s-g128": 0.12,
    "int6s-g16": 0.03,
    "int5-g32": 0.05,
    "int5s-g32": 0.06,
    "int3-g32": 0.22,
    "int3-g64": 0.24,
    "int2-g32": 0.5,
}


def supported(fmt, kernel, dtype, m=6):
    shape = LinearShape(n=N, k=K, bias=True, dtype=dtype)
    return fmt.unsupported_reason(kernel, shape, m, "cpu") is None


PAIRS = [
    pytest.param(fmt, kernel, dtype, id=f"{name} {dtype}")
    for name, (fmt, kernel) in CANDIDATES.items()
    for dtype in ("bfloat16", "float32")
    if supported(fmt, kernel, dtype)
]


FORMATS = list(
    {
        fmt.id: fmt for fmt, kernel in CANDIDATES.values() if supported(fmt, kernel, "float32")
    }.values()
)


def tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    weight[3] *= 20  # rows of one scale each would hide a kernel that mixes scales up
    bias = torch.randn(N, generator=generator)
    x = torch.randn(2, 3, K, generator=generator) * torch.tensor([1.0, 5.0, 0.2])[:, None]
    dtype = getattr(torch, dtype)
    return weight.to(dtype), bias.to(dtype), x.to(dtype)


def reference(fmt, kernel, stored, x, bias):
    rounded = fmt.activation_rounding(kernel.numerics, stored)(x.float())
    return F.linear(
        rounded,
        multiplied_numbers(fmt, stored, kernel.numerics),
        None if bias is None else bias.float(),
    )


def tolerance(fmt, kernel, dtype):
    if kernel.id == "dynamic":
        return 0.012  # divides by 127.5 where the others divide by 127
    narrow = fmt.values in ("bfloat16", "float16")
    return 1e-5 if dtype == "float32" and not narrow else 5e-3


def relative_error(y, expected):
    return ((y.float() - expected).norm() / expected.norm()).item()


def test_the_unquantized_weight_and_three_quantized_families_work_on_any_cpu():
    usable = {
        fmt.values
        for name, (fmt, kernel) in CANDIDATES.items()
        if supported(fmt, kernel, "bfloat16")
    }
    assert usable >= {"bfloat16", "float16", "int8-row", "float8-row"}
    numerics = {
        kernel.numerics for fmt, kernel in CANDIDATES.values() if fmt.id == "int8-row/plain"
    }
    assert numerics == {"a16", "a8-row"}


@pytest.mark.parametrize(("fmt", "kernel", "dtype"), PAIRS)
def test_a_kernel_computes_the_product_of_the_stored_numbers(fmt, kernel, dtype):
    weight, bias, x = tensors(dtype)
    stored = fmt.sample(weight)
    for activation in (x[0], x):
        for b in (bias, None):
            with torch.no_grad():
                y = kernel.linear(activation, stored, b)
            expected = reference(fmt, kernel, stored, activation, b)
            assert (y.shape, y.dtype) == (expected.shape, weight.dtype)
            assert relative_error(y, expected) < tolerance(fmt, kernel, dtype)


@pytest.mark.parametrize(("fmt", "kernel", "dtype"), PAIRS)
@pytest.mark.parametrize("view", ["last token of each sequence", "transposed"])
def test_a_kernel_takes_activations_that_do_not_lie_in_one_piece(fmt, kernel, dtype, view):
    weight, bias, x = tensors(dtype)
    x = x[:, -1:] if "last" in view else x.reshape(-1, K).t().contiguous().t()
    assert not x.is_contiguous()
    stored = fmt.sample(weight)
    with torch.no_grad():
        y = kernel.linear(x, stored, bias)
    assert relative_error(y, reference(fmt, kernel, stored, x, bias)) < tolerance(
        fmt, kernel, dtype
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.id)
def test_a_format_keeps_the_weights_numbers_as_well_as_its_width_allows(fmt):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=generator).bfloat16()
    stored = fmt.sample(weight)
    numbers = fmt.dequantize(stored)
    assert (numbers.shape, numbers.dtype, stored.shape) == ((N, K), torch.float32, (N, K))
    assert relative_error(numbers, weight.float()) <= WEIGHT_ERROR[fmt.values]


@pytest.mark.parametrize(("fmt", "kernel", "dtype"), PAIRS)
def test_zero_rows_and_zero_activations_give_zeros(fmt, kernel, dtype):
    weight, _, x = tensors(dtype)
    weight[5] = 0
    x[0, 1] = 0
    stored = fmt.sample(weight)
    with torch.no_grad():
        y = kernel.linear(x, stored, None)
    assert torch.isfinite(y).all()
    assert torch.equal(y[0, 1], torch.zeros_like(y[0, 1]))
    # sums with a zero point cancel out but for their rounding
    assert y[..., 5].abs().max() <= 1e-6 * y.abs().max()


def compiled_linear(fmt, kernel, backend):
    torch._dynamo.reset()
    weight, bias, x = tensors("bfloat16")
    stored = fmt.sample(weight)
    module = nn.Linear(K, N)
    route = (RouteStep(upper_m=None, kernel=kernel.id),)
    module.weight = nn.Parameter(
        RoutedWeight.wrap(stored, fmt.id, route, torch.bfloat16), requires_grad=False
    )
    module.bias = nn.Parameter(bias)
    # The cache of traced graphs knows a kernel by its name and would give what an older version of
    # it computed.
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        y = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)(x)
    return relative_error(y, reference(fmt, kernel, stored, x, bias))


@pytest.mark.parametrize(
    ("fmt", "kernel", "dtype"), [pair for pair in PAIRS if pair.values[2] == "bfloat16"]
)
def test_a_routed_linear_is_traced_in_one_graph(fmt, kernel, dtype):
    assert compiled_linear(fmt, kernel, "aot_eager") < tolerance(fmt, kernel, dtype)


@pytest.mark.parametrize(
    "name",
    [
        "int8-row/plain/int-mm",
        "int4-g32/cpu-packed/int4pack-mm",
        "mxfp8/swizzled/emulated",
        "mxfp4/swizzled/emulated",
        "nvfp4/swizzled/emulated",
        "static-int8/plain/int-mm",
        "smooth-int8/plain/int-mm",
        "sparse24-int8/plain/dequantize-matmul",
        "nf4-g64/packed/dequantize-matmul",
    ],
)
def test_a_routed_linear_is_compiled(name):
    from autoquant.devices import backend

    fmt, kernel = CANDIDATES[name]
    if not supported(fmt, kernel, "bfloat16"):
        pytest.skip("this CPU has no packing for int4")
    if reason := backend("cpu").compile_failure():
        pytest.skip(reason)
    assert compiled_linear(fmt, kernel, "inductor") < tolerance(fmt, kernel, "bfloat16")


@pytest.mark.parametrize(
    ("format_id", "shape", "m", "device", "reason"),
    [
        ("int4-g64/cpu-packed", (64, 96), 1, "cpu", "k=96 is not divisible by the group size 64"),
        ("int4-g32/cpu-packed", (80, 64), 1, "cpu", "n=80 is not divisible by"),
        ("int4-g32/cpu-packed", (64, 64), 1, "cuda", "for CPUs"),
        ("int8-row/plain/int8pack-mm", (66, 64), 1, "cpu", "n divisible by 4 and k by 16, not 66"),
        (
            "int8-row/plain/int8pack-mm",
            (64, 100),
            1,
            "cpu",
            "100",
        ),  # reads beyond the end, and may crash
        ("int8-row/plain/int8pack-mm", (64, 8), 1, "cpu", "8"),
        ("int8-row/plain/int8pack-mm", (64, 64), 1, "cuda", "CPU kernel"),
        ("int8-row/plain/int-mm", (64, 64), 16, "cuda", "more than 16 rows on CUDA, not 16"),
        ("int8-row/plain/int-mm", (64, 60), 17, "cuda", "divisible by 8 on CUDA, not 64x60"),
        ("mxfp8/swizzled", (64, 80), 1, "cpu", "k=80 is not divisible by the block size 32"),
        ("mxfp4/swizzled", (64, 48), 1, "cpu", "k=48 is not divisible by the block size 32"),
        ("nvfp4/swizzled", (64, 40), 1, "cuda", "k=40 is not divisible by the block size 16"),
        ("nvfp4/swizzled/scaled-mm", (64, 64), 1, "cpu", "block-scaled products are for CUDA"),
        ("nf4-g64/packed", (64, 96), 1, "cpu", "k=96 is not divisible by the group size 64"),
        ("sparse24/plain", (64, 12), 1, "cpu", "k=12 is not divisible by 8"),
        ("sparse24-int8/cusparselt", (64, 64), 1, "cpu", "a 2:4 sparse product needs a CUDA GPU"),
        ("static-int8/plain/int-mm", (64, 64), 16, "cuda", "more than 16 rows on CUDA, not 16"),
        ("float32/plain", (64, 64), 1, "cpu", "float32 is wider than the model's bfloat16"),
    ],
)
def test_a_candidate_says_why_it_cannot_be_used(format_id, shape, m, device, reason):
    (candidate, *_) = select([format_id])
    fmt, kernel = candidate.format, candidate.kernel
    shape = LinearShape(n=shape[0], k=shape[1], bias=False, dtype="bfloat16")
    given = fmt.unsupported_reason(kernel, shape, m, device)
    assert given is not None and reason in given


@pytest.mark.parametrize(
    ("name", "shape", "m", "device", "dtype"),
    [
        ("int4-g32/cpu-packed/int4pack-mm", (64, 96), 1, "cpu", "bfloat16"),
        ("int8-row/plain/int8pack-mm", (68, 48), 1, "cpu", "bfloat16"),
        ("int8-row/plain/int-mm", (63, 61), 1, "cpu", "bfloat16"),
        ("int8-row/plain/int-mm", (64, 64), 17, "cuda", "bfloat16"),
        ("mxfp8/swizzled/emulated", (63, 96), 1, "cpu", "float32"),
        ("nvfp4/swizzled/dequantize-matmul", (63, 80), 1, "cuda", "bfloat16"),
        ("float32/plain/matmul", (63, 61), 1, "cpu", "float32"),
        ("float16/plain/matmul", (63, 61), 1, "cpu", "bfloat16"),
    ],
)
def test_a_candidate_that_can_be_used_gives_no_reason(name, shape, m, device, dtype):
    fmt, kernel = CANDIDATES[name]
    if fmt.values.startswith("int4") and torch.backends.cpu.get_cpu_capability() not in (
        "AVX2",
        "AVX512",
    ):
        pytest.skip("this CPU has no packing for int4")
    shape = LinearShape(n=shape[0], k=shape[1], bias=False, dtype=dtype)
    assert fmt.unsupported_reason(kernel, shape, m, device) is None


def test_a_cpu_whose_packing_is_unknown_has_no_int4(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    fmt = get_format("int4-g32/cpu-packed")
    shape = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
    assert "AVX2 or AVX512" in fmt.unsupported_reason(fmt.kernels[0], shape, 1, "cpu")


@pytest.mark.parametrize("name", sorted(CANDIDATES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(60, 100), (4, 48), (63, 61), (5, 160)])
def test_a_candidate_works_on_every_odd_shape_that_it_does_not_refuse(name, shape, dtype):
    fmt, kernel = CANDIDATES[name]
    n, k = shape
    if fmt.unsupported_reason(kernel, LinearShape(n=n, k=k, bias=False, dtype=dtype), 3, "cpu"):
        return
    assert (kernel.id, dtype, k % 16 > 0) != ("int8pack-mm", "bfloat16", True), (
        "ATen's kernel would crash here"
    )
    generator = torch.Generator().manual_seed(2)
    stored = fmt.sample(torch.randn(n, k, generator=generator).to(getattr(torch, dtype)))
    x = torch.randn(3, k, generator=generator).to(getattr(torch, dtype))
    with torch.no_grad():
        y = kernel.linear(x, stored, None)
    assert relative_error(y, reference(fmt, kernel, stored, x, None)) < tolerance(
        fmt, kernel, dtype
    )
