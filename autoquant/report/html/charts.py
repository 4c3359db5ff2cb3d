"""The bars and the latencies of the page as plotly's traces and layouts, in plain dicts.

Colours are names of `style.css`, which the page looks up. Plotly reads markup in texts, so
everything that comes from a model or a user is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.profiler.latencies import Row
from autoquant.records import LinearShape, Roofline
from autoquant.report import units
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
"""`data` and `layout`, as plotly expects them."""

INK, MUTED = "var(--ink)", "var(--muted)"
_PATTERNS = ("", "/", ".", "x")


def share_chart(
    title: str,
    types: Sequence[str],
    parts: Mapping[str, Sequence[float | None]],
    before: Sequence[float | None],
) -> Chart:
    """Return bars by type of layer, stacked by part.

    Args:
        parts: The values of each part (phase), which has its own colour and pattern.
        before: The values of the unquantized model, drawn as strokes.
    """
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


def latency_chart(
    shape: LinearShape, lines: Mapping[str, Line], drawn: Sequence[str], roofline: Roofline | None
) -> Chart:
    """Return the latency of each format's fastest kernel by rows, with the device's limits."""
    all_m = measured_m(lines)
    traces: list[Chart] = []
    for floor in FLOORS if roofline is not None and all_m else ():
        assert roofline is not None  # checked by the loop
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
