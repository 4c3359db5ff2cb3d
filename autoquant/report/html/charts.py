"""The charts as plotly's traces and layouts, in plain dicts. Colours are names of `style.css`: the page fills in its look.

Texts of plotly may hold markup, so everything that comes from a model or a user is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.profiler.latencies import Row
from autoquant.records import LinearShape, Roofline
from autoquant.report import units
from autoquant.report.front.scales import increase_threshold, wide_times
from autoquant.report.html.points import FAMILIES, Family, Point
from autoquant.report.latency_plot import (
    FLOORS,
    SYMBOLS,
    UNQUANTIZED,
    Line,
    floor_line,
    latency_range_us,
    measured_m,
    spaced_ticks,
)

Chart = dict[str, Any]
"""`data` and `layout` as plotly wants them."""

INK, MUTED = "var(--ink)", "var(--muted)"
_PATTERNS = ("", "/", ".", "x")
_SMALLEST_PX, _LARGEST_PX = 10.0, 24.0


def front_chart(points: Sequence[Point], quality: str) -> Chart:
    """Request time against quality, a trace for each family.

    It begins with the part where choices are made: `beyond` counts the plans above it, and `everything` is an axis of quality
    that shows these too (None where there are none).
    """
    shown = [point for point in points if point.drawable]
    traces = [_front_line(shown)] if shown else []
    for name, family in FAMILIES.items():
        members = [point for point in shown if point.family == name]
        if members:
            traces.append(_family_trace(family, members, points))
    beyond = _beyond(shown)
    near = [point for point in shown if point not in beyond]
    layout = {
        "xaxis": {
            "title": {"text": "Time of one request [ms]"},
            **_axis([p.request_ms for p in shown], log=_wide(shown)),
        },
        "yaxis": {"title": {"text": quality}, **_axis(_heights(near), log=False)},
        "hovermode": "closest",
        "showlegend": False,
    }
    heights = _heights(shown)
    everything = _axis(heights, log=min(heights) > 0) if beyond else None
    return {"data": traces, "layout": layout, "beyond": len(beyond), "everything": everything}


def _heights(points: Sequence[Point]) -> list[float]:
    """What an axis of quality must show: the points with their intervals."""
    ends = [end for point in points for end in (point.quality, point.low, point.high)]
    return [end for end in ends if math.isfinite(end)]


def _axis(values: Sequence[float], *, log: bool) -> Chart:
    """An axis that all the values are on, with some room around them; ends of a logarithmic one are logarithms."""
    if not values:
        return {"type": "linear"}
    low, high = (math.log10(end) if log else end for end in (min(values), max(values)))
    room = (high - low) * 0.07 or abs(high) * 0.01 or 1.0
    return {"type": "log" if log else "linear", "range": [low - room, high + room]}


def _wide(points: Sequence[Point]) -> bool:
    return wide_times([point.row for point in points])


def _front_line(points: Sequence[Point]) -> Chart:
    steps: list[Point] = []
    for point in sorted(points, key=lambda point: (point.request_ms, point.quality)):
        if not steps or point.quality < steps[-1].quality:
            steps.append(point)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [point.request_ms for point in steps],
        "y": [point.quality for point in steps],
        "line": {"shape": "hv", "color": MUTED, "width": 1.4},
        "hoverinfo": "skip",
    }


def _family_trace(family: Family, members: Sequence[Point], points: Sequence[Point]) -> Chart:
    grow = 1.3 if family.name == "recommended" else 1.0  # a star of the same extent has less ink
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": family.name,
        "x": [point.request_ms for point in members],
        "y": [point.quality for point in members],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, point.high - point.quality) for point in members],
            "arrayminus": [max(0.0, point.quality - point.low) for point in members],
            "color": MUTED,
            "thickness": 1,
            "width": 3,
        },
        "marker": {
            "symbol": family.symbol,
            "color": family.colour,
            "opacity": 1,
            "size": [_size_px(point, points) * grow for point in members],
            "line": _outline(family),
        },
        "text": [f"<b>{point.number}</b>" for point in members],
        "textposition": "top right",
        "textfont": {"size": 12, "color": INK},
        "hovertext": [_point_hover(point) for point in members],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "customdata": [point.index for point in members],
    }


def _outline(family: Family) -> Chart:
    """Open symbols are nothing but their outline."""
    return (
        {"color": family.colour, "width": 2}
        if family.symbol.endswith("open")
        else {"color": INK, "width": 1}
    )


def _size_px(point: Point, points: Sequence[Point]) -> float:
    """A diameter: areas lie between that of the smallest and that of the largest plan as memory does."""
    stored = [other.memory_bytes for other in points]
    span = max(stored) - min(stored)
    share = (point.memory_bytes - min(stored)) / span if span else 0.5
    return math.sqrt(_SMALLEST_PX**2 + share * (_LARGEST_PX**2 - _SMALLEST_PX**2))


def _point_hover(point: Point) -> str:
    row = point.row
    makeup = "<br>".join(f"{count} x {html.escape(name)}" for name, count in point.formats.items())
    return "<br>".join(
        [
            f"<b>{point.number}. {html.escape(str(row['label']))}</b> (plan {html.escape(point.short_id)})",
            f"{units.duration_ms(point.request_ms)} a request, {row['speedup']:.2f}x",
            f"{point.increase_text} "
            f"({units.interval(row['perplexity_increase_low'], row['perplexity_increase_high'])})",
            f"memory {units.size(point.memory_bytes)}",
            f"<br>{makeup}",
        ]
    )


def _limit(points: Sequence[Point]) -> float | None:
    """Quality above which a plan is not shown at first; None where all are."""
    threshold = increase_threshold([point.row for point in points])
    base = next((point.base for point in points if math.isfinite(point.base)), None)
    return None if threshold is None or base is None else base * (1 + 4 * threshold / 100)


def _beyond(points: Sequence[Point]) -> list[Point]:
    limit = _limit(points)
    return [] if limit is None else [point for point in points if point.quality > limit]


def share_chart(
    title: str,
    types: Sequence[str],
    parts: Mapping[str, Sequence[float | None]],
    before: Sequence[float | None],
) -> Chart:
    """Bars by type of layer, stacked by part (phase), told apart by patterns; `before` are strokes of the unquantized model."""
    labels = [html.escape(each) for each in types]
    traces: list[Chart] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": list(values),
            "marker": {
                "color": f"var(--c{index + 1})",
                "line": {"color": INK, "width": 0.6},
                "pattern": {
                    "shape": _PATTERNS[index % len(_PATTERNS)],
                    "fillmode": "overlay",
                    "fgcolor": "var(--panel)",
                    "size": 7,
                },
            },
            "hovertemplate": f"%{{y}}, {html.escape(name)}: %{{x:.4~g}}<extra></extra>",
        }
        for index, (name, values) in enumerate(parts.items())
    ]
    if any(before):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "unquantized",
                "y": labels,
                "x": list(before),
                "marker": {
                    "symbol": "line-ns-open",
                    "size": 15,
                    "color": INK,
                    "line": {"width": 2.5, "color": INK},
                },
                "hovertemplate": "%{y}, unquantized: %{x:.4~g}<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": title}, "rangemode": "tozero", "exponentformat": "power"},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
        "showlegend": len(traces) > 1,
        "legend": {"traceorder": "normal"},
    }
    return {"data": traces, "layout": layout, "bars": len(labels)}


def prediction_chart(points: Sequence[Point]) -> Chart:
    """Predicted against measured request time of every plan, with the line on which they agree."""
    times = [
        time for point in points for time in (point.request_ms, point.row["predicted_request_ms"])
    ]
    axis = _axis([time for time in times if math.isfinite(time)], log=False)
    ends = axis["range"]
    traces: list[Chart] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": ends,
            "y": ends,
            "line": {"color": MUTED, "dash": "dash", "width": 1.2},
            "hoverinfo": "skip",
        }
    ]
    for name, family in FAMILIES.items():
        members = [point for point in points if point.family == name]
        if members:
            traces.append(_prediction_trace(family, members))
    layout = {
        "xaxis": {"title": {"text": "Measured request [ms]"}, **axis},
        "yaxis": {"title": {"text": "Predicted request [ms]"}, **axis},
        "hovermode": "closest",
        "showlegend": False,
    }
    return {"data": traces, "layout": layout}


def _prediction_trace(family: Family, members: Sequence[Point]) -> Chart:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [point.request_ms for point in members],
        "y": [point.row["predicted_request_ms"] for point in members],
        "marker": {
            "symbol": family.symbol,
            "color": family.colour,
            "size": 11,
            "line": _outline(family),
        },
        "text": [str(point.number) for point in members],
        "textposition": "top right",
        "textfont": {"size": 11, "color": INK},
        "hovertext": [
            f"<b>{point.number}. {html.escape(str(point.row['label']))}</b><br>"
            f"predicted {units.duration_ms(point.row['predicted_request_ms'])}<br>measured {units.duration_ms(point.request_ms)}"
            for point in members
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "customdata": [point.index for point in members],
    }


def latency_chart(
    shape: LinearShape, lines: Mapping[str, Line], drawn: Sequence[str], roofline: Roofline | None
) -> Chart:
    """Latency of one linear against its rows, the fastest kernel of each format, and what the device allows at best."""
    all_m = measured_m(lines)
    traces: list[Chart] = []
    for floor in FLOORS if roofline is not None and all_m else ():
        assert roofline is not None  # as just asked
        points = floor_line(roofline, shape, floor, all_m)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": floor.label,
                "x": [m for m, _ in points],
                "y": [time_us for _, time_us in points],
                "line": {"color": MUTED, "width": 1.3, "dash": floor.page_dash},
                "hoverinfo": "skip",
            }
        )
    styles = {UNQUANTIZED: (INK, "square", 3.2)}
    styles |= {
        name: (f"var(--c{index + 1})", SYMBOLS[index], 1.8) for index, name in enumerate(drawn)
    }
    traces += [
        _latency_trace(name, lines[name], *style) for name, style in styles.items() if name in lines
    ]
    ticks = spaced_ticks(all_m) if all_m else []
    layout = {
        "xaxis": {
            "title": {"text": "m, rows of the activation"},
            "type": "log",
            "tickvals": ticks,
            "tickangle": 0,
        },
        "yaxis": {
            "title": {"text": "Latency of one linear [µs]"},
            **(_latency_axis(roofline, shape, lines) if lines else {}),
        },
        "showlegend": True,
    }
    return {"data": traces, "layout": layout}


def _latency_axis(
    roofline: Roofline | None, shape: LinearShape, lines: Mapping[str, Line]
) -> Chart:
    low, high = latency_range_us(roofline, shape, lines)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit * 10.0**power:.1g}") for power in powers for digit in (1, 2, 5)]
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": [tick for tick in ticks if low <= tick <= high],
        "ticktext": [f"{tick:g}" for tick in ticks if low <= tick <= high],
    }


def _latency_trace(name: str, line: Line, colour: str, symbol: str, width: float) -> Chart:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(name),
        "x": list(line),
        "y": [row["latency_us"] for row in line.values()],
        "line": {"color": colour, "width": width},
        "marker": {"symbol": symbol, "size": 8, "color": colour},
        "hovertext": [_latency_hover(row) for row in line.values()],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _latency_hover(row: Row) -> str:
    candidate = html.escape(f"{row['format']}/{row['kernel']}")
    return f"<b>{candidate}</b><br>m = {row['m']}: {units.duration_us(row['latency_us'])}"
