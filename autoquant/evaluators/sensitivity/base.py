"""What every sensitivity scores, and how it says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from autoquant.candidates import Format
from autoquant.errors import QualityError
from autoquant.evaluators.outputs import AnyQuality
from autoquant.evaluators.quality import TextQuality
from autoquant.records import Site

EVERY_LAYER = "*"
"""Stands for the layer's name in the loss of changing all of them at once."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that can be done to a site: the numbers of a format under an activation rounding.

    Attributes:
        stored: Gives the weight in the format, where that is not made from the weight alone.
    """

    site: Site
    numerics: str
    format: Format
    activation: str
    stored: Callable[[], torch.Tensor] | None = None


Losses = Mapping[tuple[str, str], float]
"""By (site name, numerics)."""
OnScored = Callable[[str, Losses], None]
"""Told losses as soon as they are known, with a word for what they are of: a site, or a numerics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """One way to predict what a change costs.

    Attributes:
        id: Its name for users.
        version: Names the losses in the store, so that those of two methods, or of two versions of one, never mix.
        score: (module, changes, quality, on_scored): scores every change on the calibration part.
        together: It asks for the changes of all sites of a numerics at once, and scores with them what changing all of these
            sites costs (`EVERY_LAYER`); otherwise sites are scored one by one.
        functions: It works with quality functions and divergence of outputs, not on text only.
        description: One line for users.
    """

    id: str
    version: str
    score: Callable[[nn.Module, Sequence[Change], AnyQuality, OnScored], None]
    together: bool
    functions: bool
    description: str


def by_site(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """The changes of each site, by its name, in order."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.site.name, []).append(change)
    return found


def parameter_of(module: nn.Module, site: Site) -> nn.Parameter:
    """The site's weight in `module`."""
    return module.get_parameter(site.parameters[0])


def check_text(quality: AnyQuality, method: str) -> TextQuality:
    """The quality, which must be text.

    Raises:
        QualityError: It is not.
    """
    if isinstance(quality, TextQuality):
        return quality
    raise QualityError(
        f"--sensitivity {method} needs a text: without one use --sensitivity isolated"
    )
