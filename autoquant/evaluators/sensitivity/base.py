"""The interface of every sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoquant.candidates import A16, Format, activation_rounding
from autoquant.errors import QualityError
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.quality import TextQuality
from autoquant.records import LOOKUP, Site

EVERY_LAYER = "*"
"""Replaces the layer's name in the loss of changing all layers at once."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a site: the numbers of a format with a rounding of the activation.

    Attributes:
        stored: Returns the weight in the format, if more than the weight is needed to make it.
        input_kept: What it keeps for its activation, if the format has `input_kept`.
    """

    site: Site
    numerics: str
    format: Format
    activation: str
    stored: Callable[[], torch.Tensor] | None = None
    input_kept: torch.Tensor | None = None

    @property
    def rounding(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """How the activation is rounded."""
        return activation_rounding(self.activation, self.input_kept)

    @property
    def keeps_input(self) -> bool:
        """Only the weight changes, and no activation."""
        return self.activation in (A16, LOOKUP)


Losses = Mapping[tuple[str, str], float]
"""Losses by (site name, numerics)."""
OnScored = Callable[[str, Losses], None]
"""Called with losses as soon as they are known, and with their site or numerics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """One way to predict the loss of a change.

    Attributes:
        id: Name for users.
        version: Key of the losses in the store. Methods, and versions of a method, never mix.
        score: Scores every change on the calibration part: (module, changes, quality, on_scored).
        together: The method takes the changes of all sites of a numerics at once, and also scores
            changing all of them (`EVERY_LAYER`). Otherwise it scores site by site.
        functions: The method also works with quality functions and divergence of outputs.
        description: One line for users.
    """

    id: str
    version: str
    score: Callable[[nn.Module, Sequence[Change], AnyQuality, OnScored], None]
    together: bool
    functions: bool
    description: str


def by_site(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """Return the changes of each site by its name, in order."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.site.name, []).append(change)
    return found


def parameter_of(module: nn.Module, site: Site) -> nn.Parameter:
    """Return the site's weight in `module`."""
    return module.get_parameter(site.parameters[0])


def straight(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """Return a site's weight as `[n, k]` or `[experts, n, k]`, in the same memory."""
    return weight.transpose(-2, -1) if site.turned else weight


def check_text(quality: AnyQuality, method: str) -> TextQuality:
    """Return the quality if it is text.

    Raises:
        QualityError: The quality is not text.
    """
    if isinstance(quality, TextQuality):
        return quality
    raise QualityError(
        f"--sensitivity {method} needs a text: without one use --sensitivity isolated"
    )
