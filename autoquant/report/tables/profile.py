"""Latencies of linears for the terminal, shape by shape. Fits 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoquant.profiler.latencies import Latencies, Row, is_original
from autoquant.records import LinearShape
from autoquant.report import units
from autoquant.report.names import fold, shape_words
from autoquant.report.words import device_words

_CELL_WIDTH = 8
_LEAST_NAME_WIDTH = 24
_WORTH = 1.05  # a family needs this speedup at some m to get its own line
_COUNTED = (
    ("ok", "measured"),
    ("bounded", "bounded away"),
    ("beaten", "beaten in a try-out"),
    ("unsupported", "unsupported"),
    ("incorrect", "incorrect"),
    ("failed", "failed"),
)
_SHORT = {
    "unsupported": "unsupp.",
    "incorrect": "incorr.",
    "bounded": "bounded",
    "beaten": "beaten",
    "failed": "failed",
}


def latencies_report(latencies: Latencies, width: int = 80) -> RenderableType:
    """Return the whole report on timed shapes."""
    parts: list[RenderableType] = []
    for shape, rows in latencies.shapes().items():
        parts.append(Text(_heading(shape, latencies.names.get(shape, ()), width), style="bold"))
        parts += latency_tables(rows, width)
        parts += _wrapped(route_lines(rows), width)
        parts.append(Text(""))
    if any(row["outcome"] == "ok" for row in latencies.rows):
        parts.append(Text("Latency in µs of one linear; * the best of its column."))
    parts += _wrapped([*reason_lines(latencies.rows), *total_lines(latencies)], width)
    return Group(*parts)


def latency_tables(rows: Sequence[Row], width: int = 80) -> list[Table]:
    """Return the tables of one shape: a row for each candidate, and a column for each m.

    Many m take several tables. `reason_lines` lists the candidates that support no m.
    """
    rows_m = _all_m(rows)
    best = {}
    for m in rows_m:
        best[m] = min((row["latency_us"] for row in _ok(rows, m)), default=math.inf)
    lines = _candidate_lines(rows)
    per_table = max(1, (width - _LEAST_NAME_WIDTH) // _CELL_WIDTH)
    tables = []
    for start in range(0, len(rows_m), per_table):
        shown = rows_m[start : start + per_table]
        table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        table.add_column("Candidate", overflow="fold")
        for m in shown:
            table.add_column(f"m={m}", justify="right", no_wrap=True)
        room = width - _CELL_WIDTH * len(shown)
        for line in lines:
            first = next(iter(line.values()))
            cells = [_cell(line.get(m), best[m]) for m in shown]
            table.add_row(
                Text(_folded(_candidate(first), room)),
                *cells,
                style="bold" if is_original(first) else "",
            )
        tables.append(table)
    return tables


def route_lines(rows: Sequence[Row]) -> list[str]:
    """Return the best format and route of each family against unquantized, best family first."""
    original = {
        row["m"]: row["latency_us"] for row in rows if is_original(row) and row["outcome"] == "ok"
    }
    families: dict[str, tuple[float, str]] = {}
    slower: dict[str, None] = {}
    for format_id in dict.fromkeys(row["format"] for row in rows if not is_original(row)):
        route = best_route([row for row in rows if row["format"] == format_id])
        speedups = {m: original[m] / row["latency_us"] for m, row in route.items() if m in original}
        if not speedups:
            continue
        family = format_id.partition("/")[0].partition("-")[0]
        if max(speedups.values()) < _WORTH:
            slower[family] = None
            continue
        # An m without a kernel counts as a speedup of 1.
        mean = math.exp(sum(map(math.log, speedups.values())) / len(original))
        text = f"{format_id} {_route_words(route, _all_m(rows))}; {_speedup_words(speedups)}"
        families[family] = max(families.get(family, (0.0, "")), (mean, text))
    ranked = sorted(families.values(), reverse=True)
    lines = [
        f"{'then' if position else 'best'}: {text}" for position, (_, text) in enumerate(ranked)
    ]
    rest = [family for family in slower if family not in families]
    return [*lines, f"no faster than unquantized at any m: {', '.join(rest)}"] if rest else lines


def best_route(rows: Sequence[Row]) -> dict[int, Row]:
    """Return the fastest of the rows that are ok by m."""
    found = {
        m: min(_ok(rows, m), key=lambda row: row["latency_us"], default=None) for m in _all_m(rows)
    }
    return {m: row for m, row in found.items() if row is not None}


@dataclass(frozen=True, slots=True)
class Untimed:
    """Candidates that have no latency at some m for the same reason."""

    outcome: str
    reason: str
    candidates: tuple[str, ...]
    rows_m: tuple[int, ...]


def untimed(rows: Sequence[Row]) -> list[Untimed]:
    """Return why candidates have no latency, with every reason once."""
    found: dict[tuple[str, str], dict[str, set[int]]] = {}
    first_reasons: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["outcome"] == "ok":
            continue
        # Reasons may name an m. The first one stands for the candidate.
        outcome, candidate = row["outcome"], _candidate(row)
        reason = first_reasons.setdefault((outcome, candidate), row["reason"])
        found.setdefault((outcome, reason), {}).setdefault(candidate, set()).add(row["m"])
    order = list(_SHORT)
    return [
        Untimed(outcome, reason, tuple(members), tuple(sorted(set().union(*members.values()))))
        for (outcome, reason), members in sorted(
            found.items(), key=lambda item: order.index(item[0][0])
        )
    ]


def reason_lines(rows: Sequence[Row]) -> list[str]:
    """Return `untimed` as text, a line each."""
    every = tuple(_all_m(rows))
    lines = []
    for each in untimed(rows):
        where = "" if each.rows_m == every else f" at m={', '.join(map(str, each.rows_m))}"
        lines.append(f"{each.outcome}{where}: {', '.join(each.candidates)}: {each.reason}")
    return lines


def total_lines(latencies: Latencies) -> list[str]:
    """Return the totals: outcomes of the timings, time spent, and the device."""
    rows = latencies.rows
    counts = Counter(row["outcome"] for row in rows)
    outcomes = ", ".join(f"{counts[outcome]} {words}" for outcome, words in _COUNTED)
    cells = len({(row["n"], row["k"], row["bias"], row["dtype"], row["m"]) for row in rows})
    candidates = len({_candidate(row) for row in rows})
    new = len(rows) - latencies.from_store
    roofline = latencies.roofline
    bandwidth = units.digits(roofline.bandwidth_bytes_per_s / 1e9)
    rates = ", ".join(
        f"{name} {units.digits(rate / 1e12)}" for name, rate in roofline.flops_per_s.items()
    )
    return [
        f"{len(rows)} timings ({candidates} candidates at {cells} shapes and m): {outcomes}.",
        f"{latencies.from_store} were in the store, {new} are new and took "
        f"{units.clock_s(latencies.elapsed_s)} to prepare and time.",
        f"{device_words(latencies.device)}: memory {bandwidth} GB/s; Tflop/s in {rates}.",
    ]


def _heading(shape: LinearShape, names: Sequence[str], width: int) -> str:
    called = ", ".join(pattern for pattern, _ in fold(names))
    text = f"{shape_words(shape)}{f': {called}' if called else ''}"
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _all_m(rows: Sequence[Row]) -> list[int]:
    return sorted({row["m"] for row in rows})


def _ok(rows: Sequence[Row], m: int) -> list[Row]:
    return [row for row in rows if row["m"] == m and row["outcome"] == "ok"]


def _candidate(row: Row) -> str:
    return f"{row['format']}/{row['kernel']}"


def _candidate_lines(rows: Sequence[Row]) -> list[dict[int, Row]]:
    """Return the rows by m for each candidate, sorted by their latencies at each m in turn."""
    by_candidate: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_candidate.setdefault(_candidate(row), {})[row["m"]] = row
    lines = [
        line
        for line in by_candidate.values()
        if any(row["outcome"] != "unsupported" for row in line.values())
    ]
    rows_m = _all_m(rows)

    def order(line: dict[int, Row]) -> list[float]:
        return [
            line[m]["latency_us"] if m in line and line[m]["outcome"] == "ok" else math.inf
            for m in rows_m
        ]

    return sorted(lines, key=order)


def _cell(row: Row | None, best_us: float) -> Text:
    if row is None:
        return Text(units.MISSING, style="dim")
    if row["outcome"] != "ok":
        return Text(_SHORT[row["outcome"]], style="dim")
    is_best = row["latency_us"] <= best_us
    return Text(
        f"{'*' if is_best else ''}{units.digits(row['latency_us'])}",
        style="green" if is_best else "",
    )


def _route_words(route: Mapping[int, Row], all_m: Sequence[int]) -> str:
    """Return a route in words: `int8pack-mm up to m=4, int-mm above`."""
    steps = [
        (kernel, [m for m, _ in group])
        for kernel, group in groupby(route.items(), lambda item: item[1]["kernel"])
    ]
    words = steps[0][0] if len(steps) == 1 else ", ".join(_step_words(steps))
    missing = [str(m) for m in all_m if m not in route]
    return f"{words} (not at m={', '.join(missing)})" if missing else str(words)


def _step_words(steps: Sequence[tuple[str, list[int]]]) -> Iterator[str]:
    for kernel, rows_m in steps[:-1]:
        yield f"{kernel} up to m={rows_m[-1]}"
    yield f"{steps[-1][0]} above"


def _speedup_words(speedups: Mapping[int, float]) -> str:
    """Return speedups in words: `3.1x at m=1, 1.0x at m=16..512`."""
    parts = []
    for words, group in groupby(speedups, lambda m: f"{speedups[m]:.1f}x"):
        rows_m = list(group)
        last = f"..{rows_m[-1]}" if len(rows_m) > 1 else ""
        parts.append(f"{words} at m={rows_m[0]}{last}")
    return ", ".join(parts)


def _folded(candidate: str, room: int) -> str:
    """Return a candidate, with its kernel on a second line if it does not fit."""
    fmt, _, kernel = candidate.rpartition("/")
    return candidate if len(candidate) <= room else f"{fmt}/\n  {kernel}"


def _wrapped(lines: Sequence[str], width: int) -> list[RenderableType]:
    return [
        Text(textwrap.fill(line, width, subsequent_indent="      ", break_on_hyphens=False))
        for line in lines
    ]
