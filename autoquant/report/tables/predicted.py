"""Plans that were solved for and not proven, with their predictions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from autoquant.records import Plan
from autoquant.report import units
from autoquant.report.tables.layout import plain_table


def predicted_table(plans: Sequence[Plan], chosen: Plan) -> Table:
    """Return a table of plans, the most exact first."""
    time_unit, times = units.common_ms([plan.prediction.request_ms for plan in plans])
    memory_unit, memory = units.common_bytes([plan.prediction.memory_bytes for plan in plans])
    table = plain_table(
        caption="> predicted to be within the limits; the others are more exact or faster"
    )
    table.add_column("", no_wrap=True, width=1)
    table.add_column("Loss", justify="right", no_wrap=True)
    table.add_column(Text(f"Request\n[{time_unit}]"), justify="right", no_wrap=True)
    table.add_column(Text(f"Memory\n[{memory_unit}]"), justify="right", no_wrap=True)
    table.add_column("Formats", overflow="fold", ratio=1)
    for plan, time, stored in zip(plans, times, memory, strict=True):
        formats = ", ".join(f"{count} x {name}" for name, count in plan.formats().items())
        mark = ">" if plan.plan_id == chosen.plan_id else ""
        table.add_row(*map(Text, (mark, units.digits(plan.prediction.loss), time, stored, formats)))
    return table
