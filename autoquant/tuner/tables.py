"""From tables of a model to their choices: which formats can be looked up, and what that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoquant.candidates import Format
from autoquant.candidates.formats.floats import original_format
from autoquant.errors import ConstraintError
from autoquant.profiler.lookups import Lookup, time_lookup
from autoquant.records import LOOKUP, LayerChoice, RouteStep, Site
from autoquant.solver.constraints import Constraints
from autoquant.tuner.choices import SiteChoices

_ROUTE = (RouteStep(upper_m=None, kernel=LOOKUP),)


def table_choices(
    table: Site, formats: Sequence[Format], constraints: Constraints, device: str
) -> SiteChoices:
    """Return the choices of a table, not scored yet. The unquantized one takes no time by itself.

    Args:
        formats: Those of the search, the unquantized one among them.

    Raises:
        ConstraintError: The table is pinned to formats of which none can be looked up.
    """
    original = original_format(table.shape.dtype)
    dropped: dict[str, str] = {}
    choices: list[LayerChoice] = []
    unquantized: LayerChoice | None = None
    for fmt in formats:
        admitted = constraints.admits(table.name, f"{fmt.id}/{LOOKUP}", original)
        if fmt.id == original:
            unquantized = _choice(table, fmt, time_lookup(table, fmt, device))
            choices += [unquantized] if admitted else []
        elif reason := _unsupported(table, fmt, device):
            dropped[fmt.id] = reason
        elif admitted:
            choices.append(_choice(table, fmt, time_lookup(table, fmt, device)))
    assert unquantized is not None
    if not choices:
        pinned = constraints.reason(table.name)
        why = "; ".join(f"{fmt}: {reason}" for fmt, reason in dropped.items())
        raise ConstraintError(f"{table.name} is {pinned}, which cannot be looked up: {why}")
    barred = None if unquantized in choices else unquantized
    return SiteChoices(table, tuple(choices), dropped, barred)


def table_notices(choices: Sequence[SiteChoices]) -> Iterator[str]:
    """Say what each table may become."""
    for each in choices:
        found = ", ".join(choice.format for choice in each.choices)
        tied = f", tied to {each.site.tied}" if each.site.tied else ""
        yield f"table {each.site.name}{tied}: {found}"


def _unsupported(table: Site, fmt: Format, device: str) -> str | None:
    if fmt.lookup is None:
        return "rows of its layout cannot be looked up"
    if fmt.needs_inputs:
        return "it rounds for the inputs of a product"
    return fmt.unsupported(table.shape, 1, device.partition(":")[0])


def _choice(table: Site, fmt: Format, found: Lookup) -> LayerChoice:
    return LayerChoice(
        name=table.name,
        parameters=table.parameters,
        shape=table.shape,
        format=fmt.id,
        route=_ROUTE,
        numerics="",
        latency_us=found.latency_us,
        memory_bytes=found.memory_bytes,
        loss=0.0,
        tied=table.tied,
    )
