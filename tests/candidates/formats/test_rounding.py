"""Roundings: what they make smaller, that they store what their format stores, and that nobody
times them twice.
"""

import pytest
import torch

from autoquant.candidates import InputStatistics, get_format, select, timed, timed_as
from autoquant.candidates.flat import flatten_tensor
from autoquant.candidates.formats import int4
from autoquant.candidates.formats.int4_rounding import tinygemm_rounding
from autoquant.candidates.formats.rounding import Rounded
from autoquant.errors import CandidateError

N, K = 64, 256
STORED = {  # formats with other roundings that this machine can store
    "int4-g32": "cpu-packed",
    "int4-g128": "cpu-packed",
    "int4s-g32": "lanes",
    "int3-g64": "bit-planes",
    "int2-g32": "bit-planes",
}
each_format = pytest.mark.parametrize("values", STORED)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def named(values, rounding=""):
    suffix = f"-{rounding}" if rounding else ""
    return get_format(f"{values}{suffix}/{STORED[values]}")


def heavy_tailed(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    return (weight * (1 + weight.abs())).to(dtype)


def correlated_inputs(rows=2000):
    """Inputs some of which are large, and which move together."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, K, generator=generator) @ torch.randn(K, K, generator=generator)
    return x * torch.logspace(-1, 1, K)[torch.randperm(K, generator=generator)]


def statistics(x):
    return InputStatistics(x.t() @ x)


def weight_error(fmt, weight, inputs=None):
    return (fmt.dequantize(fmt.store(weight, inputs)) - weight.float()).norm().item()


def output_error(fmt, weight, x):
    return (
        ((fmt.dequantize(fmt.store(weight, statistics(x))) - weight.float()) @ x.t()).norm().item()
    )


@pytest.mark.parametrize("values", [values for values in STORED if values != "int4s-g32"])
@each_dtype
def test_half_quadratic_rounding_keeps_the_weight_better_than_rounding_to_nearest(values, dtype):
    weight = heavy_tailed(dtype)
    assert weight_error(named(values, "hqq"), weight) < 0.99 * weight_error(named(values), weight)


@each_format
@each_dtype
def test_rounding_for_the_inputs_keeps_the_output_better(values, dtype):
    weight, x = heavy_tailed(dtype), correlated_inputs()
    nearest, clipped, compensated = (
        output_error(named(values, rounding), weight, x) for rounding in ("", "clip", "gptq")
    )
    assert clipped < nearest
    assert compensated < 0.75 * nearest
    assert compensated < clipped


@each_dtype
@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_int4_has_the_scale_of_each_groups_least_error(group, dtype):
    weight = heavy_tailed(dtype)
    groups = weight.float().reshape(N, -1, group)

    def of_one_choice(steps):
        scale = groups.abs().amax(-1, keepdim=True) / steps
        return ((groups / scale).round().clamp(-8, 7) * scale - groups).norm().item()

    fmt = get_format(f"int4s-g{group}/lanes")
    assert weight_error(fmt, weight) < 0.97 * min(map(of_one_choice, (7, 7.5, 8, 9)))
    assert (fmt.store(weight).scale_and_zero > 0).all()  # some engines refuse a negative scale


@each_format
@each_dtype
@pytest.mark.parametrize("rounding", ["hqq", "clip", "gptq"])
def test_a_rounding_stores_what_its_format_stores(values, dtype, rounding):
    weight = heavy_tailed(dtype)
    fmt, nearest = named(values, rounding), named(values)
    parts, rebuild = flatten_tensor(fmt.store(weight, statistics(correlated_inputs())))
    wanted, like = flatten_tensor(nearest.store(weight))
    assert rebuild == like
    described = [(part.dtype, part.shape, part.stride()) for part in parts]
    assert described == [(part.dtype, part.shape, part.stride()) for part in wanted]
    assert fmt.kernels is nearest.kernels and fmt.values == f"{values}-{rounding}"


@each_format
@pytest.mark.parametrize("rounding", ["hqq", "clip", "gptq"])
def test_rows_and_inputs_of_zeros_are_rounded_to_finite_numbers(values, rounding):
    weight, x = heavy_tailed(), correlated_inputs()
    weight[3] = 0
    x[:, 32:64] = 0
    fmt = named(values, rounding)
    numbers = fmt.dequantize(fmt.store(weight, statistics(x)))
    assert numbers.isfinite().all() and not numbers[3].any()


def test_rounding_packs_integers_as_rounding_to_nearest_does():
    weight = heavy_tailed()
    q, scale, zero = tinygemm_rounding(weight, 64)
    packed = int4._pack(Rounded(q - 8, scale, zero), 64)
    own, like = flatten_tensor(packed)
    wanted, same = flatten_tensor(get_format("int4-g64/cpu-packed").store(weight))
    assert like == same and all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))


@pytest.mark.parametrize("rounding", ["hqq", "gptq"])
def test_layouts_hold_the_same_numbers(rounding):
    weight, inputs = heavy_tailed(), statistics(correlated_inputs())
    packed, gemlite = (
        get_format(f"int4-g64-{rounding}/{layout}") for layout in ("cpu-packed", "gemlite")
    )
    numbers, others = (fmt.dequantize(fmt.store(weight, inputs)) for fmt in (packed, gemlite))
    assert (numbers - others).norm() < 0.01 * numbers.norm()


def test_compensation_still_works_on_fewer_rows_than_inputs():
    weight, x = heavy_tailed(), correlated_inputs(rows=40)
    assert output_error(named("int3-g64", "gptq"), weight, x) < 0.5 * output_error(
        named("int3-g64"), weight, x
    )


def test_the_same_inputs_give_the_same_bits():
    weight, x = heavy_tailed(), correlated_inputs()
    first, second = (named("int4-g32", "gptq").store(weight, statistics(x)) for _ in range(2))
    assert torch.equal(first.qdata, second.qdata) and torch.equal(
        first.scale_and_zero, second.scale_and_zero
    )


def test_a_format_that_needs_inputs_says_so_where_there_are_none():
    with pytest.raises(
        CandidateError,
        match=r"int3-g64-gptq/bit-planes is rounded for a layer's inputs .* not given",
    ):
        named("int3-g64", "gptq").store(heavy_tailed())


def test_inputs_that_are_not_finite_are_refused():
    x = correlated_inputs()
    x[7, 5] = float("inf")
    with pytest.raises(CandidateError, match="not finite"):
        named("int3-g64", "gptq").store(heavy_tailed(), statistics(x))


def test_the_inverse_factor_is_that_of_the_damped_hessian():
    hessian = statistics(correlated_inputs()).hessian
    factor = InputStatistics(hessian).inverse_factor.double()
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(K)
    torch.testing.assert_close(
        factor.t() @ factor @ damped, torch.eye(K).double(), atol=2e-3, rtol=0
    )
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("int3-g64*", ["int3-g64/bit-planes"]),
        ("int3*", ["int3-g32/bit-planes", "int3-g64/bit-planes"]),
        ("int3-g64-gptq", ["int3-g64-gptq/bit-planes"]),
        ("int3*-hqq", ["int3-g32-hqq/bit-planes", "int3-g64-hqq/bit-planes"]),
    ],
)
def test_a_glob_names_a_rounding_or_gets_the_nearest(glob, found):
    assert [each.format.id for each in select([glob], "cpu")] == found


def test_a_search_that_names_no_candidates_rounds_to_nearest():
    assert not any(
        each.format.rounds for device in ("cpu", "cuda") for each in select(["*"], device)
    )


def test_symmetric_int4_is_tried_where_it_is_named():
    for device in ("cpu", "cuda"):
        assert not any(each.format.values.startswith("int4s") for each in select(["*"], device))
    found = {each.format.id for each in select(["int4s-g64", "int4s-g64-gptq"], "cpu")}
    layouts = ("lanes", "tiled")
    assert found == {
        f"int4s-g64{rounding}/{each}" for rounding in ("", "-gptq") for each in layouts
    }


def test_roundings_of_one_format_are_timed_once():
    pairs = select(["int4-g64/cpu*", "int4-g64-*", "int3*-gptq"], "cpu")
    names = [each.id for each in timed(pairs) if "int3" in each.id or "cpu" in each.format.id]
    kernels = ("int4pack-mm", "dequantize-matmul")
    assert names == [
        *(f"int4-g64/cpu-packed/{kernel}" for kernel in kernels),
        "int3-g32/bit-planes/dequantize-matmul",
        "int3-g64/bit-planes/dequantize-matmul",
    ]
    assert (
        timed_as("int4-g64-gptq/cpu-packed") == "int4-g64/cpu-packed"
        and timed_as("unknown/plain") == "unknown/plain"
    )
