"""The front as a picture, drawn with matplotlib."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.report import units
from autoquant.report.front.geometry import (
    LINE_LABEL,
    RECOMMENDED,
    TIME_TITLE,
    UNQUANTIZED,
    Family,
    Front,
    Point,
    Row,
    make_front,
)
from autoquant.report.front.labels import Box, nearest_point, place_labels
from autoquant.report.visible import visible

SUFFIXES = (".png", ".svg")

# Shape and fill carry the meaning, so that the picture reads in greyscale.
_FRONT, _STAR, _INK, _GREY, _THIN = "#1f4e79", "#f0a020", "#222222", "#6b7885", "#8a949e"
_SIZE_INCHES, _DPI = (9.0, 5.8), 120
_SMALLEST_AREA, _LARGEST_AREA = 30.0, 190.0  # points squared, as matplotlib counts areas
_STAR_GROWTH = 2.2  # a star of the same extent has less ink
_MARGIN, _LEAST_AROUND = 0.12, 0.05
_LEGEND_COLUMNS = 4
_LABELLED_KINDS = ("uniform", "heuristic", "bits")


def render(rows: Sequence[Row], suffix: str, title: str) -> bytes:
    """Return the front as the bytes of a `.png` or `.svg` file.

    Raises:
        ValueError: `suffix` is none of `SUFFIXES`.
    """
    if suffix not in SUFFIXES:
        raise ValueError(f"cannot draw {suffix!r}: one of {', '.join(SUFFIXES)}")
    figure = _draw(make_front(rows), title)
    buffer = io.BytesIO()
    kind = suffix.removeprefix(".")
    # Without a date, the same front gives the same file.
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _draw(front: Front, title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(visible(title), loc="left", fontsize=11, parse_math=False)
    axes.set_xlabel(TIME_TITLE)
    axes.set_ylabel(f"{front.title} [%]")
    _set_scales(axes, front)
    _draw_line(axes, front.line)
    for point in front.drawn:
        _draw_point(axes, point)
    if front.note:
        axes.text(0.0, -0.14, front.note, transform=axes.transAxes, fontsize=8, color=_INK)
    _draw_legend(figure, front)
    axes.grid(color="#e4e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # Labels are placed in pixels, so the layout must not change after this.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    axes.autoscale(False)
    _draw_labels(figure, axes, front)
    return figure


def _set_scales(axes: Any, front: Front) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.margins(_MARGIN)
    if front.log_times:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if (limits := _time_limits(front)) is not None:
        axes.set_xlim(limits)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    if front.linear_to is not None:
        linear_to = 10 ** math.ceil(math.log10(front.linear_to))
        axes.set_yscale("symlog", linthresh=linear_to, linscale=1.5)
        axes.yaxis.set_major_locator(FixedLocator(_symlog_ticks(linear_to, front.drawn)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: _signed(value)))


def _time_limits(front: Front) -> tuple[float, float] | None:
    """Return the ends of the axis of times, or None without a point.

    matplotlib sets them anew for each point, and warns where they meet in between. Times that are
    nearly equal get an axis that does not enlarge their difference.
    """
    times = [point.request_ms for point in front.drawn]
    if not times:
        return None
    low, high = min(times), max(times)
    if front.log_times:
        beyond = (high / low) ** _MARGIN
        return low / beyond, high * beyond
    beyond = max(_MARGIN * (high - low), _LEAST_AROUND * high)
    return low - beyond, high + beyond


def _signed(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _symlog_ticks(linear_to: float, points: Sequence[Point]) -> list[float]:
    """Return ticks of both signs: parts of the linear range, then 1, 2, 5 times powers of ten."""
    ends = [abs(end) for point in points for end in (point.low, point.high)]
    largest = max(linear_to, *ends)
    decades = math.ceil(math.log10(largest / linear_to)) + 1
    steps = (1, 2, 5) if decades <= 3 else (1,)  # more numbers would overlap
    ticks = [linear_to / 4, linear_to / 2]
    for power in range(decades):
        ticks += [linear_to * 10**power * step for step in steps]
    return [0.0, *ticks, *(-tick for tick in ticks)]


def _draw_line(axes: Any, steps: Sequence[Point]) -> None:
    times = [point.request_ms for point in steps]
    increases = [point.increase for point in steps]
    axes.step(times, increases, where="post", color=_FRONT, linewidth=1.4, zorder=2)


def _area(point: Point) -> float:
    """Return an area that grows with the memory of the plan."""
    area = _SMALLEST_AREA + point.memory_share * (_LARGEST_AREA - _SMALLEST_AREA)
    return area * (_STAR_GROWTH if point.family is RECOMMENDED else 1.0)


def _colours(family: Family) -> tuple[str, str]:
    """Return the colours of the face and the edge."""
    if family is RECOMMENDED:
        return _STAR, _INK
    if family is UNQUANTIZED:
        return _FRONT, _INK
    return (_FRONT, "white") if family.filled else ("white", _GREY)


def _draw_point(axes: Any, point: Point) -> None:
    x, y = point.request_ms, point.increase
    if point.has_interval:
        ends = [[max(0.0, y - point.low)], [max(0.0, point.high - y)]]
        axes.errorbar(
            x, y, yerr=ends, fmt="none", ecolor=_THIN, elinewidth=0.9, capsize=2, zorder=2.5
        )
    face, edge = _colours(point.family)
    axes.scatter(
        [x],
        [y],
        s=_area(point),
        marker=point.family.marker,
        facecolor=face,
        edgecolor=edge,
        linewidths=1.1,
        zorder=6 if point.family is RECOMMENDED else 5 if point.family.filled else 3,
    )


def _draw_legend(figure: Any, front: Front) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, colours: tuple[str, str], label: str, area: float) -> Line2D:
        return Line2D(
            [],
            [],
            marker=marker,
            linestyle="",
            markerfacecolor=colours[0],
            markeredgecolor=colours[1],
            markersize=math.sqrt(area),
            label=label,
        )

    entries = [
        mark(each.marker, _colours(each), each.name, 160.0 if each is RECOMMENDED else 55.0)
        for each in front.families
    ]
    entries.append(
        Line2D([], [], color=_FRONT, linewidth=1.4, label=LINE_LABEL.removeprefix("line: "))
    )
    stored = [point.row["memory_bytes"] for point in front.points]
    areas = {min(stored, default=0): _SMALLEST_AREA, max(stored, default=0): _LARGEST_AREA}
    entries += [mark("o", (_GREY, "white"), units.size(at), area) for at, area in areas.items()]
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=_LEGEND_COLUMNS,
        frameon=False,
        fontsize=8.5,
    )


def _draw_labels(figure: Any, axes: Any, front: Front) -> None:
    points = front.drawn
    labelled = sorted(filter(_needs_label, points), key=_importance)
    renderer = figure.canvas.get_renderer()
    pixels = {id(point): _pixel(axes, point) for point in points}
    boxes = place_labels(
        [pixels[id(point)] for point in labelled],
        [_text_size(axes, renderer, point) for point in labelled],
        _obstacles(axes, front, pixels),
        tuple(axes.get_window_extent(renderer).extents),
    )
    to_data = axes.transData.inverted()
    for point, box in zip(labelled, boxes, strict=True):
        anchor = pixels[id(point)]
        start = nearest_point(box, anchor)
        if math.dist(start, anchor) > _radius(point) + 10:
            # The label is far from its point: a thin line says whose it is.
            ends = to_data.transform([start, anchor])
            axes.plot(ends[:, 0], ends[:, 1], color=_THIN, linewidth=0.6, zorder=2.2)
        place = to_data.transform(box[:2])
        axes.text(*place, point.label, va="bottom", ha="left", zorder=7, **_text_style(point))


def _needs_label(point: Point) -> bool:
    kind = point.row["kind"]
    return point.family in (RECOMMENDED, UNQUANTIZED) or kind in _LABELLED_KINDS


def _importance(point: Point) -> tuple[bool, bool, bool]:
    return (
        point.family is not RECOMMENDED,
        point.family is not UNQUANTIZED,
        not point.row["on_front"],
    )


def _text_style(point: Point) -> dict[str, Any]:
    weight = "bold" if point.family is RECOMMENDED else "normal"
    return {"fontsize": 8.5, "color": _INK, "weight": weight, "parse_math": False}


def _text_size(axes: Any, renderer: Any, point: Point) -> tuple[float, float]:
    """Return width and height of a label in pixels: draw it, measure it, and take it away."""
    text = axes.annotate(point.label, (0, 0), xycoords="figure pixels", **_text_style(point))
    extent = text.get_window_extent(renderer)
    text.remove()
    return extent.width, extent.height


def _pixel(axes: Any, point: Point) -> tuple[float, float]:
    x, y = axes.transData.transform((point.request_ms, point.increase))
    return float(x), float(y)


def _obstacles(axes: Any, front: Front, pixels: Mapping[int, tuple[float, float]]) -> list[Box]:
    """Return boxes, in pixels, that a label should not cover: points, intervals and the line."""
    boxes: list[Box] = []
    for point in front.drawn:
        x, y = pixels[id(point)]
        radius = _radius(point) + 3
        boxes.append((x - radius, y - radius, x + radius, y + radius))
        if point.has_interval:
            _, low = axes.transData.transform((point.request_ms, point.low))
            _, high = axes.transData.transform((point.request_ms, point.high))
            boxes.append((x - 2, float(low), x + 2, float(high)))
    line = [pixels[id(point)] for point in front.line]
    return [*boxes, *_line_boxes(line)]


def _radius(point: Point) -> float:
    """Return half the extent of a point in pixels. Diamonds stand on their corners."""
    area = _area(point) * (2.0 if point.family.marker == "D" else 1.0)
    return math.sqrt(area) / 2 * _DPI / 72


def _line_boxes(steps: Sequence[tuple[float, float]]) -> list[Box]:
    """Return thin boxes along the line."""
    boxes: list[Box] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(steps):
        # Each step goes to the right first, then up or down.
        boxes.append((x0, y0 - 1, x1, y0 + 1))
        boxes.append((x1 - 1, min(y0, y1), x1 + 1, max(y0, y1)))
    return boxes
