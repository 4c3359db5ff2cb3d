"""Find the tables of a model at work: parameters of which rows are looked up (embeddings)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from autoquant.candidates.calls import LookupCall
from autoquant.records import LinearShape, Site, SiteUse

LEAST_SHARE = 0.01
"""Of the model's parameters. A smaller table is left alone: rounding it saves next to nothing."""
ASK = "; `autoquant search --embeddings` searches it"


@dataclass(slots=True)
class Looked:
    """The observed lookups in one parameter.

    Attributes:
        owners: Modules that looked up rows.
        uses: Calls, by phase and number of rows.
        changed: A lookup scaled rows in place.
    """

    owners: set[str] = field(default_factory=set)
    uses: dict[tuple[str, int], int] = field(default_factory=dict)
    changed: bool = False

    def note(self, call: LookupCall, phase: str, owner: str) -> None:
        """Take note of one lookup. One without rows is none."""
        self.changed |= call.changes_table
        if rows := call.ids.numel():
            self.owners.add(owner)
            self.uses[phase, rows] = self.uses.get((phase, rows), 0) + 1


def table_site(
    parameter: torch.Tensor,
    names: Sequence[str],
    looked: Looked,
    others: Mapping[str, Collection[str]],
    linear: Site | None,
) -> Site | str:
    """Return a table as a site, or why it is left alone.

    Args:
        names: All names of the parameter.
        others: Modules that used it otherwise than by a product, by the use.
        linear: The site that multiplies with it, if there is one.
    """
    if looked.changed:
        return "its lookups change it (max_norm)"
    if parameter.ndim != 2 or not parameter.is_floating_point():
        return f"a table of {parameter.ndim} dimensions and {parameter.dtype}"
    own = tuple(name for name in names if linear is None or name not in linear.parameters)
    elsewhere = set().union(*(owners for use, owners in others.items() if use != "embedding"))
    if elsewhere or not own:
        used = ", ".join(sorted(use for use in others if use != "embedding"))
        return f"looked up, and also used by {used or 'a linear under the same name'}"
    n, k = parameter.shape
    dtype = str(parameter.dtype).removeprefix("torch.")
    named = next((each for each in own if each.rpartition(".")[0] in looked.owners), own[0])
    return Site(
        name=named.removesuffix(".weight"),
        parameters=own,
        shape=LinearShape(n=n, k=k, bias=False, dtype=dtype),
        uses=tuple(SiteUse(phase=phase, m=m, calls=c) for (phase, m), c in looked.uses.items()),
        lookup=True,
        tied="" if linear is None else linear.name,
    )
