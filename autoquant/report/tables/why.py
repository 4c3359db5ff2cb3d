"""The alternatives of a plan's layers: the next better and the next cheaper choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from autoquant.records import LayerChoice, Plan
from autoquant.report import units
from autoquant.report.names import fold
from autoquant.report.tables.layout import plain_table
from autoquant.report.tables.plans import joined_text, route_text
from autoquant.solver.alternatives import Alternative, Alternatives

NOTHING_KEPT = (
    "The database does not hold the alternatives of the layers: an older autoquant made this "
    "search, or it has not solved for plans yet. The same `autoquant search` goes on to it."
)
TOGETHER = (
    "Layers that are computed as one change together: the cost of a change to the other layers is"
    " not counted."
)


def why_table(plan: Plan, found: Alternatives) -> Table:
    """Return a table of layers with the same choice and alternatives. Differences are sums."""
    table = plain_table(
        caption="Differences as predicted, of all layers of a block together, in one request."
    )
    table.add_column("Layers, and their choice", overflow="fold", ratio=3)
    table.add_column("Instead", overflow="fold", ratio=3)
    table.add_column("Request", justify="right", no_wrap=True)
    table.add_column("Loss", justify="right", no_wrap=True)
    table.add_column("Memory", justify="right", no_wrap=True)
    for pattern, layers in _groups(plan, found):
        name = Text(pattern)
        name.append(f"\n{_choice(layers[0])}", style="dim")
        instead = list(zip(*(found[layer.name] for layer in layers), strict=True))
        if not instead:
            table.add_row(name, Text("nothing is more exact, faster or smaller"), end_section=True)
        for number, alike in enumerate(instead):
            last = number == len(instead) - 1
            table.add_row(name if number == 0 else "", *_cells(alike), end_section=last)
    return table


def together(plan: Plan, found: Alternatives) -> bool:
    """Return whether layers of the plan, or of an alternative, are computed as one."""
    others = (each.choice for layer in plan.layers for each in found[layer.name])
    return any(choice.joined for choice in (*plan.layers, *others))


def _groups(plan: Plan, found: Alternatives) -> list[tuple[str, tuple[LayerChoice, ...]]]:
    """Return layers with one shape, choice and alternatives, folded by name."""
    alike: dict[tuple[Any, ...], dict[str, LayerChoice]] = {}
    for layer in plan.layers:
        instead = tuple(
            (each.gains, each.choice.format, each.choice.route, bool(each.choice.joined))
            for each in found[layer.name]
        )
        key = (layer.shape, layer.format, layer.route, bool(layer.joined), instead)
        alike.setdefault(key, {})[layer.name] = layer
    return [
        (pattern, tuple(members[name] for name in names))
        for members in alike.values()
        for pattern, names in fold(members)
    ]


def _cells(alike: Sequence[Alternative]) -> list[Text]:
    words = Text(f"{', '.join(alike[0].gains)}:", style="italic")
    words.append(f"\n{_choice(alike[0].choice)}", style="not italic")
    return [
        words,
        Text(units.signed(sum(each.request_us for each in alike), units.duration_us)),
        Text(units.signed(sum(each.loss for each in alike), lambda loss: units.digits(loss, 2))),
        Text(units.signed(sum(each.memory_bytes for each in alike), units.size)),
    ]


def _choice(layer: LayerChoice) -> str:
    return f"{layer.format}\n{route_text(layer.route)}{joined_text(layer)}"
