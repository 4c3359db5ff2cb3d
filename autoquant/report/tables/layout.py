"""The look that all tables share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from autoquant.report.visible import visible

WIDE = 120
"""Terminals of so many columns get wider tables."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of short cells, aligned to the right."""

    head: str
    cells: Sequence[str]


def plain_table(caption: str | None = None, *, expand: bool = True) -> Table:
    """Return an empty table.

    Args:
        expand: Fill the width of the terminal.
    """
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        caption=caption,
        caption_justify="left",
        expand=expand,
    )


def number_table(labels: Sequence[str], columns: Sequence[Column], table: Table) -> Table:
    """Fill a table with a row for each label, and its cells of the columns."""
    table.add_column("Label", overflow="fold", ratio=1)
    for column in columns:
        table.add_column(Text(column.head), justify="right", no_wrap=True)
    for number, label in enumerate(labels):
        table.add_row(*map(Text, [label, *(column.cells[number] for column in columns)]))
    return table


class Visible:
    """What another renderable shows, with `visible` text. Its own colours stay."""

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._shown, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
