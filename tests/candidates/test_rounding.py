"""Roundings: what they make smaller, that they store what their format stores, and that nobody times them twice."""

import io

import pytest
import torch

from autoquant.candidates import InputStatistics, formats, get_format, select, timed
from autoquant.candidates.flat import flatten_tensor
from autoquant.candidates.int4_gemlite_tensor import Int4GemliteTensor
from autoquant.candidates.int4_gpu import tinygemm_rounding
from autoquant.candidates.rounding import GPTQ, Grid, Rounded
from autoquant.errors import CandidateError
from autoquant.records import LinearShape

N, K = 64, 256
STORED = {  # formats with other roundings that this machine can store
    "int4-g32": "cpu-packed",
    "int4-g128": "cpu-packed",
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
    return ((fmt.dequantize(fmt.store(weight, statistics(x))) - weight.float()) @ x.t()).norm().item()


@each_format
@each_dtype
def test_half_quadratic_rounding_keeps_the_weight_better_than_rounding_to_nearest(values, dtype):
    weight = heavy_tailed(dtype)
    assert weight_error(named(values, "hqq"), weight) < 0.99 * weight_error(named(values), weight)
