"""The front and the predictions of the page as plotly's traces and layouts, in plain dicts.

Plotly reads markup in texts, so everything that comes from a model or a user is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from autoquant.report import units
from autoquant.report.front.geometry import (
    FAMILIES,
    RECOMMENDED,
    TIME_TITLE,
    UNQUANTIZED,
    Family,
    Front,
)
from autoquant.report.html.charts import INK, MUTED, Chart
from autoquant.report.html.points import PlanPoint

_SMALLEST_PX, _LARGEST_PX = 10.0, 24.0
_STAR_GROWTH = 1.3  # a star of the same extent has less ink
_NEAR = 4  # the chart first shows so many times the linear part of the quality axis


def front_chart(points: Sequence[PlanPoint], quality: str) -> Chart:
    """Return request time against quality, with a trace for each family.

    The chart first shows the part where choices are made. `beyond` counts the plans above it.
    `everything` is an axis of quality that shows these too, or None.

    Args:
        quality: What the axis of quality shows.
    """
    shown = [point for point in points if point.drawable]
    front = Front(tuple(point.at for point in shown), quality)
    beyond = _beyond(shown, front)
    near = [point for point in shown if point not in beyond]
    times = _axis([point.request_ms for point in shown], log=front.log_times)
    layout = {
        "xaxis": {"title": {"text": TIME_TITLE}, **times},
        "yaxis": {"title": {"text": quality}, **_axis(_heights(near), log=False)},
        "hovermode": "closest",
        "showlegend": False,
    }
    heights = _heights(shown)
    everything = _axis(heights, log=min(heights) > 0) if beyond else None
    traces = [_front_line(shown, front)] if shown else []
    traces += [_family_trace(each, members) for each, members in _by_family(shown)]
    return {"data": traces, "layout": layout, "beyond": len(beyond), "everything": everything}


def prediction_chart(points: Sequence[PlanPoint]) -> Chart:
    """Return predicted against measured request time, with the line on which they agree."""
    times = [
        time for point in points for time in (point.request_ms, point.row["predicted_request_ms"])
    ]
    axis = _axis([time for time in times if math.isfinite(time)], log=False)
    diagonal: Chart = {
        "type": "scatter",
        "mode": "lines",
        "x": axis.get("range", []),
        "y": axis.get("range", []),
        "line": {"color": MUTED, "dash": "dash", "width": 1.2},
        "hoverinfo": "skip",
    }
    layout = {
        "xaxis": {"title": {"text": "Measured request [ms]"}, **axis},
        "yaxis": {"title": {"text": "Predicted request [ms]"}, **axis},
        "hovermode": "closest",
        "showlegend": False,
    }
    traces = [_prediction_trace(each, members) for each, members in _by_family(points)]
    return {"data": [diagonal, *traces], "layout": layout}


def colour(family: Family) -> str:
    """Return the colour of a family, as `style.css` names it."""
    if family is RECOMMENDED:
        return "var(--c5)"
    if family is UNQUANTIZED:
        return "var(--c9)"
    if not family.filled:
        return MUTED
    return "var(--c1)" if family.marker == "o" else "var(--c3)"


def _by_family(points: Sequence[PlanPoint]) -> list[tuple[Family, list[PlanPoint]]]:
    """Return the points by family. The most important comes last, so it is drawn on top."""
    groups = (
        (each, [point for point in points if point.at.family is each])
        for each in reversed(FAMILIES)
    )
    return [(each, members) for each, members in groups if members]


def _heights(points: Sequence[PlanPoint]) -> list[float]:
    """Return what an axis of quality must show: the points with their intervals."""
    ends = [end for point in points for end in (point.quality, point.low, point.high)]
    return [end for end in ends if math.isfinite(end)]


def _axis(values: Sequence[float], *, log: bool) -> Chart:
    """Return an axis with all the values and some room around them.

    Plotly wants the ends of a logarithmic axis as logarithms.
    """
    if not values:
        return {"type": "linear"}
    low, high = (math.log10(end) if log else end for end in (min(values), max(values)))
    room = (high - low) * 0.07 or abs(high) * 0.01 or 1.0
    return {"type": "log" if log else "linear", "range": [low - room, high + room]}


def _front_line(points: Sequence[PlanPoint], front: Front) -> Chart:
    by_id = {point.plan.plan_id: point for point in points}
    steps = [by_id[at.row["plan_id"]] for at in front.line]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [point.request_ms for point in steps],
        "y": [point.quality for point in steps],
        "line": {"shape": "hv", "color": MUTED, "width": 1.4},
        "hoverinfo": "skip",
    }


def _family_trace(family: Family, members: Sequence[PlanPoint]) -> Chart:
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
            "color": colour(family),
            "opacity": 1,
            "size": [_size_px(point) for point in members],
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
    # An open symbol is nothing but its outline.
    return {"color": INK, "width": 1} if family.filled else {"color": colour(family), "width": 2}


def _size_px(point: PlanPoint) -> float:
    """Return a diameter whose area grows with the memory of the plan."""
    smallest, largest = _SMALLEST_PX**2, _LARGEST_PX**2
    size = math.sqrt(smallest + point.at.memory_share * (largest - smallest))
    return size * (_STAR_GROWTH if point.at.family is RECOMMENDED else 1.0)


def _point_hover(point: PlanPoint) -> str:
    row = point.row
    ends = units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])
    makeup = (f"{count} x {html.escape(name)}" for name, count in point.formats.items())
    return "<br>".join(
        [
            f"{_name(point)} (plan {html.escape(point.short_id)})",
            f"{units.duration_ms(point.request_ms)} a request, {row['speedup']:.2f}x",
            f"{point.increase_text} ({ends})",
            f"memory {units.size(point.memory_bytes)}",
            "",
            *makeup,
        ]
    )


def _name(point: PlanPoint) -> str:
    return f"<b>{point.number}. {html.escape(str(point.row['label']))}</b>"


def _beyond(points: Sequence[PlanPoint], front: Front) -> list[PlanPoint]:
    """Return the plans that are too bad to be shown at first."""
    base = next((point.base for point in points if math.isfinite(point.base)), None)
    if front.linear_to is None or base is None:
        return []
    limit = base * (1 + _NEAR * front.linear_to / 100)
    return [point for point in points if point.quality > limit]


def _prediction_trace(family: Family, members: Sequence[PlanPoint]) -> Chart:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "x": [point.request_ms for point in members],
        "y": [point.row["predicted_request_ms"] for point in members],
        "marker": {
            "symbol": family.symbol,
            "color": colour(family),
            "size": 11,
            "line": _outline(family),
        },
        "text": [str(point.number) for point in members],
        "textposition": "top right",
        "textfont": {"size": 11, "color": INK},
        "hovertext": [_prediction_hover(point) for point in members],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "customdata": [point.index for point in members],
    }


def _prediction_hover(point: PlanPoint) -> str:
    predicted = units.duration_ms(point.row["predicted_request_ms"])
    measured = units.duration_ms(point.request_ms)
    return f"{_name(point)}<br>predicted {predicted}<br>measured {measured}"
