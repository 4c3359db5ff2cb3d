"""Windows of tokens for a vocabulary of 64, and plain formulas to compare with."""

from __future__ import annotations

import pytest
import torch

from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.text import TextParts


@pytest.fixture
def quality():
    """Text quality on three calibration windows of 20 tokens."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"calibration": 3, "selection": 2, "report": 4}
    windows = {
        part: torch.randint(0, 64, (count, 20), generator=generator)
        for part, count in sizes.items()
    }
    return TextQuality(TextParts(windows), "cpu")


@pytest.fixture
def mean_divergence():
    """KL(reference || other) per row in nats, in float64."""

    def compute(reference, other):
        log_p = torch.log_softmax(reference.double(), -1)
        log_q = torch.log_softmax(other.double(), -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

    return compute
