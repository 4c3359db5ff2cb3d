"""Every candidate of a GPU against the float64 product of the numbers that it stores, alone and as
a model's weight.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import (
    known_formats,
    multiplied_numbers,
    select,
    timed,
)
from autoquant.candidates.check import MAX_RELATIVE_ERROR
from autoquant.candidates.formats import int4_tinygemm
from autoquant.candidates.formats.int4_rounding import tinygemm_rounding
from autoquant.candidates.formats.rounding import Rounded
from autoquant.candidates.routed import RoutedWeight
from autoquant.records import LinearShape, RouteStep

pytestmark = pytest.mark.gpu

N, K = 512, 1024
ROWS = (1, 5, 16, 64)


def usable(fmt, kernel, m, bias=True):
    shape = LinearShape(n=N, k=K, bias=bias, dtype="bfloat16")
    return fmt.unsupported_reason(kernel, shape, m, "cuda") is None


def tensors(m, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, device="cuda")

    weight = normal(N, K) / K**0.5
    weight[3] *= 20  # rows of one scale each would hide a kernel that mixes scales up
    return weight.bfloat16(), normal(N).bfloat16(), normal(1, m, K).bfloat16()


CANDIDATES = {each.id: (each.format, each.kernel) for each in timed(select(["*"]))}


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_kernel_computes_the_product_of_the_stored_numbers(name, m):
    fmt, kernel = CANDIDATES[name]
    if not usable(fmt, kernel, m):
        pytest.skip(
            str(
                fmt.unsupported_reason(
                    kernel, LinearShape(n=N, k=K, bias=True, dtype="bfloat16"), m, "cuda"
                )
            )
        )
    weight, bias, x = tensors(m)
    stored = fmt.sample(weight)
    for b in (bias, None):
        y = kernel.linear(x, stored, b)
        assert (y.shape, y.dtype) == ((1, m, N), torch.bfloat16)
        rounded = fmt.activation_rounding(kernel.numerics, stored)(x.float()).double()
        expected = F.linear(
            rounded,
            multiplied_numbers(fmt, stored, kernel.numerics).double(),
            None if b is None else b.double(),
        )
        assert ((y.double() - expected).norm() / expected.norm()).item() < MAX_RELATIVE_ERROR


def test_int4_layouts_hold_the_same_numbers():
    weight, _, _ = tensors(1)
    by_layout = {
        fmt.id: fmt.dequantize(fmt.store(weight))
        for fmt in known_formats().values()
        if fmt.values == "int4-g64"
        and fmt.unsupported(LinearShape(n=N, k=K, bias=False, dtype="bfloat16"), 1, "cuda") is None
    }
    assert len(by_layout) >= 2
    first, *others = by_layout.values()
    for other in others:
        assert ((first - other).norm() / first.norm()).item() < 0.003


@pytest.mark.parametrize("group", [32, 128])
def test_rounding_packs_tiles_as_rounding_to_nearest_does(group):
    weight, _, _ = tensors(1)
    weight = weight[:500, :896].contiguous()  # padded to tiles
    q, scale, zero = tinygemm_rounding(weight, group)
    nearest = known_formats()[f"int4-g{group}/tinygemm"]
    packed = int4_tinygemm._pack_tinygemm(Rounded(q - 8, scale, zero), group)
    assert torch.equal(nearest.dequantize(packed), nearest.dequantize(nearest.store(weight)))
    assert packed.qdata.shape == nearest.store(weight).qdata.shape


BY_NAME = ("static", "smooth", "awq-int4-g64", "sparse24")
FORMATS = [
    fmt.id
    for fmt in known_formats().values()
    if torch.cuda.is_available()
    and not (fmt.rounds and fmt.needs_inputs)  # as the format that they are stored as
    and (fmt.by_default("cuda") or fmt.values.startswith(BY_NAME))
    and any(usable(fmt, kernel, 1) for kernel in fmt.kernels)
    and any(usable(fmt, kernel, 64) for kernel in fmt.kernels)
]


def routed(format_id):
    fmt = known_formats()[format_id]
    weight, bias, _ = tensors(1)
    few = next(kernel.id for kernel in fmt.kernels if usable(fmt, kernel, 1))
    many = [kernel.id for kernel in fmt.kernels if usable(fmt, kernel, 64)][-1]
    route = (RouteStep(upper_m=8, kernel=few), RouteStep(upper_m=None, kernel=many))
    layer = nn.Linear(K, N, device="cuda", dtype=torch.bfloat16)
    layer.weight = nn.Parameter(
        RoutedWeight.wrap(fmt.sample(weight), format_id, route, torch.bfloat16), requires_grad=False
    )
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@pytest.mark.parametrize("format_id", FORMATS)
@torch.no_grad()
def test_a_routed_weight_is_compiled_whole_and_gives_the_same(format_id):
    torch._dynamo.reset()
    layer = routed(format_id)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for m in (1, 64):
        _, _, x = tensors(m, seed=1)
        expected = layer(x).float()
        assert ((compiled(x).float() - expected).norm() / expected.norm()).item() < 0.01


@pytest.mark.parametrize("format_id", FORMATS)
@torch.no_grad()
def test_a_routed_weight_is_saved_copied_and_assigned(format_id):
    layer = routed(format_id)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = nn.Linear(K, N, device="meta", dtype=torch.bfloat16)
    empty.load_state_dict(torch.load(file, weights_only=True), assign=True)
    _, _, x = tensors(64)
    for other in (copy.deepcopy(layer), empty):
        assert type(other.weight.data) is RoutedWeight
        # Products that split k add up in another order each time.
        expected = layer(x).float()
        assert ((other(x).float() - expected).norm() / expected.norm()).item() < 0.01
