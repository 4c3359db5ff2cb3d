"""Modules with one matrix: which of them compute as a linear, found out by trying them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from autoquant.models.probing import Form, form_of
from autoquant.models.turned import make_plain, plain_names, turned_names

K, N = 6, 10


class Own(nn.Module):
    """A user's own module: `call(x, w, b)`."""

    def __init__(self, call, shape=(N, K), bias=N):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(bias)) if bias else None
        self.n, self.call = N, call

    def forward(self, x):
        return self.call(x, self.w, self.b)


class Sub(nn.Linear):
    """A subclass of `nn.Linear` that computes `call(x, module)`."""

    def __init__(self, call, bias=True):
        super().__init__(K, N, bias=bias)
        self.call = call

    def forward(self, input):
        return self.call(input, self)


LINEARS = {
    "t": lambda: Own(lambda x, w, b: x @ w.T + b),
    "matmul": lambda: Own(lambda x, w, _: torch.matmul(x, w.t()), bias=0),
    "einsum": lambda: Own(lambda x, w, b: torch.einsum("...k,nk->...n", x, w) + b),
    "tensordot": lambda: Own(lambda x, w, b: torch.tensordot(x, w, ([-1], [1])) + b),
    "addmm": lambda: Own(
        lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w.t()).view(*x.shape[:-1], -1)
    ),
    "turned": lambda: Own(lambda x, w, b: x @ w + b, (K, N)),
    "square": lambda: Own(lambda x, w, b: x @ w + b, (K, K), K),
    "falcon": lambda: FalconLinear(K, N),
    "falcon_no_bias": lambda: FalconLinear(K, N, bias=False),
    "conv1d": lambda: Conv1D(N, K),
    "sub": lambda: Sub(
        lambda x, own: (own.weight @ x.transpose(-1, -2)).transpose(-1, -2) + own.bias
    ),
}
OTHERS = {
    "relu": lambda: Own(lambda x, w, b: F.relu(x @ w.T + b)),
    "clamped": lambda: Own(lambda x, w, b: (x @ w.T + b).clamp(-100, 100)),
    "capped": lambda: Own(lambda x, w, _: torch.tanh(x @ w.T / 1e3) * 1e3, bias=0),
    "scaled": lambda: Own(lambda x, w, _: x @ w.T * 0.5, bias=0),
    "no_bias_used": lambda: Own(lambda x, w, _: x @ w.T),
    "tuple": lambda: Own(lambda x, w, b: (x @ w.T + b, x)),
    "in_float64": lambda: Own(lambda x, w, _: x.double() @ w.T.double(), bias=0),
    "casts": lambda: Own(lambda x, w, _: x.to(w.dtype) @ w.T, bias=0),
    "outer": lambda: Own(lambda x, w, b: x @ w.T @ w, bias=0),
    "table": lambda: nn.Embedding(N, K),
    "called_already": lambda: Sub(lambda x, own: F.linear(x, own.weight, own.bias) * 1.0),
    "plain": lambda: nn.Linear(K, N),
    "norm": lambda: nn.LayerNorm(K),
    "random": lambda: Own(lambda x, w, b: x @ w.T + b + torch.randn(N)),
    "fails": lambda: Own(lambda x, w, b: x.nothing),
}


@pytest.mark.parametrize("kind", LINEARS)
@torch.no_grad()
def test_linears_are_found_and_compute_what_they_did(kind):
    torch.manual_seed(0)
    part = LINEARS[kind]()
    own = copy.deepcopy(part)
    called = []
    part.register_forward_hook(lambda *_: called.append(1))
    module = nn.ModuleDict({"part": part})
    make_plain(module)
    assert plain_names(module) == ["part"] and module["part"] is part
    x = torch.randn(2, 3, K)
    assert torch.allclose(part(x), own(x), rtol=1e-4, atol=1e-5) and called == [1]
    assert [name for name, _ in part.named_parameters()] == [n for n, _ in own.named_parameters()]
    turned = kind in ("turned", "square", "conv1d")
    assert turned_names(module) == (["part"] if turned else [])
    before = next(p for p in own.parameters() if p.ndim == 2)
    assert next(p for p in part.parameters() if p.ndim == 2).shape == (
        before.shape[::-1] if turned else before.shape
    )
    assert form_of(part) is None  # once is enough


@pytest.mark.parametrize("kind", OTHERS)
def test_what_computes_something_else_or_more_stays_as_it_is(kind):
    part = OTHERS[kind]()
    module = nn.ModuleDict({"part": part})
    make_plain(module)
    assert plain_names(module) == [] and type(module["part"]) is type(OTHERS[kind]())


def test_a_weight_of_zeros_hides_nothing():
    part = Own(lambda x, w, b: F.relu(x @ w.T), bias=0)
    nn.init.zeros_(part.w)
    assert form_of(part) is None


def test_a_module_that_takes_more_than_a_tensor_stays_as_it_is():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return x @ self.weight.T * scale + self.bias

    patched = FalconLinear(K, N)
    patched.forward = lambda x: x
    assert form_of(Scaled(K, N)) is None and form_of(patched) is None


def test_a_module_without_values_is_tried_too_and_no_random_number_is_drawn():
    with torch.device("meta"):
        part = FalconLinear(K, N)
    state = torch.random.get_rng_state()
    assert form_of(part) == Form("weight", "bias", turned=False)
    assert torch.equal(state, torch.random.get_rng_state())


def test_ties_stay():
    first, second = FalconLinear(K, N), FalconLinear(K, N)
    second.weight = first.weight
    turned, again = Conv1D(N, K), Conv1D(N, K)
    again.weight = turned.weight
    module = nn.ModuleList([first, second, turned, again])
    make_plain(module)
    assert first.weight is second.weight and turned.weight is again.weight
    assert turned.weight.shape == (N, K)
