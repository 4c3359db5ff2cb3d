"""Progress of long work on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from autoquant.events import (
    Ending,
    Event,
    Listener,
    Notice,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
)
from autoquant.report.units import clock_s
from autoquant.report.visible import visible

_REFRESH_S = 0.1


@contextmanager
def listening(stream: TextIO | None = None) -> Iterator[Listener]:
    """Open a listener that writes to `stream`, or to stderr for None.

    It is live on a terminal, and silent while the log shows the same.
    """
    if logging.getLogger("autoquant").isEnabledFor(logging.INFO):
        yield ignore
        return
    stream = stream or sys.stderr
    if not stream.isatty():
        yield PlainListener(stream)
        return
    with LiveListener(Console(file=stream, highlight=False)) as listener:
        yield listener


class PlainListener:
    """Writes a line for each finished stage and each notice."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageFinished):
            self._stream.write(f"{event.stage}: {visible(event.summary)}\n")
        elif isinstance(event, Notice):
            self._stream.write(f"note: {visible(event.text)}\n")
        else:
            return
        self._stream.flush()


class LiveListener:
    """One line with the stage, the items done, the time left of it and of all, and the item.

    Events draw the line. A thread would disturb the kernels that are timed.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._progress = Progress(
            TextColumn("{task.fields[stage]}", style="bold", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="cyan", markup=False),
            TextColumn("{task.fields[whole]}", style="cyan", markup=False),
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            expand=True,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
        )
        self._task: TaskID | None = None
        self._estimate = TimeLeft(0, 0.0)
        self._drawn = float("-inf")
        self._ends: float | None = None

    def __enter__(self) -> LiveListener:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._clear()
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted():
                self._start(event)
            case StageProgress():
                self._advance(event)
            case StageFinished():
                self._clear()
                summary = visible(event.summary)
                self._console.print(Text.assemble((event.stage, "bold"), f": {summary}"))
            case Ending():
                self._ends = self._now() + event.in_s
            case Notice():
                self._console.print(Text.assemble(("note: ", "yellow"), visible(event.text)))

    def _start(self, event: StageStarted) -> None:
        self._clear()
        self._estimate = TimeLeft(event.total, self._now())
        self._task = self._progress.add_task(
            "", total=event.total, stage=event.stage, left="", whole=self._whole()
        )
        self._progress.refresh()

    def _advance(self, event: StageProgress) -> None:
        if self._task is None:
            return
        now = self._now()
        left = self._estimate.left_s(event.done, now)
        shown = "" if left is None else f"{clock_s(left)} left"
        what = visible(event.what)
        self._progress.update(
            self._task, completed=event.done, description=what, left=shown, whole=self._whole()
        )
        if now - self._drawn >= _REFRESH_S:
            self._progress.refresh()
            self._drawn = now

    def _whole(self) -> str:
        """Return the time left of all stages; empty if nothing is known or it is over."""
        left_s = 0.0 if self._ends is None else self._ends - self._now()
        return f"of {clock_s(left_s)} in all" if left_s > 0 else ""

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            self._progress.refresh()


class TimeLeft:
    """Estimates the time left of a stage from its pace. Items known before it do not count."""

    def __init__(self, total: int, started: float) -> None:
        self._total = total
        self._first = (0, started)
        self._reported = False

    def left_s(self, done: int, now: float) -> float | None:
        """Return the seconds left, or None before the pace is known."""
        if not self._reported:
            self._reported = True
            self._first = (done, now)
        items, seconds = done - self._first[0], now - self._first[1]
        if items < 1 or seconds <= 0:
            return None
        return max(0.0, (self._total - done) * seconds / items)
