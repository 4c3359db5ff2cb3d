"""Isolated loss: what changing one layer alone costs, every other layer unquantized. Exact, and the reference for any other.

On text the loss is KL(unquantized || changed) per token in nats, computed in float32 so that the rounding of 16-bit
activations, which is larger than what one int8 layer does, does not drown it. For a site of block b only the blocks from b
on are run; what came before is the same for every change and taken from the unquantized run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoquant.candidates import A16, ACTIVATION_ROUNDING, Format
from autoquant.evaluators.emulate import EmulatedLinear, in_float32
from autoquant.evaluators.prefix import BlockChain
from autoquant.evaluators.quality import FunctionQuality, TextQuality, divergence_sum, next_token_logits
from autoquant.records import Site

METHOD = "isolated-1"
_KEPT_BYTES = 32 << 20
_SAME_WITHIN = 1e-5


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that can be done to a site: the numbers of a format under an activation rounding."""

    site: Site
    numerics: str
    format: Format
    activation: str


OnSite = Callable[[Site, Mapping[tuple[str, str], float]], None]
"""Told each site's losses, by (site name, numerics), as soon as they are known."""


def isolated_losses(
    module: nn.Module, changes: Sequence[Change], quality: TextQuality | FunctionQuality, on_site: OnSite
) -> None:
    """Score every change on the calibration part.

    A change that leaves the weight's numbers (to within 1e-5) and the activation as they are costs 0 and is not run.
    """
    by_site: dict[str, list[Change]] = {}
    for change in changes:
        by_site.setdefault(change.site.name, []).append(change)
    if isinstance(quality, TextQuality):
        _text_losses(module, by_site, quality, on_site)
    else:
        _function_losses(module, by_site, quality, on_site)


def parameter_of(module: nn.Module, site: Site) -> nn.Parameter:
    """The site's weight in `module`."""
    return module.get_parameter(site.parameters[0])


def _text_losses(module: nn.Module, by_site: Mapping[str, list[Change]], quality: TextQuality, on_site: OnSite) -> None:
    windows = list(quality.windows("calibration"))
    tokens = sum(ids.shape[1] for ids in windows)
    dtypes = {name: parameter_of(module, changes[0].site).dtype for name, changes in by_site.items()}
    with in_float32(module):
        chain = BlockChain(module, lambda: next_token_logits(module, windows[0]))
        runs = [_Run(module, chain, ids) for ids in windows]
        for name, changes in by_site.items():
            totals = dict.fromkeys((change.numerics for change in changes), 0.0)
            parameter = parameter_of(module, changes[0].site)
            weights = _Weights(parameter, dtypes[name], len(changes))
            for run in runs:
                reference = run.reference()
                for change in changes:
                    weight = weights.changed(change)
                    if weight is None:
                        continue
                    with EmulatedLinear(parameter, weight, ACTIVATION_ROUNDING[change.activation]):
                        totals[change.numerics] += divergence_sum(reference, run.logits(chain.start(parameter)))
            losses = {(name, numerics): max(total / tokens, 0.0) for numerics, total in totals.items()}
            on_site(changes[0].site, losses)


class _Run:
    """One window: what the unquantized model's blocks made of it, so that a run may start behind any of them."""

    def __init__(self, module: nn.Module, chain: BlockChain, ids: torch.Tensor) -> None:
        self._module, self._chain, self._ids = module, chain, ids
        self._outputs: list[object] = []
        with chain.capture(self._outputs):
            next_token_logits(module, ids)

    def logits(self, start: int) -> torch.Tensor:
        """`[tokens, vocabulary]`, the blocks before `start` taken from the unquantized model."""
        with self._chain.starting_at(start, self._outputs):
            return next_token_logits(self._module, self._ids)

    def reference(self) -> torch.Tensor:
        """The unquantized model's logits: found again behind the last block, because keeping all of them takes much memory."""
        return self.logits(len(self._chain.blocks))


class _Weights:
    """A site's weight under each change, kept while they are small and made again where they are not."""

    def __init__(self, parameter: torch.Tensor, dtype: torch.dtype, count: int) -> None:
        self._parameter = parameter.detach()
        self._dtype = dtype
        self._kept: dict[str, torch.Tensor | None] = {}
        self._keep = 4 * parameter.numel() * count <= _KEPT_BYTES
        self._same: set[str] = set()

    def changed(self, change: Change) -> torch.Tensor | None:
        """The float32 numbers, or None where neither they nor the activation change."""
        key = change.numerics
        if key in self._same:
            return None
        if key in self._kept:
            return self._kept[key]
        weight = change.format.dequantize(change.format.store(self._parameter.to(self._dtype))).float()
        if change.activation == A16 and _is_same(weight, self._parameter.float()):
            self._same.add(key)
            return None
        if self._keep:
            self._kept[key] = weight
        return weight


def _is_same(weight: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether two weights are equal but for numbers too small to matter (what float16 loses of bfloat16)."""
    return bool((weight - original).norm() <= _SAME_WITHIN * original.norm())


def _function_losses(
    module: nn.Module, by_site: Mapping[str, list[Change]], quality: FunctionQuality, on_site: OnSite
) -> None:
    """Increase of the mean loss over the unquantized model's, never below 0."""
    reference = quality.losses(module, "calibration")
    base = sum(reference) / len(reference)
    for name, changes in by_site.items():
        parameter = parameter_of(module, changes[0].site)
        weights = _Weights(parameter, parameter.dtype, len(changes))
        losses: dict[tuple[str, str], float] = {}
        for change in changes:
            weight = weights.changed(change)
            losses[name, change.numerics] = 0.0
            if weight is None:
                continue
            with EmulatedLinear(parameter, weight.to(parameter.dtype), ACTIVATION_ROUNDING[change.activation]):
                changed = quality.losses(module, "calibration")
            losses[name, change.numerics] = max(sum(changed) / len(changed) - base, 0.0)
        on_site(changes[0].site, losses)
