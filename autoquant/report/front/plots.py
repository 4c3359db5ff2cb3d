"""The front as a picture (matplotlib) and as a page (plotly). Both are drawn from the rows of `Study.rows`."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.records import ORIGINAL_LABEL
from autoquant.report import units
from autoquant.report.front.labels import Box, nearest_point, place_labels
from autoquant.report.front.scales import (
    Row,
    drawable,
    increase_threshold,
    left_out_note,
    staircase,
    wide_times,
)
from autoquant.report.words import increase_heading, increase_words

SUFFIXES = (".png", ".svg", ".html")
PAGE_CONFIG = {"displaylogo": False, "modeBarButtonsToRemove": ["sendChartToCloud"]}
"""For plotly: its pages offer to send the chart to a server otherwise."""

# Told apart by shape and brightness, so that the picture reads in greyscale.
_FRONT, _OTHER, _RECOMMENDED, _INK = "#1f4e79", "#b8c4d0", "#f0a020", "#222222"
_GREY, _THIN = "#6b7885", "#8a949e"
_BASELINES = {
    "uniform": ("D", "uniform"),
    "heuristic": ("^", "structural heuristic"),
    "bits": ("v", "bits alone"),
}
_SEARCHED_FRONT, _SEARCHED = "searched, on the front", "searched"
_SYMBOLS = {
    "*": "star",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "o": "circle",
}
_SIZE_INCHES, _DPI = (9.0, 5.6), 120
_LABEL_LENGTH = 28
_POINT_AREA = (30.0, 190.0)


def render(rows: Sequence[Row], suffix: str, title: str) -> bytes:
    """The front as the bytes of a `.png`, `.svg` or `.html` file.

    Raises:
        ValueError: `suffix` is none of `SUFFIXES`.
    """
    shown = [row for row in rows if drawable(row)]
    note = left_out_note(rows)
    if suffix == ".html":
        return _page(shown, title, note).encode()
    if suffix in (".png", ".svg"):
        return _picture(shown, suffix.removeprefix("."), title, note)
    raise ValueError(f"cannot draw {suffix!r}: one of {', '.join(SUFFIXES)}")


def _picture(rows: Sequence[Row], kind: str, title: str, note: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("Time of one request [ms]")
    axes.set_ylabel(f"{increase_heading(rows)} [%]")
    _set_scales(axes, rows)
    _draw_front_line(axes, rows)
    for row in rows:
        _draw_point(axes, row, rows)
    if note:
        axes.text(0.0, -0.14, note, transform=axes.transAxes, fontsize=8, color=_INK)
    _draw_legend(figure, rows)
    axes.grid(color="#e4e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.draw_without_rendering()  # settles the layout: labels are placed in pixels
    figure.set_layout_engine("none")
    _draw_labels(figure, axes, rows)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _set_scales(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.margins(0.12)
    if wide_times(rows):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    threshold = increase_threshold(rows)
    if threshold is not None:
        linear_to = 10 ** math.ceil(math.log10(threshold))
        axes.set_yscale("symlog", linthresh=linear_to, linscale=1.5)
        axes.yaxis.set_major_locator(FixedLocator(_symlog_ticks(linear_to, rows)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _position: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
    )


def _symlog_ticks(linear_to: float, rows: Sequence[Row]) -> list[float]:
    """Ticks of both signs: quarters of the linear part, then 1, 2, 5 (or 1) times powers of ten."""
    largest = max(
        abs(row[name]) * 100
        for row in rows
        for name in ("perplexity_increase_low", "perplexity_increase_high")
    )
    decades = math.ceil(math.log10(max(largest, linear_to) / linear_to)) + 1
    steps = (1, 2, 5) if decades <= 3 else (1,)
    above = [linear_to * 10**power * step for power in range(decades) for step in steps]
    ticks = [linear_to / 4, linear_to / 2, *above]
    return [0.0, *ticks, *(-tick for tick in ticks)]


def _draw_front_line(axes: Any, rows: Sequence[Row]) -> None:
    steps = staircase(rows)
    times = [row["measured_request_ms"] for row in steps]
    increases = [row["perplexity_increase"] * 100 for row in steps]
    axes.step(times, increases, where="post", color=_FRONT, linewidth=1.4, zorder=2, label="front")


def _area(row: Row, rows: Sequence[Row]) -> float:
    """Point area: memory between that of the smallest and that of the largest plan."""
    stored = [other["memory_bytes"] for other in rows]
    span = max(stored) - min(stored)
    share = (row["memory_bytes"] - min(stored)) / span if span else 0.5
    return _POINT_AREA[0] + share * (_POINT_AREA[1] - _POINT_AREA[0])


def _style(row: Row) -> dict[str, Any]:
    if row["recommended"]:
        return {"marker": "*", "facecolor": _RECOMMENDED, "edgecolor": _INK, "zorder": 6}
    fill = _FRONT if row["on_front"] else _OTHER
    if row["label"] == ORIGINAL_LABEL:
        return {"marker": "s", "facecolor": fill, "edgecolor": _INK, "zorder": 5}
    if row["kind"] in _BASELINES:
        fill = fill if row["on_front"] else _GREY
        return {
            "marker": _BASELINES[row["kind"]][0],
            "facecolor": "white",
            "edgecolor": fill,
            "zorder": 4,
        }
    return {
        "marker": "o",
        "facecolor": fill,
        "edgecolor": "white",
        "zorder": 5 if row["on_front"] else 3,
    }


def _draw_point(axes: Any, row: Row, rows: Sequence[Row]) -> None:
    x, y = row["measured_request_ms"], row["perplexity_increase"] * 100
    ends = (row["perplexity_increase_low"] * 100, row["perplexity_increase_high"] * 100)
    if all(math.isfinite(end) for end in ends):
        error = [[max(0.0, y - ends[0])], [max(0.0, ends[1] - y)]]
        axes.errorbar(
            x, y, yerr=error, fmt="none", ecolor=_THIN, elinewidth=0.9, capsize=2, zorder=2.5
        )
    style = _style(row)
    scale = 2.2 if row["recommended"] else 1.0  # a star of the same extent has less ink
    axes.scatter([x], [y], s=_area(row, rows) * scale, linewidths=1.1, **style)


def _draw_legend(figure: Any, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    def entry(marker: str, face: str, edge: str, label: str, area: float = 60.0) -> Line2D:
        size = math.sqrt(area)
        return Line2D(
            [],
            [],
            marker=marker,
            linestyle="",
            markerfacecolor=face,
            markeredgecolor=edge,
            markersize=size,
            label=label,
        )

    families = _families(rows)
    entries = [Line2D([], [], color=_FRONT, linewidth=1.4, label="front")]
    for name, area in (
        ("recommended", 160.0),
        (_SEARCHED_FRONT, 60.0),
        (_SEARCHED, 60.0),
        *((name, 45.0) for _, name in _BASELINES.values()),
        ("unquantized", 60.0),
    ):
        if name in families:
            style = _style(families[name][-1])
            entries.append(
                entry(style["marker"], style["facecolor"], style["edgecolor"], name, area)
            )
    stored = [row["memory_bytes"] for row in rows]
    for value, area in {
        min(stored, default=0): _POINT_AREA[0],
        max(stored, default=0): _POINT_AREA[1],
    }.items():
        entries.append(entry("o", _GREY, "white", units.size(value), area))
    figure.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)


def _draw_labels(figure: Any, axes: Any, rows: Sequence[Row]) -> None:
    labelled = [row for row in _by_importance(rows) if _needs_label(row)]
    pixels = {id(row): _pixel(axes, row) for row in rows}
    texts = [
        axes.annotate(_label(row), (0, 0), xycoords="figure pixels", **_text_style(row))
        for row in labelled
    ]
    renderer = figure.canvas.get_renderer()
    extents = [text.get_window_extent(renderer) for text in texts]
    boxes = place_labels(
        [pixels[id(row)] for row in labelled],
        [(extent.width, extent.height) for extent in extents],
        _obstacles(axes, rows, pixels),
        tuple(axes.get_window_extent(renderer).extents),
    )
    to_data = axes.transData.inverted()
    for row, text, box in zip(labelled, texts, boxes, strict=True):
        text.remove()
        anchor = pixels[id(row)]
        start = nearest_point(box, anchor)
        if math.dist(start, anchor) > _radius(row, rows) + 10:
            ends = to_data.transform([start, anchor])
            axes.plot(ends[:, 0], ends[:, 1], color=_THIN, linewidth=0.6, zorder=2.2)
        axes.text(
            *to_data.transform(box[:2]),
            _label(row),
            va="bottom",
            ha="left",
            zorder=7,
            **_text_style(row),
        )


def _text_style(row: Row) -> dict[str, Any]:
    return {"fontsize": 8.5, "color": _INK, "weight": "bold" if row["recommended"] else "normal"}


def _by_importance(rows: Sequence[Row]) -> list[Row]:
    return sorted(
        rows,
        key=lambda row: (
            not row["recommended"],
            row["label"] != ORIGINAL_LABEL,
            not row["on_front"],
        ),
    )


def _needs_label(row: Row) -> bool:
    return bool(row["recommended"] or row["label"] == ORIGINAL_LABEL or row["kind"] in _BASELINES)


def _label(row: Row) -> str:
    if row["label"] == ORIGINAL_LABEL:
        return "unquantized"
    text = str(row["label"]).removeprefix("uniform").lstrip(" :-") or str(row["label"])
    return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1]}…"


def _pixel(axes: Any, row: Row) -> tuple[float, float]:
    x, y = axes.transData.transform((row["measured_request_ms"], row["perplexity_increase"] * 100))
    return float(x), float(y)


def _obstacles(
    axes: Any, rows: Sequence[Row], pixels: Mapping[int, tuple[float, float]]
) -> list[Box]:
    boxes: list[Box] = []
    for row in rows:
        x, y = pixels[id(row)]
        radius = _radius(row, rows) + 3
        boxes.append((x - radius, y - radius, x + radius, y + radius))
        ends = (row["perplexity_increase_low"] * 100, row["perplexity_increase_high"] * 100)
        if all(math.isfinite(end) for end in ends):
            low, high = (
                axes.transData.transform((row["measured_request_ms"], end))[1] for end in ends
            )
            boxes.append((x - 2, float(low), x + 2, float(high)))
    return [*boxes, *_line_boxes(axes, rows)]


def _radius(row: Row, rows: Sequence[Row]) -> float:
    """Half the extent of a point in pixels; diamonds stand on their corners."""
    area = _area(row, rows) * (2.2 if row["recommended"] else 1.0)
    return math.sqrt(area * (2.0 if _style(row)["marker"] == "D" else 1.0)) / 2 * _DPI / 72


def _line_boxes(axes: Any, rows: Sequence[Row]) -> list[Box]:
    """Thin boxes along the front line, so that it is not written over."""
    points = [_pixel(axes, row) for row in staircase(rows)]
    boxes: list[Box] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        boxes += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    return boxes


def _page(rows: Sequence[Row], title: str, note: str) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    steps = staircase(rows)
    figure.add_scatter(
        x=[row["measured_request_ms"] for row in steps],
        y=[row["perplexity_increase"] * 100 for row in steps],
        mode="lines",
        line={"shape": "hv", "color": _FRONT, "width": 1.5},
        name="front",
        hoverinfo="skip",
    )
    for name, members in _families(rows).items():
        figure.add_scatter(name=name, **_trace(members, rows))
    figure.update_layout(
        title={"text": f"{title}<br><sup>{note}</sup>" if note else title},
        template="plotly_white",
        hovermode="closest",
        legend={"orientation": "h", "y": -0.15},
        xaxis={
            "title": {"text": "Time of one request [ms]"},
            "type": "log" if wide_times(rows) else "linear",
        },
        yaxis={"title": {"text": f"{increase_heading(rows)} [%]"}, "range": _page_range(rows)},
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True, config=PAGE_CONFIG))


def _families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(_family(row), []).append(row)
    return families


def _family(row: Row) -> str:
    if row["recommended"]:
        return "recommended"
    if row["label"] == ORIGINAL_LABEL:
        return "unquantized"
    if row["kind"] in _BASELINES:
        return _BASELINES[row["kind"]][1]
    return _SEARCHED_FRONT if row["on_front"] else _SEARCHED


def _trace(members: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    style = _style(members[0])
    symbol = _SYMBOLS[style["marker"]]
    increases = [row["perplexity_increase"] * 100 for row in members]
    above = [
        row["perplexity_increase_high"] * 100 - y for row, y in zip(members, increases, strict=True)
    ]
    below = [
        y - row["perplexity_increase_low"] * 100 for row, y in zip(members, increases, strict=True)
    ]
    return {
        "x": [row["measured_request_ms"] for row in members],
        "y": increases,
        "error_y": {
            "type": "data",
            "array": above,
            "arrayminus": below,
            "color": _THIN,
            "thickness": 1,
        },
        "mode": "markers",
        "marker": {
            "symbol": symbol,
            "color": style["facecolor"],
            "size": [
                math.sqrt(_area(row, rows)) * (1.7 if row["recommended"] else 1.25)
                for row in members
            ],
            "line": {"color": style["edgecolor"], "width": 1.3},
        },
        "text": [_hover(row) for row in members],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(row: Row) -> str:
    lines = [
        f"<b>{row['label']}</b> (plan {row['plan_id']})",
        f"{units.duration_ms(row['measured_request_ms'])} a request, {row['speedup']:.2f}x",
        f"{increase_heading([row]).lower()} {increase_words(row)} "
        f"({units.interval(row['perplexity_increase_low'], row['perplexity_increase_high'])})",
        f"memory {units.size(row['memory_bytes'])}",
    ]
    if row["perplexity"] is not None:
        lines.insert(2, f"perplexity {units.digits(row['perplexity'], 5)}")
    if row["kl"] is not None:
        lines.append(f"KL {units.digits(row['kl'])}")
    return "<br>".join(lines)


def _page_range(rows: Sequence[Row]) -> list[float] | None:
    """Begin with the part where choices are made; the reader can zoom out to the plans far above it."""
    threshold = increase_threshold(rows)
    if threshold is None:
        return None
    lowest = min(row["perplexity_increase_low"] * 100 for row in rows)
    return [min(lowest, 0.0) - 0.1 * threshold, 4 * threshold]
