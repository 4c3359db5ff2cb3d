"""What solving for an engine's speed found, in words and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from autoquant.engines.targets import PLAIN
from autoquant.records import Interval, Plan, Workload
from autoquant.report import units
from autoquant.report.tables.bench import LoopLine, loop_objects
from autoquant.solver.limits import Limits
from autoquant.study.engine_times import EngineTimes
from autoquant.study.solve_again import Solved


class Quality(Protocol):
    """What is read from `autoquant.tuner.rejudge.Judged`."""

    @property
    def loss(self) -> float: ...

    @property
    def increase(self) -> Interval: ...

    @property
    def selection(self) -> Interval: ...

    @property
    def kl(self) -> Interval | None: ...


class Found(Protocol):
    """What is read from `autoquant.tuner.engine_solve.EngineSolved`."""

    @property
    def solved(self) -> Solved: ...

    @property
    def times(self) -> EngineTimes: ...

    @property
    def rows(self) -> Sequence[LoopLine]: ...

    @property
    def predicted_ratio(self) -> Mapping[str, float]: ...

    @property
    def judged(self) -> Mapping[str, Quality]: ...

    @property
    def beside_uniform(self) -> Interval | None: ...

    @property
    def no_uniform(self) -> str: ...


def in_engine_lines(found: Found, limits: Limits, workload: Workload) -> list[str]:
    """Return what was measured of the plan: its quality, its speed beside others, predictions."""
    plan = found.solved.plan
    lines = [f"Plan {plan.plan_id} ({plan.label}): {_formats(plan)}"]
    lines += [
        _quality_words(row, found.judged[row.plan_id or ""], limits) for row in found.rows[1:]
    ]
    lines.append(_uniform_words(found))
    lines += [_predicted_words(row, found) for row in found.rows[1:]]
    timed = ", ".join(
        f"{'unquantized' if name == PLAIN else name} {units.duration_ms(ms)}"
        for name, ms in found.times.requests_ms(workload).items()
    )
    lines.append(
        f"Types timed in {found.times.engine} {found.times.version}, a request of the whole model:"
        f" {timed}"
    )
    return lines


def _formats(plan: Plan) -> str:
    return ", ".join(f"{count} x {name}" for name, count in plan.formats().items())


def _quality_words(row: LoopLine, judged: Quality, limits: Limits) -> str:
    what = "divergence" if limits.measure == "divergence" else "increase"
    limit = "" if limits.max_ppl_increase is None else f", limit {100 * limits.max_ppl_increase:g}%"
    kl = "" if judged.kl is None else f", KL {judged.kl.value:.3g}"
    unseen, checked, high = (
        units.percent(each, signed=True)
        for each in (judged.increase.value, judged.selection.value, judged.selection.high)
    )
    return (
        f"Quality of {row.label}: {what} {unseen} on text that no choice was made by; {checked}"
        f" (95%: up to {high}{limit}) where limits are checked{kl}"
    )


def _uniform_words(found: Found) -> str:
    ratio = found.beside_uniform
    if ratio is None:
        return f"No other plan to compare with: {found.no_uniform}."
    shown = "shown" if ratio.high < 1 or ratio.low > 1 else "not shown to differ"
    fastest = f"{1 / ratio.low:.2f}" if ratio.low > 0 else "any"
    return (
        f"Beside {found.rows[2].label}, the best plan with one format within the limits:"
        f" {1 / ratio.value:.2f} times as fast (95% interval {1 / ratio.high:.2f} to {fastest}:"
        f" {shown})"
    )


def _predicted_words(row: LoopLine, found: Found) -> str:
    assert row.ratio is not None
    predicted = found.predicted_ratio[row.plan_id or ""]
    error = predicted / row.ratio.value - 1
    return (
        f"Predicted for {row.label}: {predicted:.3f} of the unquantized model's request, measured"
        f" {row.ratio.value:.3f} ({row.ratio.low:.3f} to {row.ratio.high:.3f}); off by {error:+.1%}"
    )


def in_engine_object(found: Found, workload: Workload) -> dict[str, Any]:
    """Return all of it as one JSON object."""
    rows = loop_objects(found.rows, workload)
    for row in rows[1:]:
        row["predicted_request_ratio"] = found.predicted_ratio[row["plan_id"]]
        row["quality"] = asdict(found.judged[row["plan_id"]])  # type: ignore[call-overload]
    ratio = found.beside_uniform
    return {
        "engine": found.times.engine,
        "notes": list(found.solved.notes),
        "plan": {"plan_id": found.solved.plan.plan_id, "formats": found.solved.plan.formats()},
        "around": [
            {"plan_id": plan.plan_id, "formats": plan.formats(), **asdict(plan.prediction)}
            for plan in found.solved.around
        ],
        "rows": rows,
        "beside_uniform": None if ratio is None else asdict(ratio),
        "no_uniform": found.no_uniform,
        "times": asdict(found.times),
    }
