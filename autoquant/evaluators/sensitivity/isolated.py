"""Isolated loss: the loss of changing one layer, with every other layer unquantized.

It is exact, and the reference for the other methods. On text, the loss is
KL(unquantized || changed) per token in nats. It is computed in float32, because the rounding of
16-bit activations would drown the effect of one int8 layer. For a site of block b, only the blocks
from b on are run. The output of the blocks before is the same for every change, so the unquantized
run provides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from autoquant.candidates.calls import LinearHook
from autoquant.evaluators.emulate import EmulatedLinear, EmulatedTable, in_float32
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.outputs import AnyQuality, DivergenceQuality
from autoquant.evaluators.passes import on_device
from autoquant.evaluators.quality import FunctionQuality, TextQuality, next_token_logits
from autoquant.evaluators.sensitivity.base import (
    Change,
    OnScored,
    Sensitivity,
    by_site,
    parameter_of,
)
from autoquant.evaluators.sensitivity.weights import ChangedWeights, room_for_site
from autoquant.models.blocks import BlockChain
from autoquant.models.loaded import device_of
from autoquant.models.streaming import stream_of


def isolated_losses(
    module: nn.Module, changes: Sequence[Change], quality: AnyQuality, on_scored: OnScored
) -> None:
    """Score every change on the calibration part.

    A change that keeps the weight's numbers (to within 1e-5) and the activation costs 0.
    """
    sites = by_site(changes)
    if isinstance(quality, TextQuality):
        _text_losses(module, sites, quality, on_scored)
    else:
        _function_losses(module, sites, quality, on_scored)


def _text_losses(
    module: nn.Module, sites: Mapping[str, list[Change]], quality: TextQuality, on_scored: OnScored
) -> None:
    windows = list(quality.windows("calibration"))
    tokens = sum(ids.shape[1] for ids in windows)
    dtypes = {name: parameter_of(module, changes[0].site).dtype for name, changes in sites.items()}
    with in_float32(module):
        chain = BlockChain(module, lambda: next_token_logits(module, windows[0]))
        runs = [_Run(module, chain, ids) for ids in windows]
        for name, changes in sites.items():
            totals = dict.fromkeys((change.numerics for change in changes), 0.0)
            parameter = parameter_of(module, changes[0].site)
            weights = ChangedWeights(
                parameter, dtypes[name], room_for_site(parameter, len(changes)), device_of(module)
            )
            for run in runs:
                reference = run.reference()
                for change in changes:
                    weight = weights.changed(change)
                    if weight is None:
                        continue
                    start = 0 if change.site.lookup else chain.start(parameter)
                    with _emulated(change, parameter, weight):
                        totals[change.numerics] += divergence_sum(reference, run.logits(start))
            losses = {
                (name, numerics): max(total / tokens, 0.0) for numerics, total in totals.items()
            }
            on_scored(name, losses)


def _emulated(change: Change, parameter: torch.Tensor, weight: torch.Tensor) -> LinearHook:
    """Return what makes a change of a linear or a table while it is active."""
    if change.site.lookup:
        return EmulatedTable(parameter, weight)
    return EmulatedLinear(parameter, weight, change.rounding)


class _Run:
    """One window with the unquantized output of every block, where a run may start."""

    def __init__(self, module: nn.Module, chain: BlockChain, ids: torch.Tensor) -> None:
        self._module, self._chain, self._ids = module, chain, ids
        self._outputs: list[object] = []
        self._streamed = stream_of(module) is not None
        with chain.capture(self._outputs, "cpu" if self._streamed else None):
            next_token_logits(module, ids)

    def logits(self, start: int) -> torch.Tensor:
        """Return logits `[tokens, vocabulary]`, with unquantized outputs before block `start`."""
        outputs = self._outputs
        if self._streamed and start:  # the last of them is all that is read
            outputs = [on_device(outputs[start - 1], device_of(self._module))] * start
        with self._chain.starting_at(start, outputs):
            return next_token_logits(self._module, self._ids)

    def reference(self) -> torch.Tensor:
        """Return the unquantized model's logits, recomputed from the last block to save memory."""
        return self.logits(len(self._chain.blocks))


def _function_losses(
    module: nn.Module,
    sites: Mapping[str, list[Change]],
    quality: FunctionQuality | DivergenceQuality,
    on_scored: OnScored,
) -> None:
    """Score by the increase of the mean loss or by divergence of outputs, never below 0."""
    increase = quality.increase_over(module, "calibration")
    for name, changes in sites.items():
        parameter = parameter_of(module, changes[0].site)
        room = room_for_site(parameter, len(changes))
        weights = ChangedWeights(parameter, parameter.dtype, room, device_of(module))
        losses: dict[tuple[str, str], float] = {}
        for change in changes:
            weight = weights.changed(change)
            losses[name, change.numerics] = 0.0
            if weight is None:
                continue
            with _emulated(change, parameter, weight.to(parameter.dtype)):
                losses[name, change.numerics] = max(increase(module), 0.0)
        on_scored(name, losses)


ISOLATED = Sensitivity(
    id="isolated",
    version="isolated-1",
    score=isolated_losses,
    together=False,
    functions=True,
    description="each layer's divergence measured alone: exact, slow",
)
