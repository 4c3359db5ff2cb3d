"""Models made ready for the compiler."""

import pytest
import torch
from models.tiny_models import Perceptron, tiny_llama
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.candidates import get_format
from autoquant.candidates.joined import join
from autoquant.candidates.linears import is_product
from autoquant.candidates.routed import RoutedWeight
from autoquant.models.copies import shallow_copy
from autoquant.records import RouteStep
from autoquant.runtime import compiled
from autoquant.runtime.compiled import compile_forward, ready_to_compile

INT8 = ("int8-row/plain", "int8pack-mm")
INT8_DEQUANTIZED = ("int8-row/plain", "dequantize-matmul")
INT4_PACKED = ("int4-g32/cpu-packed", "int4pack-mm")


def quantize(linear, candidate):
    fmt = get_format(candidate[0])
    stored = fmt.store(linear.weight)
    route = (RouteStep(upper_m=None, kernel=candidate[1]),)
    weight = RoutedWeight.wrap(stored, fmt.id, route, linear.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)


class Blocks(nn.Module):
    """A stack of blocks of one class."""

    def __init__(self, count=3, size=64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(size) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size, bias=False), nn.Linear(2 * size, size)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def quantized_blocks(*candidates):
    module = Blocks(len(candidates)).to(torch.bfloat16).eval().requires_grad_(False)
    for layer, candidate in zip(module.layers, candidates, strict=True):
        if candidate:
            quantize(layer.up, candidate)
            quantize(layer.down, candidate)
    return module


X = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def regions(module, x=X):
    """How many nested regions are called, and how many different ones there are, once `module` is
    traced.
    """
    found = []

    def backend(graph, _inputs):
        calls = [
            node
            for node in graph.graph.nodes
            if node.target is torch.ops.higher_order.invoke_subgraph
        ]
        found.append((len(calls), len({call.args[1] for call in calls})))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False, fullgraph=True)(x)
    return found[-1]


def test_a_ready_model_computes_the_same_from_plain_tensors_that_it_shares():
    module = tiny_llama()
    for layer in module.model.layers:
        quantize(layer.mlp.up_proj, INT8)
    ready = ready_to_compile(module)
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(module(ids).logits, ready(ids).logits)
    stored = module.model.layers[0].mlp.up_proj.weight.stored
    parts = ready.model.layers[0].mlp.up_proj.operand.parts
    assert not any(is_traceable_wrapper_subclass(part) for part in parts)
    assert stored.qdata.data_ptr() in {part.data_ptr() for part in parts}


def test_the_model_itself_is_left_as_it_is():
    module = quantized_blocks(INT8, INT8)
    ready_to_compile(module)
    assert all(type(layer) is Block and type(layer.up) is nn.Linear for layer in module.layers)
    assert all(isinstance(layer.up.weight, RoutedWeight) for layer in module.layers)


def test_a_copy_of_the_structure_shares_every_tensor():
    module = Perceptron()
    copy = shallow_copy(module)
    assert copy.up is not module.up and copy.up.weight is module.up.weight


def test_blocks_that_are_alike_are_one_region():
    assert regions(ready_to_compile(quantized_blocks(INT8, INT8, INT8))) == (3, 1)
    assert regions(ready_to_compile(quantized_blocks(None, None))) == (2, 1)


def test_blocks_of_different_makes_are_regions_of_their_own():
    candidates = (INT8, INT8_DEQUANTIZED, None, INT8, None, INT8_DEQUANTIZED)
    assert regions(ready_to_compile(quantized_blocks(*candidates))) == (6, 3)


def test_regions_are_made_only_where_they_are_wanted_and_blocks_repeat():
    assert regions(ready_to_compile(quantized_blocks(INT8, INT8), regions=False)) == (0, 0)
    assert regions(ready_to_compile(quantized_blocks(INT8))) == (0, 0)


def test_a_kernel_that_the_compiler_does_not_take_in_a_region_stays_outside():
    assert not get_format(INT4_PACKED[0]).kernel(INT4_PACKED[1]).nests
    assert regions(ready_to_compile(quantized_blocks(INT4_PACKED, INT8, INT8))) == (2, 1)


@pytest.mark.parametrize(
    "candidates", [(INT8, INT8, INT8_DEQUANTIZED), (None, INT8, None), (INT4_PACKED, INT8, INT8)]
)
def test_compiled_regions_compute_what_the_model_computes(candidates):
    module = quantized_blocks(*candidates)
    ready = ready_to_compile(module)
    with torch.no_grad():
        forward = compile_forward(lambda x: ready(x))
        torch.testing.assert_close(forward(X), module(X), rtol=0.05, atol=0.05)


def test_a_weight_that_another_module_multiplies_with_is_left_to_it():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight) * 2

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    module = nn.Sequential(Own(), Other(64, 64)).to(torch.bfloat16).eval().requires_grad_(False)
    quantize(module[1], INT8)
    ready = ready_to_compile(module)
    assert isinstance(ready[1].weight, RoutedWeight) and torch.equal(ready(X), module(X))


class Siblings(nn.Module):
    """Three linears that read the same input, one of them with a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(64, 96), nn.Linear(64, 32, bias=False), nn.Linear(64, 32)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x) * 2, self.v(x + 1)], dim=-1)


def siblings(names):
    module = Siblings().to(torch.bfloat16).eval().requires_grad_(False)
    for linear in (module.q, module.k, module.v):
        quantize(linear, INT8_DEQUANTIZED)
    owners = [getattr(module, name) for name in names]
    for owner, weight in zip(owners, join([owner.weight.data for owner in owners]), strict=True):
        owner.weight = nn.Parameter(weight, requires_grad=False)
    return module


def products(module, monkeypatch):
    """How many products a compiled module computes, and its result."""
    counts = []

    def count(graph):
        real(graph)
        counts.append(sum(is_product(node.target) for node in graph.graph.nodes))

    real = compiled._compute_once
    monkeypatch.setattr(compiled, "_compute_once", count)
    torch._dynamo.reset()
    ready = ready_to_compile(module)
    with torch.no_grad():
        result = compile_forward(lambda x: ready(x))(X)
    return sum(counts), result


@pytest.mark.parametrize(
    ("joined", "expected"),
    [
        (("q",), 3),
        (("q", "k"), 2),
        (("q", "k", "v"), 2),
    ],  # v reads another input than its siblings here
)
def test_joined_weights_of_one_input_are_multiplied_as_one(joined, expected, monkeypatch):
    module = siblings(joined)
    count, result = products(module, monkeypatch)
    assert count == expected
    with torch.no_grad():
        torch.testing.assert_close(result, module(X), rtol=0.02, atol=0.02)


def test_blocks_of_joined_weights_are_one_region():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Wrapped() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = siblings(("q", "k", "v")), nn.Linear(160, 64).to(torch.bfloat16)

        def forward(self, x):
            return self.out(self.inner(x))

    module = Layers().eval().requires_grad_(False)
    ready = ready_to_compile(module)
    assert regions(ready) == (3, 1)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            compile_forward(lambda x: ready(x))(X), module(X), rtol=0.05, atol=0.05
        )
