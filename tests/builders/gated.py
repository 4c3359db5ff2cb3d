"""The setup of a search of three small linears, whose study its store knows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from autoquant.candidates import Candidate, get_format
from autoquant.evaluators.sensitivity import SENSITIVITIES
from autoquant.models import ModelRequest, from_module
from autoquant.records import Workload
from autoquant.solver.limits import Limits
from autoquant.store import open_store
from autoquant.tuner.judge import Judge
from autoquant.tuner.request import SettledRequest
from autoquant.tuner.setup import SearchSetup

from .records import DEVICE, put_study
from .request import make_request

WORKLOAD = Workload.single()
INT8 = get_format("int8-row/plain")
ORIGINAL = get_format("bfloat16/plain")
CANDIDATES = [
    Candidate(ORIGINAL, ORIGINAL.kernel("matmul")),
    Candidate(INT8, INT8.kernel("int8pack-mm")),
    Candidate(INT8, INT8.kernel("int-mm")),
]


class Gated(nn.Module):
    """Two linears that read the same input, and one behind them."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


class Quality:
    """Names the losses; nothing is measured with it."""

    key, logarithmic = "own", False


def make_setup(db, listener):
    """Make the model, the database and the study, and return the setup."""
    torch.manual_seed(0)
    model = from_module(Gated().to(torch.bfloat16))
    model = replace(model, example_inputs=(torch.randn(4, 64, dtype=torch.bfloat16),))
    settled = SettledRequest(
        request=make_request(ModelRequest(model=model.module, device="cpu"), db),
        loaded=model,
        judge=Judge(Quality(), CANDIDATES, "a loss of its own"),
        candidates=CANDIDATES,
        method=SENSITIVITIES["isolated"],
        workload=WORKLOAD,
        limits=Limits(),
        hardware=DEVICE,
    )
    store = open_store(db)
    put_study(store, settled.study_id, model=model.content_hash, workload=WORKLOAD, limits={})
    return SearchSetup.of(settled, store, listener, {})
