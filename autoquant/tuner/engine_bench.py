"""Time plans in an inference engine itself, in turn with the unquantized model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.held import held_layers, lacking_notes
from autoquant.engines import Engine
from autoquant.engines import engine as find_engine
from autoquant.errors import ConstraintError, PlanError
from autoquant.events import (
    Listener,
    Notice,
    StageFinished,
    StageProgress,
    StageStarted,
    ignore,
    logged,
)
from autoquant.models import hub
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import ORIGINAL_LABEL, Interval, Plan, RunTimes, Workload
from autoquant.runtime.request import RequestTimes, paired
from autoquant.store import StudyFacts
from autoquant.tuner.timed_engines import FIRST, REQUEST, TIMED, Run, TimedEngine, Times

ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """One model in a run of `bench_engine`.

    Attributes:
        plan_id: None for the unquantized model.
        loop: The engine with its version.
        ratio: Request time over the unquantized model's, with its interval; None for that one.
        memory_bytes: Of the file that the engine reads.
        notes: How it was timed.
    """

    plan_id: str | None
    label: str
    loop: str
    times: RunTimes
    ratio: Interval | None
    memory_bytes: int
    notes: tuple[str, ...]


def timed_engine(name: str, workload: Workload, folder: Path | None = None) -> TimedEngine:
    """Find an engine's program on this machine, before any work.

    Args:
        folder: Where the program is; None looks on the PATH.

    Raises:
        ConstraintError: The engine is not known, is not timed here, or is not installed.
        WorkloadError: It has no way to time the workload.
    """
    if find_engine(name).name not in TIMED:
        raise ConstraintError(
            f"only {' and '.join(TIMED)} are timed here: export the plan for {name}, and time it"
            " there"
        )
    found = TIMED[name](folder)
    found.check(workload)
    return found


@dataclass(frozen=True, slots=True)
class EngineRuns:
    """Models that an engine ran in turn, the unquantized one first.

    Attributes:
        taken: Of each model, its times in each round.
        sizes: Bytes of the file that the engine reads of each.
        version: The engine's.
    """

    taken: tuple[tuple[Times, ...], ...]
    sizes: tuple[int, ...]
    version: str


def bench_engine(
    plans: Sequence[Plan],
    original: Plan,
    model: str,
    facts: StudyFacts,
    timed: TimedEngine,
    listener: Listener = ignore,
    *,
    embedding: str | None = None,
    trust: Trust = NO_TRUST,
) -> list[EngineRow]:
    """Export plans, and time the engine with each and with the unquantized model, in turn.

    Other arguments, and the errors, are those of `run_engine`.

    Args:
        embedding: What becomes of embeddings of plans, see `export_to_disk`.
    """
    runs = run_engine(
        plans,
        original,
        model,
        facts,
        timed,
        listener,
        options=lambda plan: {"embedding": None if plan is original else embedding},
        trust=trust,
    )
    return engine_rows(runs, plans, timed.name, facts.workload)


def engine_rows(
    runs: EngineRuns, plans: Sequence[Plan], engine: str, workload: Workload
) -> list[EngineRow]:
    """Return what `run_engine` measured of plans, the unquantized model first."""
    pairs = [paired(taken, runs.taken[0], "") for taken in runs.taken]
    return [
        EngineRow(
            plan_id=None if plan is None else plan.plan_id,
            label=ORIGINAL_LABEL if plan is None else plan.label,
            loop=f"{engine} {runs.version}",
            times=_run_times(pair, workload),
            ratio=None if plan is None else pair.ratio({REQUEST: 1, FIRST: 0}),
            memory_bytes=size,
            notes=(),
        )
        for plan, pair, size in zip([None, *plans], pairs, runs.sizes, strict=True)
    ]


def run_engine(
    plans: Sequence[Plan],
    original: Plan,
    model: str,
    facts: StudyFacts,
    timed: TimedEngine,
    listener: Listener = ignore,
    *,
    options: Callable[[Plan], Mapping[str, Any]] = lambda _plan: {},
    trust: Trust = NO_TRUST,
) -> EngineRuns:
    """Export plans, and run the engine with each and with the unquantized model, in turn.

    Files are written into a temporary folder, and removed at the end.

    Args:
        original: The study's plan that quantizes nothing.
        timed: What `timed_engine` found.
        options: Of the export of each plan, the unquantized one too: see `export_to_disk`.

    Raises:
        PlanError: The engine's files cannot hold a plan or the model, or it cannot compute one.
        ProcessDiedError: The engine failed.
    """
    engine = find_engine(timed.name)
    for plan in plans:
        _check_computed(plan, engine, facts)
    listener = logged(listener)
    every = [original, *plans]
    exported = every if timed.converts else plans
    with tempfile.TemporaryDirectory(prefix="autoquant-bench-") as scratch:
        listener(StageStarted("export", len(exported)))
        models = [] if timed.converts else [_folder(model)]
        for done, plan in enumerate(exported):
            listener(StageProgress("export", done, plan.label))
            report = export_to_disk(
                plan,
                model,
                Path(scratch) / plan.plan_id,
                to=engine.target.name,
                facts=facts,
                trust=trust,
                **options(plan),
            )
            models.append(timed.model(report.out))
        listener(StageFinished("export", f"{len(exported)} models"))
        sizes = tuple(timed.memory_bytes(each) for each in models)
        code = trust.trust_remote_code
        listener(StageStarted("run", ROUNDS * len(every)))
        with timed.started(models, original.dtype, facts, trust_remote_code=code) as runs:
            found, version = _in_turn(runs, [plan.label for plan in every], listener)
    return EngineRuns(tuple(map(tuple, found)), sizes, version)


def _check_computed(plan: Plan, engine: Engine, facts: StudyFacts) -> None:
    """Refuse a plan that the engine could not load or compute on the device of the study.

    Raises:
        PlanError: It is one.
    """
    held = held_layers(plan, engine.target)
    if notes := lacking_notes(engine, held, plan, [None, facts.device.type]):
        words = "; ".join(notes)
        advice = f"search or solve with --for {engine.name}"
        ending = "" if advice in words else f"; {advice}"
        raise PlanError(f"plan {plan.plan_id} does not run there: {words}{ending}")


def _folder(model: str) -> Path:
    """Return the folder of the unquantized model, fetched if it is on the hub."""
    place = Path(model)
    return place.absolute() if place.exists() else hub.download(model)


def _in_turn(
    runs: Sequence[Run], labels: Sequence[str], listener: Listener
) -> tuple[list[list[Times]], str]:
    """Return the times of each model in each round, and the engine's version."""
    found: list[list[Times]] = [[] for _ in runs]
    version = ""
    for number in range(ROUNDS):
        for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
            listener(StageProgress("run", number * len(runs) + place, label))
            times, version = run()
            found[place].append(times)
    listener(StageFinished("run", f"{len(runs)} models, {ROUNDS} rounds"))
    spread = max(taken[REQUEST] for taken in found[0]) / min(taken[REQUEST] for taken in found[0])
    if spread > 1.2:
        listener(
            Notice(
                f"the unquantized model's requests differ by {spread:.1f} times between rounds:"
                " other programs are at work, close them for times to trust"
            )
        )
    return found, version


def _run_times(pair: RequestTimes, workload: Workload) -> RunTimes:
    request_ms, first_ms = pair.plan_ms[REQUEST], pair.plan_ms[FIRST]
    further = workload.new_tokens - 1
    step_ms = max(request_ms - first_ms, 0.0) / further if further else None
    return RunTimes(request_ms=request_ms, first_token_ms=first_ms, step_ms=step_ms)
