"""A checkup of a machine as one screen and as JSON. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_MOST_NAMES = 4


class ProblemLine(Protocol):
    """A `autoquant.tuner.doctor.Problem`."""

    @property
    def what(self) -> str: ...
    @property
    def remedy(self) -> str: ...
    @property
    def stops(self) -> bool: ...


class CheckupLines(Protocol):
    """A `autoquant.tuner.doctor.Checkup`."""

    @property
    def device(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, str]: ...
    @property
    def usable(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def unusable(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def clock(self) -> Any: ...
    @property
    def problems(self) -> Sequence[ProblemLine]: ...
    @property
    def works(self) -> bool: ...


def checkup_screen(checkup: CheckupLines) -> RenderableType:
    """Return the checkup for a terminal: a verdict, the facts, and what is wrong."""
    grid = Table.grid(padding=(0, 2), expand=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _lines(checkup):
        grid.add_row(Text(name, style="bold"), Text(text))
    return Group(Text(_verdict(checkup)), Text(), grid)


def checkup_object(checkup: CheckupLines) -> dict[str, Any]:
    """Return the checkup as a JSON object."""
    return {
        "device": checkup.device,
        "works": checkup.works,
        "facts": dict(checkup.facts),
        "usable": {values: list(kernels) for values, kernels in checkup.usable.items()},
        "unusable": {reason: list(formats) for reason, formats in checkup.unusable.items()},
        "clock": asdict(checkup.clock),
        "problems": [
            {"what": each.what, "remedy": each.remedy, "stops": each.stops}
            for each in checkup.problems
        ],
    }


def _verdict(checkup: CheckupLines) -> str:
    count = len(checkup.problems)
    found = "nothing is wrong" if not count else f"{count} thing{'s'[: count > 1]} to know, below"
    works = "works" if checkup.works else "does not work"
    return f"a search on {checkup.device} {works} here: {found}"


def _lines(checkup: CheckupLines) -> Iterator[tuple[str, str]]:
    yield from checkup.facts.items()
    clock = checkup.clock
    yield "clock", f"spread {clock.spread:.1%}, slowest 5% take {clock.slowest:.2f} times as long"
    usable = (f"{values} ({len(kernels)})" for values, kernels in checkup.usable.items())
    yield "usable", f"{', '.join(usable)}; in brackets how many kernels"
    name = "not usable"
    for reason, kernels in checkup.unusable.items():
        yield name, f"{_values(kernels)} ({len(kernels)}): {reason}"
        name = ""
    for problem in checkup.problems:
        yield "wrong" if problem.stops else "to know", f"{problem.what}: {problem.remedy}"


def _values(kernels: Sequence[str]) -> str:
    """Return the numbers that the weights of kernels are stored as, each once."""
    names = list(dict.fromkeys(kernel.partition("/")[0] for kernel in kernels))
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
