"""Read the first part of a format's id: which numbers a weight holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

A16 = "a16"
"""Numerics of a kernel that does not round the activation."""
A8_TOKEN = "a8-token"
"""Numerics of an engine that rounds each token to int8 with a zero point, whatever the plan does.

No kernel of a search has them.
"""

UNQUANTIZED = ("bfloat16", "float16", "float32")
"""Families that every target holds as a plain weight."""

_GROUPED = re.compile(r"(?P<family>int\ds?)-g(?P<group>\d{1,5})(?:-(?P<rounding>[a-z]+))?")


@dataclass(frozen=True, slots=True)
class Values:
    """The parts of a name such as `int4s-g64-gptq`.

    Attributes:
        family: What the numbers are: `int4s`, or the whole name if it has no group (`int8-row`).
        group: Weights along k that share a scale, or None.
        rounding: How the numbers were chosen, or "" for to nearest. Targets hold all roundings
            alike, unless they say otherwise.
    """

    family: str
    group: int | None = None
    rounding: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether these are floats that every target holds as they are."""
        return self.family in UNQUANTIZED

    @classmethod
    def parse(cls, name: str) -> Values:
        """Read the values of a format, or the id of a format."""
        name = name.partition("/")[0]
        found = _GROUPED.fullmatch(name)
        if found is None:
            return cls(name)
        return cls(found["family"], int(found["group"]), found["rounding"] or "")

    def __str__(self) -> str:
        group = "" if self.group is None else f"-g{self.group}"
        return f"{self.family}{group}{f'-{self.rounding}' if self.rounding else ''}"


Activations = Literal["rounded", "a16"]
"""What is taken where some kernels of a route round the activation and others do not."""
ACTIVATIONS: tuple[Activations, ...] = ("rounded", "a16")


def rounded_activation(numerics: Iterable[str], mixed: Activations = "rounded") -> str:
    """Return the one way to round the activation that stands for a whole route.

    No target has routes. If some kernels of a route round the activation and others do not, the
    rounded one is what the layer's loss was scored with, and the other is more exact.

    Args:
        mixed: Which of the two is taken.
    """
    known = list(numerics)
    if mixed == "a16" and A16 in known:
        return A16
    return next((each for each in known if each != A16), A16)
