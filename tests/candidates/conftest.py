"""A registry of a test's own, and a format whose kernels tell that they were used."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from autoquant.candidates import A16, Format, Kernel, registry, routed


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone when it ends."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(routed, "_KERNEL_FUNCTIONS", {})


@pytest.fixture
def spy(own_registry):
    """A registered format whose kernels `few` and `many` note their calls; `many` gives twice the
    product.
    """
    calls = []

    def few(x, weight, bias):
        calls.append("few")
        return F.linear(x, weight, bias)

    def many(x, weight, bias):
        calls.append("many")
        return 2 * F.linear(x, weight, bias)

    fmt = Format(
        id="spy/plain",
        quantize=lambda weight: weight.clone(),
        dequantize=lambda stored: stored.float(),
        kernels=(
            Kernel(id="few", numerics=A16, linear=few),
            Kernel(id="many", numerics=A16, linear=many),
        ),
    )
    registry.register(fmt)
    return fmt, calls
