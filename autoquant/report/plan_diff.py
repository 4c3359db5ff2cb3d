"""The differences between two plans as tables and as JSON. The tables fit 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from autoquant.records import LayerChoice, Plan
from autoquant.report import units
from autoquant.report.names import fold, layer_words
from autoquant.report.tables.layout import plain_table
from autoquant.report.tables.plans import route_text
from autoquant.report.words import increase_heading, increase_words
from autoquant.study.compare import LayerChange, summed

_MEASURED = (
    "measured_request_ms",
    "perplexity_increase",
    "perplexity_increase_low",
    "perplexity_increase_high",
    "memory_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPair:
    """Two plans of one study.

    Attributes:
        changes: The layers whose choice differs.
        row_before: The row of `Study.rows` of the first plan, or None if it is not proven.
        row_after: The same for the second plan.
    """

    before: Plan
    after: Plan
    changes: Sequence[LayerChange]
    row_before: Mapping[str, Any] | None
    row_after: Mapping[str, Any] | None

    def unproven(self) -> list[str]:
        """Return the ids of the plans that are not proven."""
        pairs = ((self.before, self.row_before), (self.after, self.row_after))
        return [plan.plan_id for plan, row in pairs if row is None]


def change_groups(changes: Sequence[LayerChange]) -> list[tuple[str, tuple[LayerChange, ...]]]:
    """Return the same changes of layers of one shape, folded by name, in the plan's order."""
    alike: dict[tuple[Any, ...], dict[str, LayerChange]] = {}
    for change in changes:
        before, after = change.before, change.after
        kind = (before.shape, before.format, before.route, after.format, after.route)
        alike.setdefault(kind, {})[before.name] = change
    groups = []
    for by_name in alike.values():
        for pattern, names in fold(by_name):
            groups.append((pattern, tuple(by_name[name] for name in names)))
    # Back in the plan's order: that of the first layer of each group.
    position = {change.before.name: index for index, change in enumerate(changes)}
    return sorted(groups, key=lambda group: position[group[1][0].before.name])


def changes_table(changes: Sequence[LayerChange]) -> Table:
    """Return a table of the changes, with the predicted differences."""
    table = plain_table()
    table.add_column("Layers", overflow="fold", ratio=3)
    table.add_column("Before -> after", overflow="fold", ratio=3)
    table.add_column("Request,\npredicted", justify="right", no_wrap=True)
    table.add_column("Loss,\npredicted", justify="right", no_wrap=True)
    table.add_column("Memory", justify="right", no_wrap=True)
    for pattern, members in change_groups(changes):
        name = Text(pattern)
        name.append(f"\n{layer_words(members[0].before, len(members))}", style="dim")
        request_us, loss, memory_bytes = summed(members)
        first = members[0]
        cells = [
            name,
            Text(f"{_choice(first.before)}\n-> {_choice(first.after)}"),
            Text(units.signed(request_us, units.duration_us)),
            Text(units.signed(loss, lambda value: units.digits(value, 2))),
            Text(units.signed(memory_bytes, units.size)),
        ]
        table.add_row(*cells, end_section=True)
    return table


def totals_table(pair: PlanPair) -> Table:
    """Return a table of totals: predicted, and measured if both plans are proven."""
    table = plain_table()
    table.add_column("In total", ratio=1)
    for plan in (pair.before, pair.after):
        table.add_column(Text(f"{plan.label}\n{plan.plan_id}"), justify="right", overflow="fold")
    table.add_column("Difference", justify="right", no_wrap=True)
    for cells in (*_predicted_rows(pair), *_measured_rows(pair)):
        table.add_row(*map(Text, cells))
    return table


def difference_object(pair: PlanPair) -> dict[str, Any]:
    """Return the whole comparison, for JSON.

    Differences are the second plan less the first. `measured` is null unless both are proven.
    """
    a, b = pair.before.prediction, pair.after.prediction
    return {
        "study_id": pair.before.study_id,
        "before": {"plan_id": pair.before.plan_id, "label": pair.before.label},
        "after": {"plan_id": pair.after.plan_id, "label": pair.after.label},
        "unproven": pair.unproven(),
        "changes": [_change_object(change) for change in pair.changes],
        "predicted": _differences(
            {"request_ms": a.request_ms, "loss": a.loss, "memory_bytes": a.memory_bytes},
            {"request_ms": b.request_ms, "loss": b.loss, "memory_bytes": b.memory_bytes},
        ),
        "measured": _measured_object(pair),
    }


def _predicted_rows(pair: PlanPair) -> list[tuple[str, str, str, str]]:
    a, b = pair.before.prediction, pair.after.prediction
    return [
        _row("Request, predicted", a.request_ms, b.request_ms, units.duration_ms),
        _row("Loss, predicted", a.loss, b.loss, units.digits),
        _row("Memory, predicted", a.memory_bytes, b.memory_bytes, units.size),
    ]


def _measured_rows(pair: PlanPair) -> list[tuple[str, str, str, str]]:
    a, b = pair.row_before, pair.row_after
    if a is None or b is None:
        return []
    increase = "perplexity_increase"
    return [
        _row(
            "Request, measured",
            a["measured_request_ms"],
            b["measured_request_ms"],
            units.duration_ms,
        ),
        (
            increase_heading([a, b]),
            increase_words(a),
            increase_words(b),
            units.percent(b[increase] - a[increase], signed=True),
        ),
        ("  95% interval", _interval(a), _interval(b), ""),
        _row("Memory, measured", a["memory_bytes"], b["memory_bytes"], units.size),
    ]


def _row(
    name: str, before: float, after: float, write: Callable[[float], str]
) -> tuple[str, str, str, str]:
    return name, write(before), write(after), units.signed(after - before, write)


def _interval(row: Mapping[str, Any]) -> str:
    return units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])


def _choice(choice: LayerChoice) -> str:
    return f"{choice.format}\n{route_text(choice.route)}"


def _change_object(change: LayerChange) -> dict[str, Any]:
    return {
        "name": change.before.name,
        "shape": asdict(change.before.shape),
        "before": _choice_object(change.before),
        "after": _choice_object(change.after),
        "predicted_request_us": change.request_us,
        "predicted_loss": change.loss,
        "memory_bytes": change.memory_bytes,
    }


def _choice_object(choice: LayerChoice) -> dict[str, Any]:
    return {"format": choice.format, "route": [asdict(step) for step in choice.route]}


def _measured_object(pair: PlanPair) -> dict[str, Any] | None:
    a, b = pair.row_before, pair.row_after
    if a is None or b is None:
        return None
    return _differences(
        {name: a[name] for name in _MEASURED}, {name: b[name] for name in _MEASURED}
    )


def _differences(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Return both, and the differences. Ends of intervals have no meaningful difference."""
    differences = {
        name: after[name] - before[name] for name in before if not name.endswith(("_low", "_high"))
    }
    return {"before": dict(before), "after": dict(after), "difference": differences}
