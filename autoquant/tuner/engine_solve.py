"""Solve a finished search for the speed of an inference engine, and prove the plan there.

Whole models with one type each are timed in the engine, once (see `autoquant.study.engine_times`).
What is solved for with these times is judged on the texts of the search, and solved for again if it
is beyond the limits or far within. Then the plan is exported, and timed in the engine in turn with
the unquantized model and with the best plan that has one format for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoquant.devices import backend
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
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import Interval, Plan
from autoquant.runtime.request import paired
from autoquant.solver.constraints import Scheme
from autoquant.solver.limits import Limits
from autoquant.solver.planning import make_plan
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import schemes, uniform_choice, uniform_label
from autoquant.study.engine_times import EngineTimes, keep_times, known_times, types_of
from autoquant.study.solve_again import AROUND, Prepared, Solved, prepare, solve_prepared
from autoquant.study.study import Study
from autoquant.tuner.engine_bench import EngineRow, EngineRuns, engine_rows, run_engine
from autoquant.tuner.engine_types import is_plain, plan_of_type, times_of
from autoquant.tuner.judge import Asked
from autoquant.tuner.rejudge import Judged, PlanJudge
from autoquant.tuner.timed_engines import FIRST, REQUEST, TimedEngine, Times

SOLVED = ("llama.cpp",)
"""The engines whose speed depends on a type alone, and that start in moments."""
_TRIES = 4
_ENOUGH, _AIM = 0.8, 0.95
"""Of the limit of quality: what a plan that is not solved for again uses, and what is aimed at."""
_NEAR = 2.0
"""A uniform plan is judged if it is predicted to lose up to so many times what is allowed."""


@dataclass(frozen=True, slots=True)
class EngineSolved:
    """The result of `solve_in_engine`.

    Attributes:
        solved: The plan, with plans around it, all predicted by the engine's times.
        times: Those.
        rows: What the engine took: the unquantized model, the plan, and the best uniform plan
            unless the plan is that, or none is within the limits.
        predicted_ratio: By plan id, predicted request time over the unquantized model's.
        judged: By plan id, the measured quality.
        beside_uniform: Request time of the plan over that of the best uniform one.
        no_uniform: Why there is no such plan among the rows, or "".
    """

    solved: Solved
    times: EngineTimes
    rows: Sequence[EngineRow]
    predicted_ratio: Mapping[str, float]
    judged: Mapping[str, Judged]
    beside_uniform: Interval | None
    no_uniform: str


def solve_in_engine(  # noqa: PLR0913 - the keywords of a public function
    study: Study,
    limits: Limits,
    model: str,
    timed: TimedEngine,
    listener: Listener = ignore,
    *,
    asked: Asked,
    embedding: str | None = None,
    again: bool = False,
    trust: Trust = NO_TRUST,
) -> EngineSolved:
    """Return the fastest plan in an engine within limits, measured there.

    Args:
        model: Path or name of the searched model.
        timed: What `timed_engine` found.
        asked: What judged the search, if not the text that autoquant ships.
        embedding: What becomes of embeddings of plans that quantize the head, `head` or None.
        again: Time the types again that the study knows.

    Raises what `run_engine` and `prepare` raise, and:
        PlanError: The study is not finished, or no plan was found that is within the limits.
        ConstraintError: The study was made on another device.
        TextError: The search judged by another measure.
    """
    solver = _Solver(study, limits, model, timed, logged(listener), asked, embedding, trust)
    found = solver.solve(again=again)
    if found.rows[0].loop != f"{timed.name} {found.times.version}":
        listener(Notice(f"the known times were of {timed.name} {found.times.version}: timed again"))
        found = solver.solve(again=True)
    return found


def check_solvable(engine: str) -> None:
    """Refuse an engine that is not solved for by its times, before any work.

    Raises:
        ConstraintError: It is one.
    """
    if find_engine(engine).name not in SOLVED:
        raise ConstraintError(
            f"only {' and '.join(SOLVED)} is timed by types of weights here: solve with --for"
            f" {engine}, and time the plan there with `autoquant bench --engine`"
        )


@dataclass
class _Solver:
    """The steps of `solve_in_engine`, and what they share."""

    study: Study
    limits: Limits
    model: str
    timed: TimedEngine
    listener: Listener
    asked: Asked
    embedding: str | None
    trust: Trust

    def __post_init__(self) -> None:
        plans = self.study.plans()
        original = next((plan for plan in plans if plan.kind == "original"), None)
        recording = self.study.facts.recording
        if original is None or recording is None:
            raise PlanError(
                "this study has no plan of the unquantized model to compare with: run its search"
                " again, which measures nothing twice"
            )
        self.original, self.sites = original, recording.sites
        self.device = backend(self.study.facts.device.type).fingerprint()
        if (self.device.name, self.device.threads) != (
            self.study.facts.device.name,
            self.study.facts.device.threads,
        ):
            raise ConstraintError(
                f"the study is of {self.study.facts.device.name} with"
                f" {self.study.facts.device.threads} threads, and this is {self.device.name} with"
                f" {self.device.threads}: solve it there, or search here"
            )
        self.engine = find_engine(self.timed.name)
        self.judge = PlanJudge(self.study, self.model, self.asked, self.trust)

    def solve(self, *, again: bool) -> EngineSolved:
        one_head = self.embedding == "head"
        prepared = prepare(self.study, self.limits, self.timed.name, one_head=one_head)
        times = self._times(prepared.space, again=again)
        prepared = prepared.with_times(times, self.sites)
        solved = self._within(prepared)
        uniform, no_uniform = self._uniform(prepared, solved.plan)
        plans = [solved.plan, *([uniform] if uniform else [])]
        runs = self._run(plans)
        rows = engine_rows(runs, plans, self.timed.name, self.study.facts.workload)
        return EngineSolved(
            solved=solved,
            times=times,
            rows=rows,
            predicted_ratio={plan.plan_id: _predicted_ratio(plan) for plan in plans},
            judged={plan.plan_id: self.judge.judged(plan) for plan in plans},
            beside_uniform=_ratio(runs.taken[1], runs.taken[2]) if uniform else None,
            no_uniform=no_uniform,
        )

    def _run(self, plans: Sequence[Plan], *, compare: bool = True) -> EngineRuns:
        return run_engine(
            plans,
            self.original,
            self.model,
            self.study.facts,
            self.timed,
            self.listener,
            options=lambda plan: {"embedding": self._embedding_of(plan), "compare": compare},
            trust=self.trust,
        )

    def _embedding_of(self, plan: Plan) -> str | None:
        """Return what becomes of the embedding: a head stands for it only where it is quantized."""
        tied = {site.name for site in self.sites if site.kept}
        quantized = any(layer.name in tied and not is_plain(layer) for layer in plan.layers)
        return self.embedding if quantized else None

    def _times(self, space: SearchSpace, *, again: bool) -> EngineTimes:
        """Return the times of the types, measured unless they are known."""
        wanted = types_of(self.engine, space)
        store, study_id = self.study.store, self.study.study_id
        known = None if again else known_times(store, study_id, self.timed.name)
        workload = self.study.facts.workload
        if known is not None and known.are_of(self.device.key, workload, wanted):
            return known
        plans = {name: plan_of_type(space, self.engine, name) for name in wanted}
        runs = self._run(list(plans.values()), compare=False)
        made = times_of(self.timed.name, self.device.key, plans, runs, workload)
        keep_times(store, study_id, made)
        return made

    def _within(self, prepared: Prepared) -> Solved:
        """Solve until a plan is measured to be within the limits, and to use most of them.

        Raises:
            PlanError: None is.
        """
        best: Solved | None = None
        beyond, share, seen = "", 1.0, set[str]()
        self.listener(StageStarted("solve", _TRIES))
        for tried in range(_TRIES):
            self.listener(StageProgress("solve", tried, f"{share:.0%} of the expected loss"))
            allowed = None if prepared.allowed is None else prepared.allowed * share
            around = AROUND if prepared.allowed is not None else ()
            solved = solve_prepared(
                self.study, replace(prepared, allowed=allowed), self.limits, around
            )
            if solved.plan.plan_id in seen:
                break
            seen.add(solved.plan.plan_id)
            judged = self.judge.judged(solved.plan)
            beyond = judged.beyond(self.limits) or beyond
            if not judged.beyond(self.limits) and (best is None or self._is_better(solved, best)):
                best = solved
            used = judged.used(self.limits)
            if used is None or (_ENOUGH <= used <= 1):
                break
            share *= _AIM / max(used, _AIM / 4)
        if best is None:
            raise PlanError(
                f"no plan was measured to be the {self.limits}: the last one's {beyond}; allow more"
            )
        if all(map(is_plain, best.plan.layers)):
            raise PlanError(
                f"nothing faster in {self.timed.name} than the unquantized model was found for the"
                f" {self.limits}: allow more"
            )
        self.listener(StageFinished("solve", f"{len(seen)} plans judged"))
        return best

    def _is_better(self, one: Solved, other: Solved) -> bool:
        first, second = one.plan.prediction, other.plan.prediction
        if self.limits.minimize == "memory":
            return first.memory_bytes < second.memory_bytes
        return first.request_ms < second.request_ms

    def _uniform(self, prepared: Prepared, plan: Plan) -> tuple[Plan | None, str]:
        """Return the best plan with one format for all layers that is within the limits.

        Or why there is none beside the plan.
        """
        space, limits = prepared.space, self.limits
        plans = [_uniform_plan(space, scheme) for scheme in schemes(space)]
        near = [
            each
            for each in plans
            if not all(map(is_plain, each.layers))
            and (prepared.allowed is None or space.plan_loss(each) <= _NEAR * prepared.allowed)
            and (
                limits.max_memory_bytes is None
                or each.prediction.memory_bytes <= limits.max_memory_bytes
            )
        ]
        by_memory = limits.minimize == "memory"
        near.sort(key=lambda p: p.prediction.memory_bytes if by_memory else p.prediction.request_ms)
        for each in near:
            if self.judge.judged(each).beyond(limits):
                continue
            if each.plan_id == plan.plan_id:
                return None, "the plan itself has one format for all layers"
            known = {known.plan_id for known in self.study.plans()}
            if each.plan_id not in known:
                self.study.store.put_plan(prepared.as_kept(each))
            return each, ""
        return None, "no plan with one format for all layers is within the limits"


def _uniform_plan(space: SearchSpace, scheme: Scheme) -> Plan:
    chosen = [uniform_choice(space, layer, scheme) for layer in space.options]
    return make_plan(chosen, uniform_label(scheme), "uniform", space.context)


def _predicted_ratio(plan: Plan) -> float:
    predicted = plan.prediction
    assert predicted.original_request_ms is not None  # of every space with an engine's times
    return predicted.request_ms / predicted.original_request_ms


def _ratio(plan: Sequence[Times], other: Sequence[Times]) -> Interval:
    """Return the request time of one model over that of another from the same rounds."""
    return paired(plan, other, "").ratio({REQUEST: 1, FIRST: 0})
