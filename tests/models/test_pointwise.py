"""Convolutions of one point: linears where somebody looks, and convolutions otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from autoquant.candidates.calls import LinearHook
from autoquant.models.load import from_module
from autoquant.models.pointwise import pointwise_names, show_pointwise
from autoquant.models.shown import shown_weight


class Watch(LinearHook):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def on_linear(self, call):
        self.shapes.append(tuple(call.weight.shape))


POINTWISE = {
    "two": (lambda: nn.Conv2d(8, 12, 1), (3, 8, 5, 4)),
    "two without bias": (lambda: nn.Conv2d(8, 12, 1, bias=False, padding="same"), (3, 8, 5, 4)),
    "no batch": (lambda: nn.Conv2d(8, 12, (1, 1)), (8, 5, 4)),
}
OTHERS = {
    "larger": lambda: nn.Conv2d(8, 12, (1, 3)),
    "strided": lambda: nn.Conv2d(8, 12, 1, stride=2),
    "grouped": lambda: nn.Conv2d(8, 12, 1, groups=4),
    "padded": lambda: nn.Conv2d(8, 12, 1, padding=1),
    "of one dimension": lambda: nn.Conv1d(8, 12, 1),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 1),
    "normed": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 12, 1)),
    "subclass": lambda: type("Own", (nn.Conv2d,), {})(8, 12, 1),
}


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("kind", POINTWISE)
@torch.no_grad()
def test_it_computes_what_it_did_with_the_same_layout(kind, last):
    make, shape = POINTWISE[kind]
    module = nn.Sequential(make())
    shown = copy.deepcopy(module)
    assert shown_weight(module, "0.weight").shape == (12, 8)
    show_pointwise(shown, ["0"])
    x = torch.randn(shape)
    if last:
        x = x.movedim(-3, -1).contiguous().movedim(-1, -3)
    expected = module(x)
    assert torch.equal(shown(x), expected)
    with Watch() as watch:
        found = shown(x)
    assert watch.shapes == [(12, 8)] and pointwise_names(shown) == ["0"]
    assert torch.allclose(found, expected, atol=1e-5)
    assert x.dim() == 3 or found.stride() == expected.stride()
    assert found.shape == expected.shape


@pytest.mark.parametrize("kind", OTHERS)
def test_other_convolutions_stay_as_they_are(kind):
    module = nn.Sequential(OTHERS[kind]())
    show_pointwise(module, ["0"])
    assert pointwise_names(module) == []


def test_only_those_that_get_the_channels_last_are_shown_where_a_model_is_loaded():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.both = (nn.Conv2d(8, 8, 1) for _ in range(3))

        def forward(self, x):
            y = self.both(self.last(x))
            return self.both(self.first(y.contiguous()))

    x = torch.randn(2, 8, 5, 4).to(memory_format=torch.channels_last)
    module = Mixed().eval()
    loaded = from_module(module, sample_inputs=(x,))
    assert pointwise_names(loaded.module) == ["last"] and pointwise_names(module) == []
    assert torch.allclose(loaded.module(x), module(x), atol=1e-6)
    assert pointwise_names(from_module(module, sample_inputs=(1,)).module) == []
