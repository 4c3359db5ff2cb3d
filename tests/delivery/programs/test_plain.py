"""Copies of quantized modules that hold plain tensors, and what stands in for a kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates import Kernel, get_format
from autoquant.candidates.joined import join
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.programs import operators
from autoquant.delivery.programs.operators import Packing, Substitute
from autoquant.delivery.programs.plain import Product, plain_copy, routed_weights
from autoquant.engines import PROGRAMS
from autoquant.models.loaded import settle

INT8 = "int8-row/plain"


def quantized(n, k, route=((None, "dequantize-matmul"),), fmt=INT8):
    torch.manual_seed(n)
    stored = get_format(fmt).store(torch.randn(n, k, dtype=torch.bfloat16))
    return RoutedWeight(stored, fmt, route, torch.bfloat16)


def linear(weight):
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.bfloat16)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def kernels(module, kernel):
    return dict.fromkeys(routed_weights(module), kernel)


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def test_a_copy_holds_plain_tensors_and_computes_the_same():
    model = settle(nn.Sequential(linear(quantized(32, 64)), nn.ReLU(), linear(quantized(16, 32))))
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    copied = plain_copy(model, kernels(model, "dequantize-matmul"))
    assert all(type(each.data) is torch.Tensor for each in tensors(copied))
    assert torch.equal(copied(x), model(x))
    assert isinstance(model[0].weight.data, RoutedWeight)  # stays as it was


def test_a_copy_uses_the_kernel_that_is_named_for_any_rows():
    model = settle(nn.Sequential(linear(quantized(32, 64, ((4, "int-mm"), (None, "int8pack-mm"))))))
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert torch.equal(plain_copy(model, {"0.weight": "int8pack-mm"})(x), model(x))
    assert not torch.equal(plain_copy(model, {"0.weight": "int-mm"})(x), model(x))


def test_a_module_that_is_itself_a_linear_is_copied():
    model = settle(linear(quantized(32, 64)))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(plain_copy(model, {"weight": "dequantize-matmul"})(x), model(x))


def test_weights_that_lie_side_by_side_are_multiplied_once():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            one, other = join([quantized(32, 64), quantized(16, 64)])
            self.one, self.other = linear(one), linear(other)

        def forward(self, x):
            return self.one(x), self.other(x)

    model = settle(Siblings())
    copied = plain_copy(model, kernels(model, "dequantize-matmul"))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    products = [part for part in copied.modules() if isinstance(part, Product)]
    assert len(products) == 1 and products[0].part0.shape == (48, 64)
    for got, expected in zip(copied(x), model(x), strict=True):
        assert torch.allclose(got.float(), expected.float(), rtol=0.02, atol=0.05)
    program = torch.export.export(copied, (x,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("linear" in call for call in calls) == 1


class Router(nn.Module):
    """A weight of another module than `nn.Linear`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(quantized(32, 64), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight).softmax(-1)


def test_a_weight_of_another_module_becomes_plain_too():
    model = settle(nn.Sequential(Router()))
    copied = plain_copy(model, kernels(model, "dequantize-matmul"))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert all(type(each.data) is torch.Tensor for each in tensors(copied))
    program = torch.export.export(copied, (x,))
    assert torch.equal(program.module()(x), model(x))


@pytest.fixture
def only_python(monkeypatch):
    """int8's kernel `opaque` calls an operator that is written in Python."""
    library = torch.library.Library("only_python", "DEF")
    library.define("product(Tensor x, Tensor values) -> Tensor")
    library.impl("product", lambda x, values: x @ values.t().to(x.dtype), "CPU")
    library.impl("product", lambda x, values: x.new_empty(x.shape[0], len(values)), "Meta")

    def opaque(x, stored, bias):
        return torch.ops.only_python.product(x, stored.qdata)

    found = get_format(INT8)
    own = Kernel(id="opaque", numerics="a8-row", linear=opaque)
    monkeypatch.setattr(operators, "get_format", lambda _: found)
    before = found.kernels
    object.__setattr__(found, "kernels", (*before, own))
    yield found
    object.__setattr__(found, "kernels", before)
    library._destroy()


def test_a_kernel_that_only_python_knows_is_replaced_by_one_that_rounds_alike(only_python):
    found = Packing(PROGRAMS["aoti"], "cpu").kernel(quantized(32, 64), "opaque", 4)
    assert isinstance(found, Substitute)
    assert (found.kernel, found.exact) == ("int-mm", True)
    assert found.reason == "only Python knows its operator only_python::product"


def test_without_any_other_kernel_there_is_none(only_python, monkeypatch):
    object.__setattr__(only_python, "kernels", only_python.kernels[-1:])
    assert Packing(PROGRAMS["pt2"], "cpu").kernel(quantized(32, 64), "opaque", 4) is None


@pytest.mark.parametrize("form", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("kernel", ["int8pack-mm", "int-mm", "dequantize-matmul"])
def test_kernels_of_pytorchs_operators_are_held(form, kernel):
    assert Packing(form, "cpu").kernel(quantized(32, 64), kernel, 4) == kernel
