"""Tables that are tied to a linear: what both take together. No torch.

A table and the layer that multiplies with the same tensor share one stored tensor if both get the
same format. So what the table takes depends on the layer's choice, and the two are chosen together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoquant.records import LayerChoice


def shares(table: LayerChoice, linear: LayerChoice | None) -> bool:
    """Check whether a table and the layer it is tied to are one stored tensor."""
    return linear is not None and not linear.joined and linear.format == table.format


def beside(options: Sequence[LayerChoice], linear: LayerChoice | None) -> list[LayerChoice]:
    """Return the options of a table with what they take beside the choice of its linear."""
    return [
        replace(each, memory_bytes=0) if each.tied and shares(each, linear) else each
        for each in options
    ]


def counted_once(choices: Sequence[LayerChoice]) -> list[LayerChoice]:
    """Return the choices of layers, with the bytes of shared tensors counted as the linear's."""
    by_name = {choice.name: choice for choice in choices}
    return [each for choice in choices for each in beside([choice], by_name.get(choice.tied))]
