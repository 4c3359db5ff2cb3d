"""Fisher output: the divergence to second order, from one backward pass for all changes.

A change that adds dY to a linear's output moves the logits by J dY. To second order,
KL = 1/2 (J dY)' F (J dY), where F = diag(p) - p p' is the Fisher information of the logits for each
token's distribution p. With a random vector v with E[v v'] = F, this is 1/2 E[(g . dY)^2]. One
backward pass from v gives g = J' v for every layer at once. (nvidia-modelopt scores with the same
gradient, but for labels of the text. For the form, see MacKay, "A Practical Bayesian Framework",
1992.) Here v = sqrt(p) * r - p (sqrt(p) . r) with random signs r, because its products vary less
than those of sampled labels. For each change, only dY remains to be computed, which is a product of
the layer's size.

g . dY sums over all tokens, so its square is one number per window. The squares of single tokens
are thousands of numbers and so more precise. But they leave out how errors of different tokens act
together: an error that all keys share does nothing to attention, and one that all values share adds
up. The ratio of the two is similar for all changes of a layer. So it is estimated from runs of
tokens over all changes together, and multiplies the squares of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.calls import product
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.sensitivity.base import (
    EVERY_LAYER,
    Change,
    OnScored,
    Sensitivity,
    by_site,
    check_text,
    parameter_of,
    straight,
)
from autoquant.evaluators.sensitivity.gradients import (
    PlaceKey,
    backpropagate_each,
    changed_output,
    scoring_products,
)
from autoquant.evaluators.sensitivity.together import (
    CalibrationModel,
    by_numerics,
    dtypes_of,
    room_for_model,
)
from autoquant.evaluators.sensitivity.weights import ChangedWeights, Room

_LEAST_ROWS = 3000
_RUN_TOKENS = 32


def fisher_losses(
    module: nn.Module, changes: Sequence[Change], quality: AnyQuality, on_scored: OnScored
) -> None:
    """Score every change on the calibration part, then each numerics in all layers.

    A short text is read several times, with other random signs.
    """
    text = check_text(quality, FISHER.id)
    dtypes = dtypes_of(module, changes)
    with torch.no_grad(), in_float32(module), scoring_products(module):
        calibration = CalibrationModel(module, text)
        room = room_for_model(module)
        sites = [
            _FisherSite(
                parameter_of(module, of[0].site), of, dtypes[name], room, calibration.device
            )
            for name, of in by_site(changes).items()
        ]
        rounds = -(-_LEAST_ROWS // calibration.rows)
        _observe(calibration, sites, rounds)
        losses: dict[tuple[str, str], float] = {}
        for site in sites:
            losses |= site.losses(rounds * calibration.rows)
        for numerics, of in by_numerics(changes).items():
            own = {
                (change.site.name, numerics): losses[change.site.name, numerics] for change in of
            }
            whole = calibration.whole(calibration.sites(of, dtypes))
            on_scored(numerics, own | {(EVERY_LAYER, numerics): whole})


def _observe(calibration: CalibrationModel, sites: Sequence[_FisherSite], rounds: int) -> None:
    generator = torch.Generator(calibration.device).manual_seed(0)

    def end_of_pass() -> None:
        for site in sites:
            site.end_of_pass()

    for _ in range(rounds):
        backpropagate_each(
            calibration.module,
            calibration.batches,
            sites,
            lambda _number: lambda logits: fisher_vector(logits, generator),
            end_of_pass,
        )


def fisher_vector(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a random v for each row of logits `[..., vocabulary]`.

    E[v v'] = diag(p) - p p', where p is the softmax of the row.
    """
    root = logits.float().softmax(-1).sqrt_()
    zeros_and_ones = torch.randint(
        0, 2, root.shape, generator=generator, device=root.device, dtype=torch.int8
    )
    signs = zeros_and_ones.mul_(2).sub_(1)
    signed = root * signs
    return signed.sub_(root.square() * signed.sum(-1, keepdim=True)).to(logits.dtype)


class _FisherSite:
    """One site of the unquantized model.

    It sums (g . dY)^2 over tokens, and over runs of tokens, for each change.
    """

    def __init__(
        self,
        parameter: torch.Tensor,
        changes: Sequence[Change],
        dtype: torch.dtype,
        room: Room,
        device: torch.device,
    ) -> None:
        self.name = changes[0].site.name
        self.parameter = parameter
        self._changes = changes
        self._looks_up = changes[0].site.lookup
        self._weights = ChangedWeights(parameter, dtype, room, device)
        self._products: dict[tuple[str, int], torch.Tensor] = {}
        self._sums = torch.zeros(2, len(changes), device=device)

    @property
    def key(self) -> PlaceKey:
        return id(self.parameter), self._looks_up

    def output(self, x: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
        return F.embedding(x, self.weight()) if self._looks_up else product(x, self.weight(), ends)

    def weight(self) -> torch.Tensor:
        return straight(self.parameter, self._changes[0].site)

    def observe(self, x: torch.Tensor, gradient: torch.Tensor, ends: torch.Tensor | None) -> None:
        """Add g . dY of every row and change. Uses of the same weight add up."""
        original = self.output(x, ends)
        for change in self._changes:
            weight = self._weights.changed(change)
            if weight is None:
                continue
            if self._looks_up:
                difference = F.embedding(x, weight).sub_(original)
            else:
                difference = changed_output(x, weight, change, ends).sub_(original)
            inner = difference.mul_(gradient).sum(-1).flatten()
            key = (change.numerics, len(inner))
            if key in self._products:
                inner = self._products[key] + inner
            self._products[key] = inner

    def end_of_pass(self) -> None:
        """Square the products of one backward pass."""
        columns = {change.numerics: column for column, change in enumerate(self._changes)}
        for (numerics, rows), inner in self._products.items():
            runs = F.pad(inner, (0, -rows % _RUN_TOKENS)).reshape(-1, _RUN_TOKENS)
            self._sums[0, columns[numerics]] += inner.square().sum()
            self._sums[1, columns[numerics]] += runs.sum(-1).square().sum()
        self._products.clear()

    def losses(self, rows: int) -> dict[tuple[str, str], float]:
        """Return the mean divergence per token in nats, by (site, numerics)."""
        by_token, by_run = self._sums.tolist()
        ratios = [run / token for token, run in zip(by_token, by_run, strict=True) if token > 0]
        ratio = sum(ratios) / len(ratios) if ratios else 0.0
        return {
            (self.name, change.numerics): 0.5 * ratio * token / rows
            for change, token in zip(self._changes, by_token, strict=True)
        }


FISHER = Sensitivity(
    id="fisher",
    version="fisher-1",
    score=fisher_losses,
    together=True,
    functions=False,
    description="the divergence to second order, from gradients of the unquantized model: fast",
)
