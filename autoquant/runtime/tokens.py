"""The tokens that the phases of a workload run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autoquant.records import Workload


class WorkloadTokens:
    """Random tokens, the same for every model of a vocabulary.

    Attributes:
        prompt: Tokens of a prompt; 1 for a workload that only decodes.
        steps: Single tokens behind it.
        ids: `[batch, prompt + steps]`.
    """

    def __init__(self, module: nn.Module, workload: Workload, device: str) -> None:
        phases = {phase.name: phase for phase in workload.phases}
        self.prompt = phases["prefill"].tokens if "prefill" in phases else 1
        self.steps = phases["decode"].calls if "decode" in phases else 0
        config: Any = module.config
        vocabulary = config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch, self.prompt + self.steps)
        self.ids = torch.randint(0, vocabulary, shape, generator=generator).to(device)
