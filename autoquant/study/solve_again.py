"""Solve a finished search for other limits, from what the store holds: nothing is measured.

The resulting plan is predicted, not proven. It is kept as such, and can be shown and applied. A
search for the same limits proves it. Needs no model and no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from autoquant.engines import engine as find_engine
from autoquant.errors import PlanError
from autoquant.records import LayerChoice, Plan, Site
from autoquant.solver.limits import Limits
from autoquant.solver.loss_scale import fit_loss_scale
from autoquant.solver.planning import make_plan, predict
from autoquant.solver.solve import Picks, smallest
from autoquant.solver.space import SearchSpace
from autoquant.study.engine_times import EngineTimes, in_engine
from autoquant.study.for_engine import as_stored, for_engine, memory_notes
from autoquant.study.study import Study

AROUND = (0.25, 0.5, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Solved:
    """The result of `solve_again`.

    Attributes:
        plan: The fastest (or smallest) plan that is predicted to be within the limits.
        proven: Whether it had been proven before.
        around: `plan`, and plans for less and more loss than the limits are expected to allow, the
            most exact first. The store does not keep these.
        engine: The inference engine that all of these are for, or None.
        notes: What that engine leaves out of what was searched.
    """

    plan: Plan
    proven: bool
    around: tuple[Plan, ...]
    engine: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is solved.

    Attributes:
        space: The options, those that the engine holds if there is one.
        allowed: The loss that the limits are expected to allow; None for any.
        notes: What the engine leaves out of what was searched.
        advice: What to do where the smallest of all plans is too large.
        own: The same space with autoquant's own times, if `space` has those of the engine.
    """

    space: SearchSpace
    allowed: float | None
    engine: str | None
    notes: tuple[str, ...]
    advice: str
    own: SearchSpace | None = None

    @property
    def aim(self) -> str:
        """Start of the labels of its plans."""
        if self.engine is None:
            return "solved"
        by_times = "" if self.own is None else " by its times"
        return f"solved for {self.engine}{by_times}"

    def with_times(self, times: EngineTimes, sites: Sequence[Site]) -> Prepared:
        """Return what is solved by the times of its engine."""
        timed = in_engine(self.space, times, find_engine(times.engine), sites)
        return replace(self, space=timed, own=self.space)

    def as_kept(self, found: Plan) -> Plan:
        """Return a plan as the study keeps it: every plan of it predicts autoquant's own times."""
        if self.own is None:
            return found
        known = {_does(choice): choice for layer in self.own.options for choice in layer}
        layers = tuple(
            replace(known[_does(layer)], reason=f"in {self.engine}: {layer.reason}")
            for layer in found.layers
        )
        return replace(found, layers=layers, prediction=predict(layers, self.own.context))


def _does(choice: LayerChoice) -> Hashable:
    return choice.name, choice.format, choice.numerics, choice.route, choice.joined


def solve_again(
    study: Study,
    limits: Limits,
    around: Sequence[float] = (),
    engine: str | None = None,
    *,
    one_head: bool = False,
) -> Solved:
    """Solve a study's additive model for other limits, and keep the plan.

    Args:
        around: Also solve for these multiples of the loss that the limits are expected to allow.
        engine: The inference engine that the plan is for; None means the one of the search, if any.
            Then bytes are those of its files.
        one_head: Its files hold a quantized head that is tied to the embedding once, for both.

    Raises:
        PlanError: The study has no model to solve yet, or no plan is predicted to be within the
            limits, or nothing that the engine holds was searched.
        ConstraintError: There is no such engine.
    """
    return solve_prepared(study, prepare(study, limits, engine, one_head=one_head), limits, around)


def prepare(
    study: Study, limits: Limits, engine: str | None = None, *, one_head: bool = False
) -> Prepared:
    """Return what is solved for limits and an engine, as `solve_again` takes them.

    Raises:
        PlanError: The study has no model to solve yet, or nothing that the engine holds was
            searched.
        ConstraintError: There is no such engine.
    """
    space = study.space()
    if space is None:
        raise PlanError(
            f"study {study.study_id} keeps nothing to solve: it has not come so far, or was made"
            " by an older autoquant; run its search again, which measures nothing twice"
        )
    plans = {plan.plan_id: plan for plan in study.plans()}
    losses = fit_loss_scale(space, limits, plans, study.proofs())
    space = losses.space(space)
    searched_for = study.constraints.engine
    engine = engine or searched_for
    notes: list[str] = []
    advice = "allow at least that with --max-memory"
    if engine is not None and engine != searched_for:
        space, notes = for_engine(space, engine, study.facts.device.type)
        advice += f", search with --for {engine}, which tries what it holds"
    if engine is not None:
        space = as_stored(space, engine, one_head=one_head)
        notes += memory_notes(engine, searched_for, one_head=one_head)
    return Prepared(space, losses.allowed, engine, tuple(notes), advice)


def solve_prepared(
    study: Study, prepared: Prepared, limits: Limits, around: Sequence[float] = ()
) -> Solved:
    """Solve for limits, and keep the plan. See `solve_again`."""
    space, allowed, engine = prepared.space, prepared.allowed, prepared.engine
    space.check_memory(limits.max_memory_bytes, prepared.advice)
    picks = _solve(space, limits, allowed)
    if picks is None:
        raise PlanError(_infeasible(space, limits, allowed))
    found = space.plan(picks, f"{prepared.aim}: {limits}", "solved")
    known = {plan.plan_id: plan for plan in study.plans()}
    plan = known.get(found.plan_id, found)
    if plan is found:
        study.store.put_plan(prepared.as_kept(found))
    elif engine is not None:  # it may be known with the bytes that it takes elsewhere
        plan = replace(plan, prediction=found.prediction)
    further = [_solve(space, limits, allowed * multiple) for multiple in around] if allowed else []
    others = dict.fromkeys(each for each in further if each not in (None, picks))
    plans = [plan, *(_unexplained(space, each) for each in others if each)]
    by_loss = sorted(plans, key=lambda plan: plan.prediction.loss)
    proven = plan.plan_id in study.proofs()
    return Solved(plan, proven, tuple(by_loss), engine, prepared.notes)


def _unexplained(space: SearchSpace, picks: Picks) -> Plan:
    return make_plan(space.chosen(picks), "around", "solved", space.context)


def _solve(space: SearchSpace, limits: Limits, allowed: float | None) -> Picks | None:
    return space.solve(
        limits.minimize,
        max_summed_loss=space.budget(allowed),
        max_memory_bytes=limits.max_memory_bytes,
    )


def _infeasible(space: SearchSpace, limits: Limits, allowed: float | None) -> str:
    """Say why no plan is within the limits, and what would have to give."""
    picks = smallest(space.problem, max_loss=space.budget(allowed))
    if picks is None:
        return (
            f"no plan is predicted to be the {limits}: the constraints of this search cost more"
            " quality; allow more, or search with fewer of --keep, --pin and --for"
        )
    return (
        f"no plan is predicted to be the {limits}: within the limit of quality the smallest takes"
        f" {space.memory_bytes(picks):,} bytes; allow that with --max-memory, or a larger increase"
        " or divergence"
    )
