"""Time plans again in the whole model, in turn with the unquantized model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from autoquant.candidates.kernels.caches import kernels_kept
from autoquant.delivery.applier import applied, module_bytes
from autoquant.delivery.searched import load_searched
from autoquant.devices import backend
from autoquant.errors import DeviceError
from autoquant.events import (
    Listener,
    Notice,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
    logged,
)
from autoquant.models import LoadedModel
from autoquant.models.stand_in import to_time
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import ORIGINAL_LABEL, Interval, Loop, Plan, RunTimes, Workload, request_time
from autoquant.runtime.attribution import attribute
from autoquant.runtime.generate.kv_codes import bytes_of_keys_and_values
from autoquant.runtime.phases import Phases, make_phases
from autoquant.runtime.request import make_warm, time_in_turn
from autoquant.runtime.steps import StepProfile
from autoquant.runtime.user_loop import Usage, time_user_loops, warm_up
from autoquant.store import StudyFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One model in a run of `bench`.

    Attributes:
        plan_id: None for the unquantized model.
        predicted_request_ms: Scaled to the unquantized model's time in this run; None for that one.
        phase_ms: Median milliseconds of one call of each phase.
        request_ms: The sum over phases of their calls times that.
        memory_bytes: Of all parameters as stored.
        kv_bytes: Of keys and values of one sequence of the workload; None if it keeps none.
        peak_bytes: Those, and the most that was allocated with them. Only on CUDA, else None.
        notes: How it was compiled, if not as usual, and what disturbed the run.
        steps: One step of each phase, kernel by kernel; empty if not asked for.
    """

    plan_id: str | None
    label: str
    phase_ms: Mapping[str, float]
    request_ms: float
    predicted_request_ms: float | None
    memory_bytes: int
    kv_bytes: int | None
    peak_bytes: int | None
    notes: tuple[str, ...]
    steps: Mapping[str, StepProfile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRow:
    """One model in a run of `bench_loop`.

    Attributes:
        plan_id: None for the unquantized model.
        ratio: Request time over the unquantized model's, with its interval; None for that one.
        memory_bytes: Of all parameters as stored.
        notes: What disturbed the run.
    """

    plan_id: str | None
    label: str
    loop: Loop
    times: RunTimes
    ratio: Interval | None
    memory_bytes: int
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Entrant:
    plan: Plan | None
    module: nn.Module
    phases: Phases
    memory_bytes: int
    peak_bytes: int | None
    note: str


def bench(
    plans: Sequence[Plan],
    model: str,
    facts: StudyFacts,
    listener: Listener = ignore,
    *,
    attribution: bool = False,
    trust: Trust = NO_TRUST,
) -> list[BenchRow]:
    """Time plans of one study in turn with the unquantized model.

    Each plan is applied to a copy that shares every weight that the plan leaves alone.

    Args:
        plans: At least one.
        model: Where the searched model is.
        facts: The plans' study.
        attribution: Also profile a step of each phase of each model, after the timing.
        trust: The code that the user named. What the study names is never run by itself.

    Returns:
        The row of the unquantized model, then those of the plans in their order.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: There is another model at `model`.
        WrongResultError: A plan's compiled code does not compute what it does eagerly.
    """
    listener = logged(listener)
    loaded = load_searched(plans[0], model, facts, None, trust)
    listener(StageStarted("compile", 1 + len(plans)))
    entrants = []
    for done, plan in enumerate([None, *plans]):
        listener(StageProgress("compile", done, plan.label if plan else ORIGINAL_LABEL))
        entrants.append(_enter(loaded, plan, facts))
    listener(StageFinished("compile", f"{len(entrants)} models"))
    times, busy = time_in_turn([entrant.phases for entrant in entrants], facts.device.type)
    if busy:
        listener(Notice(f"{busy}, with other programs closed"))
    original_ms = request_time(times[0], facts.workload.calls())
    rows = [
        _row(entrant, phase_ms, facts.workload, original_ms, busy)
        for entrant, phase_ms in zip(entrants, times, strict=True)
    ]
    return _attributed(rows, entrants, facts, listener) if attribution else rows


def bench_loop(
    plans: Sequence[Plan],
    model: str,
    facts: StudyFacts,
    listener: Listener = ignore,
    *,
    trust: Trust = NO_TRUST,
) -> list[LoopRow]:
    """Time plans as `bench` does, in the loop that a user runs.

    That is `generate` of a causal language model, or one call of another module.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: There is another model at `model`.
    """
    listener = logged(listener)
    loaded = load_searched(plans[0], model, facts, None, trust)
    device = facts.device.type
    usage = Usage.of(loaded, facts.workload)
    original, stand_in = to_time(loaded.module)
    quantized = (applied(plan, loaded.module, facts.calibration) for plan in plans)
    modules = [original, *quantized]
    listener(StageStarted("run", 0))
    loops = [usage.loop_of(module) for module in modules]
    warm_up(loops, device)
    found, busy = time_user_loops(loops, device)
    listener(StageFinished("run", f"{len(modules)} models, {usage.loop}"))
    if busy:
        listener(Notice(f"{busy}, with other programs closed"))
    return [
        LoopRow(
            plan_id=plan.plan_id if plan else None,
            label=plan.label if plan else ORIGINAL_LABEL,
            loop=usage.loop,
            times=of_model.times,
            ratio=of_model.ratio,
            memory_bytes=module_bytes(module if plan else loaded.module),
            notes=tuple(filter(None, ("" if plan else stand_in, busy))),
        )
        for plan, module, of_model in zip([None, *plans], modules, found, strict=True)
    ]


def _attributed(
    rows: Sequence[BenchRow], entrants: Sequence[_Entrant], facts: StudyFacts, listener: Listener
) -> list[BenchRow]:
    """Return the rows with their steps. Runs last: timings after a profiler are slower."""
    layers = {
        layer.name: layer.parameters[0]
        for entrant in entrants
        if entrant.plan
        for layer in entrant.plan.layers
    }
    listener(StageStarted("attribute", len(rows)))
    attributed = []
    for done, (row, entrant) in enumerate(zip(rows, entrants, strict=True)):
        listener(StageProgress("attribute", done, row.label))
        try:
            attributed.append(
                replace(
                    row, steps=attribute(entrant.phases, entrant.module, layers, facts.device.type)
                )
            )
        except DeviceError as error:
            attributed.append(replace(row, notes=(*row.notes, f"not attributed: {error}")))
    listener(StageFinished("attribute", f"{len(rows)} models"))
    return attributed


def _enter(loaded: LoadedModel, plan: Plan | None, facts: StudyFacts) -> _Entrant:
    device = facts.device.type
    module, stand_in = loaded.module, ""
    if plan is not None:
        module = applied(plan, module, facts.calibration)
    elif loaded.stream is not None:
        module, stand_in = to_time(module)
    memory = module_bytes(loaded.module if plan is None else module)
    place = backend(device)
    place.reset_peak()
    make = partial(
        make_phases,
        replace(loaded, module=module),
        facts.workload,
        compiled=place.compile_failure() is None,
    )
    with kernels_kept(device):
        phases, note = make_warm(make, place.divisions)
    peak = place.peak_bytes()
    note = "; ".join(filter(None, (stand_in, note)))
    return _Entrant(plan, module, phases, memory, None if peak is None else memory + peak, note)


def _row(
    entrant: _Entrant,
    phase_ms: Mapping[str, float],
    workload: Workload,
    original_ms: float,
    busy: str,
) -> BenchRow:
    plan = entrant.plan
    return BenchRow(
        plan_id=plan.plan_id if plan else None,
        label=plan.label if plan else ORIGINAL_LABEL,
        phase_ms=phase_ms,
        request_ms=request_time(phase_ms, workload.calls()),
        predicted_request_ms=plan.prediction.request_ms_beside(original_ms) if plan else None,
        memory_bytes=entrant.memory_bytes,
        kv_bytes=bytes_of_keys_and_values(entrant.module, workload),
        peak_bytes=entrant.peak_bytes,
        notes=tuple(filter(None, (entrant.note, busy))),
    )
