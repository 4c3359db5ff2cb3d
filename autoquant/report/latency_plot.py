"""Latency against m as a picture (matplotlib) and as a page (plotly).

Each shape has a panel, and each format a line with its fastest kernels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.profiler.floor import floor_us
from autoquant.profiler.latencies import Latencies, Row, is_original
from autoquant.records import LinearShape, Roofline
from autoquant.report import units
from autoquant.report.names import fold, size_words
from autoquant.report.tables.profile import best_route
from autoquant.report.visible import visible
from autoquant.report.words import device_words

SUFFIXES = (".png", ".svg", ".html")
PAGE_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud"]}
"""For plotly, whose pages otherwise offer to send the chart to a server."""

_MOST_LINES = 9
_INK, _GREY, _GRID = "#000000", "#6b7885", "#e4e8ec"
# The palette of Okabe and Ito suits colour-blind readers. The markers differ too.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7a4b9a",
    "#8c6d31",
    "#4d4d4d",
)
_MARKERS = ("o", "^", "D", "v", "P", "X", "<", ">", "p")
SYMBOLS = (
    "circle",
    "triangle-up",
    "diamond",
    "triangle-down",
    "cross",
    "x",
    "triangle-left",
    "triangle-right",
    "pentagon",
)
UNQUANTIZED = "unquantized"
_PANEL_INCHES, _DPI = (4.1, 3.6), 120
_LEGEND_INCHES = 2.5
_TITLE_LENGTH = 44
_FLOOR_POINTS = 60
_TALLEST = 3.0
"""A panel ends at so many times its slowest unquantized latency. Slower lines leave the picture."""

Line = Mapping[int, Row]
"""The fastest row of a format by m."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least possible latency for weights of one width.

    Attributes:
        dash: Line style for matplotlib.
        page_dash: Line style for plotly.
        arithmetic: Names in `Roofline.flops_per_s`. The fastest of them counts.
    """

    label: str
    bytes_per_weight: float
    dash: tuple[float, ...]
    page_dash: str
    arithmetic: tuple[str, ...]


FLOORS = (
    Floor("limit, 16-bit weights", 2.0, (7, 3), "longdash", ("bfloat16", "float16")),
    Floor("limit, 8-bit weights", 1.0, (4, 2), "dash", ("int8", "float8")),
    Floor("limit, 4-bit weights", 0.5, (1.5, 1.5), "dot", ("int8", "float8")),
)


def render_latencies(latencies: Latencies, suffix: str) -> bytes:
    """Return the picture as the bytes of a `.png`, `.svg` or `.html` file.

    Raises:
        ValueError: `suffix` is none of `SUFFIXES`.
    """
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot draw {suffix!r}: one of {', '.join(SUFFIXES)}")
    panels = {shape: format_lines(rows) for shape, rows in latencies.shapes().items()}
    drawn, left_out = drawn_formats(panels)
    note = f"not drawn, slower: {', '.join(left_out)}" if left_out else ""
    if suffix == ".html":
        return _page(latencies, panels, drawn, note).encode()
    return _picture(latencies, panels, drawn, note, suffix.removeprefix("."))


def format_lines(rows: Sequence[Row]) -> dict[str, Line]:
    """Return the fastest kernel by m for each format, and for `unquantized`."""
    names = {row["format"]: UNQUANTIZED if is_original(row) else row["format"] for row in rows}
    lines = {
        name: best_route([row for row in rows if row["format"] == fmt])
        for fmt, name in names.items()
    }
    return {name: line for name, line in lines.items() if line}


def drawn_formats(panels: Mapping[LinearShape, Mapping[str, Line]]) -> tuple[list[str], list[str]]:
    """Return the formats that get a line, and those too slow to get one, in registry order."""
    gains: dict[str, float] = {}
    for lines in panels.values():
        best = {
            m: min(line[m]["latency_us"] for line in lines.values() if m in line)
            for m in measured_m(lines)
        }
        for name, line in lines.items():
            gain = max(best[m] / row["latency_us"] for m, row in line.items())
            gains[name] = max(gains.get(name, 0.0), gain)
    gains.pop(UNQUANTIZED, None)
    chosen = sorted(gains, key=lambda name: -gains[name])[:_MOST_LINES]
    left_out = [name for name in gains if name not in chosen]
    return [name for name in gains if name in chosen], left_out


def floor_line(
    roofline: Roofline, shape: LinearShape, floor: Floor, all_m: Sequence[int]
) -> list[tuple[float, float]]:
    """Return points (m, microseconds) of a limit, a little beyond the measured m on both sides."""
    first, last = min(all_m) / 1.25, max(all_m) * 1.25
    known = roofline.flops_per_s
    arithmetic = max(floor.arithmetic, key=lambda name: known.get(name, 0.0))
    weight_bytes = floor.bytes_per_weight * shape.n * shape.k
    points = []
    for step in range(_FLOOR_POINTS + 1):
        m = first * (last / first) ** (step / _FLOOR_POINTS)
        points.append((m, floor_us(roofline, shape, m, weight_bytes, arithmetic)))
    return points


def latency_range_us(
    roofline: Roofline | None, shape: LinearShape, lines: Mapping[str, Line]
) -> tuple[float, float]:
    """Return the ends of the latency axis: all limits, and latencies that may still be chosen."""
    all_m = measured_m(lines)
    limits: list[float] = []
    if roofline is not None:
        limits = [
            time_us for floor in FLOORS for _, time_us in floor_line(roofline, shape, floor, all_m)
        ]
    slowest = {
        name: max(row["latency_us"] for row in line.values()) for name, line in lines.items()
    }
    fastest = min(row["latency_us"] for line in lines.values() for row in line.values())
    highest = max([*slowest.values(), *limits])
    if UNQUANTIZED in slowest:
        highest = min(highest, _TALLEST * max([slowest[UNQUANTIZED], *limits]))
    return min([fastest, *limits]) / 1.3, highest * 1.3


def measured_m(lines: Mapping[str, Line]) -> list[int]:
    """Return every m that has a point."""
    return sorted({m for line in lines.values() for m in line})


def _picture(
    latencies: Latencies,
    panels: Mapping[LinearShape, Mapping[str, Line]],
    drawn: Sequence[str],
    note: str,
    kind: str,
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = _grid(len(panels))
    size = (_PANEL_INCHES[0] * columns + _LEGEND_INCHES, _PANEL_INCHES[1] * rows + 0.5)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (shape, lines) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, latencies, shape, lines, drawn)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(_title(latencies), x=0.01, ha="left", fontsize=11, parse_math=False)
    figure.supxlabel(f"m, rows of the activation{f'   ({note})' if note else ''}", fontsize=9)
    figure.supylabel("Latency of one linear [µs]", fontsize=9)
    figure.legend(handles=_legend(drawn), loc="outside right upper", frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _grid(panels: int) -> tuple[int, int]:
    """Return the number of columns and rows."""
    columns = min(3, panels) if panels != 4 else 2
    return max(columns, 1), max(1, -(-panels // max(columns, 1)))


def _draw_panel(
    axes: Any,
    latencies: Latencies,
    shape: LinearShape,
    lines: Mapping[str, Line],
    drawn: Sequence[str],
) -> None:
    axes.set_title(_panel_title(latencies, shape), loc="left", fontsize=9, parse_math=False)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    all_m = measured_m(lines)
    if not all_m:
        axes.text(
            0.5, 0.5, "nothing could be timed", transform=axes.transAxes, ha="center", color=_GREY
        )
        return
    for floor in FLOORS:
        points = floor_line(latencies.roofline, shape, floor, all_m)
        axes.plot(
            *zip(*points, strict=True), color=_GREY, linewidth=1.1, dashes=floor.dash, zorder=2
        )
    for name, style in _styles(drawn).items():
        if name in lines:
            line = lines[name]
            axes.plot(list(line), [row["latency_us"] for row in line.values()], **style)
    axes.set_ylim(*latency_range_us(latencies.roofline, shape, lines))
    _set_ticks(axes, all_m)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _set_ticks(axes: Any, all_m: Sequence[int]) -> None:
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        NullFormatter,
        NullLocator,
    )

    axes.xaxis.set_major_locator(FixedLocator(spaced_ticks(all_m)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)


def spaced_ticks(all_m: Sequence[int]) -> list[int]:
    """Return the measured m that leave room for their numbers on a logarithmic axis."""
    span = math.log2(max(all_m) / min(all_m)) or 1.0
    ticks: list[int] = []
    for m in all_m:
        if not ticks or math.log2(m / ticks[-1]) > span / 9:
            ticks.append(m)
    return ticks


def _styles(drawn: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return how matplotlib draws each line."""
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": COLOURS[index],
            "marker": _MARKERS[index],
            "markersize": 5,
            "linewidth": 1.3,
            "zorder": 4,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        for index, name in enumerate(drawn)
    }
    return {
        UNQUANTIZED: {"color": _INK, "marker": "s", "markersize": 6, "linewidth": 2.8, "zorder": 3},
        **styles,
    }


def _legend(drawn: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=name, **style) for name, style in _styles(drawn).items()]
    floors = [
        Line2D([], [], color=_GREY, linewidth=1.1, dashes=floor.dash, label=floor.label)
        for floor in FLOORS
    ]
    return [*lines, *floors]


def _title(latencies: Latencies) -> str:
    where = f"{latencies.source} on {device_words(latencies.device)}"
    return visible(f"{where}: fastest kernel of each format")


def _panel_title(latencies: Latencies, shape: LinearShape) -> str:
    called = ", ".join(
        pattern.rpartition(".")[2] for pattern, _ in fold(latencies.names.get(shape, ()))
    )
    text = visible(f"{size_words(shape)}{f'  {called}' if called else ''}")
    return text if len(text) <= _TITLE_LENGTH else f"{text[: _TITLE_LENGTH - 1]}…"


def _page(
    latencies: Latencies,
    panels: Mapping[LinearShape, Mapping[str, Line]],
    drawn: Sequence[str],
    note: str,
) -> str:
    from plotly.subplots import make_subplots

    columns, rows = _grid(len(panels))
    titles = [_panel_title(latencies, shape) for shape in panels]
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, vertical_spacing=min(0.12, 0.4 / rows)
    )
    shown: set[str] = set()
    for index, (shape, lines) in enumerate(panels.items()):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for trace in _traces(latencies, shape, lines, drawn):
            figure.add_scatter(
                showlegend=trace["name"] not in shown, legendgroup=trace["name"], **trace, **place
            )
            shown.add(trace["name"])
        if lines:
            ends = [math.log10(end) for end in latency_range_us(latencies.roofline, shape, lines)]
            figure.update_yaxes(range=ends, **place)
    figure.update_xaxes(type="log", title_text="m", dtick="D2")
    figure.update_yaxes(type="log", title_text="µs", dtick="D2")
    title = _title(latencies)
    figure.update_layout(
        title={"text": f"{title}<br><sup>{note}</sup>" if note else title},
        template="plotly_white",
        height=380 * rows + 120,
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config=PAGE_CONFIG))


def _traces(
    latencies: Latencies, shape: LinearShape, lines: Mapping[str, Line], drawn: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what plotly draws in one panel."""
    all_m = measured_m(lines)
    traces: list[dict[str, Any]] = []
    for floor in FLOORS if all_m else ():
        points = floor_line(latencies.roofline, shape, floor, all_m)
        traces.append(
            {
                "name": floor.label,
                "x": [m for m, _ in points],
                "y": [time_us for _, time_us in points],
                "mode": "lines",
                "line": {"color": _GREY, "width": 1.3, "dash": floor.page_dash},
                "hoverinfo": "skip",
            }
        )
    symbols = dict(zip(drawn, SYMBOLS, strict=False))
    for name, style in _styles(drawn).items():
        if name in lines:
            line = lines[name]
            traces.append(
                {
                    "name": name,
                    "x": list(line),
                    "y": [row["latency_us"] for row in line.values()],
                    "mode": "lines+markers",
                    "line": {"color": style["color"], "width": style["linewidth"] * 1.4},
                    "marker": {"symbol": symbols.get(name, "square"), "size": 8},
                    "text": [_hover(row) for row in line.values()],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    return traces


def _hover(row: Row) -> str:
    floor = "" if row["floor_us"] is None else f"<br>limit {units.duration_us(row['floor_us'])}"
    latency = units.duration_us(row["latency_us"])
    return f"<b>{row['format']}/{row['kernel']}</b><br>m={row['m']}: {latency}{floor}"
