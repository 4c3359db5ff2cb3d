"""A module that takes a batch, saved as PyTorch saves it, and plans for it that are only applied."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from builders.records import make_plan
from torch import nn

from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.models.trust import Trust
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, LinearShape, RouteStep, Workload


class Patches(nn.Module):
    """Each sample has four rows in `inner`, and one in `head`."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 96)
        self.head = nn.Linear(96, 32)

    def forward(self, x, scale=1.0):
        return self.head(self.inner(x).relu().mean(1)) * scale


def make():
    torch.manual_seed(0)
    return Patches().to(torch.bfloat16)


def inputs():
    torch.manual_seed(1)
    return (torch.randn(3, 4, 64, dtype=torch.bfloat16),)


class PlannedModule:
    """A module that was searched, as far as an export looks at it."""

    def __init__(self, folder):
        self.path = folder / "patches.pt"
        torch.save(make().state_dict(), self.path)
        self.trust = Trust(model_factory=f"{__name__}:make", sample_inputs=f"{__name__}:inputs")
        loaded = load_model(
            self.path,
            device="cpu",
            model_factory=self.trust.model_factory,
            sample_inputs=self.trust.sample_inputs,
        )
        self.facts = SimpleNamespace(
            source=asdict(loaded.source),
            device=SimpleNamespace(type="cpu"),
            calibration=None,
            workload=Workload.single(),
        )
        self._hash = loaded.content_hash
        self.sites = record_model(loaded, Workload.single(), ignore).sites

    def plan(self, routes):
        """Choose for each layer (format, (upper m, kernel), ...), by its name."""
        layers = tuple(self._layer(site, *routes[site.name]) for site in self.sites)
        return replace(make_plan("abcd", layers=layers), model_hash=self._hash, dtype="bfloat16")

    def _layer(self, site, fmt, *steps):
        return LayerChoice(
            name=site.name,
            parameters=site.parameters,
            shape=LinearShape(
                n=site.shape.n, k=site.shape.k, bias=site.shape.bias, dtype="bfloat16"
            ),
            format=fmt,
            route=tuple(RouteStep(upper_m=upper, kernel=kernel) for upper, kernel in steps),
            numerics="",
            latency_us={},
            memory_bytes=0,
            loss=0.0,
        )


@pytest.fixture(scope="session")
def patches(tmp_path_factory):
    return PlannedModule(tmp_path_factory.mktemp("patches"))
