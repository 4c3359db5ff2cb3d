"""Solve a finished search for other limits, from what the store holds: nothing is measured.

The resulting plan is predicted, not proven. It is kept as such, and can be shown and applied. A
search for the same limits proves it. Needs no model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoquant.errors import PlanError
from autoquant.records import Plan
from autoquant.solver.limits import Limits
from autoquant.solver.loss_scale import fit_loss_scale
from autoquant.solver.planning import make_plan
from autoquant.solver.solve import Picks, smallest
from autoquant.solver.space import SearchSpace
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
    space = study.space()
    if space is None:
        raise PlanError(
            f"study {study.study_id} keeps nothing to solve: it has not come so far, or was made"
            " by an older autoquant; run its search again, which measures nothing twice"
        )
    known = {plan.plan_id: plan for plan in study.plans()}
    proofs = study.proofs()
    losses = fit_loss_scale(space, limits, known, proofs)
    space, allowed = losses.space(space), losses.allowed
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
    space.check_memory(limits.max_memory_bytes, advice)
    picks = _solve(space, limits, allowed)
    if picks is None:
        raise PlanError(_infeasible(space, limits, allowed))
    aim = "solved" if engine is None else f"solved for {engine}"
    found = space.plan(picks, f"{aim}: {limits}", "solved")
    plan = known.get(found.plan_id, found)
    if plan is found:
        study.store.put_plan(plan)
    elif engine is not None:  # it may be known with the bytes that it takes elsewhere
        plan = replace(plan, prediction=found.prediction)
    further = [_solve(space, limits, allowed * multiple) for multiple in around] if allowed else []
    others = dict.fromkeys(each for each in further if each not in (None, picks))
    plans = [plan, *(_unexplained(space, each) for each in others if each)]
    by_loss = sorted(plans, key=lambda plan: plan.prediction.loss)
    return Solved(plan, plan.plan_id in proofs, tuple(by_loss), engine, tuple(notes))


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
