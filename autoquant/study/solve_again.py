"""A finished search solved for other limits, from what the store holds: no model, nothing measured, no torch.

The plan that comes out is predicted, not proven: it is kept as such, can be shown and applied, and is proven where a search for
the same limits comes to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoquant.errors import PlanError
from autoquant.records import LayerChoice, Plan
from autoquant.solver.limits import Limits
from autoquant.solver.planning import PlanContext, check_memory, context_of, least, make_plan, make_problem, plan_of
from autoquant.solver.solve import Picks, Problem, smallest
from autoquant.study.study import Study

AROUND = (0.25, 0.5, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Solved:
    """What came out.

    Attributes:
        plan: The fastest (or smallest) one within the limits, as predicted.
        proven: It had been proven before.
        around: `plan`, and those for less and for more loss than the limits are expected to allow, the most exact first. They
            are not kept.
    """

    plan: Plan
    proven: bool
    around: tuple[Plan, ...]


def solve_again(study: Study, limits: Limits, around: Sequence[float] = ()) -> Solved:
    """Solve a study's additive model for other limits, and keep the plan.

    Args:
        around: Solve also for these multiples of the loss that the limits are expected to allow.

    Raises:
        PlanError: The study has no model to solve yet, or no plan is predicted to be within the limits.
    """
    options, context, logarithmic = _problem_of(study)
    known = {plan.plan_id: plan for plan in study.plans()}
    proofs = study.proofs()
    allowed = limits.expected_loss(known, proofs, logarithmic=logarithmic)
    check_memory(options, context, limits.max_memory_bytes)
    problem = make_problem(options, context.workload, context.bound.groups)
    picks = _solve(problem, context, limits, allowed)
    if picks is None:
        raise PlanError(_infeasible(options, problem, context, limits, allowed))
    found = plan_of(options, picks, f"solved: {limits}", "solved", context)
    plan = known.get(found.plan_id, found)
    if plan is found:
        study.store.put_plan(plan)
    further = [_solve(problem, context, limits, allowed * multiple) for multiple in around] if allowed else []
    others = dict.fromkeys(each for each in further if each not in (None, picks))
    plans = [plan, *(_unexplained(options, each, context) for each in others if each)]
    return Solved(plan, plan.plan_id in proofs, tuple(sorted(plans, key=lambda plan: plan.prediction.loss)))


def _problem_of(study: Study) -> tuple[list[list[LayerChoice]], PlanContext, bool]:
    """The options, the context, and whether losses are log-likelihoods."""
    by_name, about = study.store.options_and_about(study.study_id)
    if by_name is None or not about:
        raise PlanError(
            f"study {study.study_id} keeps nothing to solve: it has not come so far, or was made by an older autoquant; run"
            " its search again, which measures nothing twice"
        )
    facts = study.facts
    context = context_of(about, study_id=study.study_id, model_hash=facts.model_hash, workload=facts.workload)
    return list(by_name.values()), context, bool(about["logarithmic"])


def _unexplained(options: Sequence[Sequence[LayerChoice]], picks: Picks, context: PlanContext) -> Plan:
    return make_plan([layer[i] for layer, i in zip(options, picks, strict=True)], "around", "solved", context)


def _solve(problem: Problem, context: PlanContext, limits: Limits, allowed: float | None) -> Picks | None:
    summed = None if allowed is None else context.loss_map.summed(allowed)
    return least(
        problem,
        context,
        limits.minimize,
        max_loss=None if summed == math.inf else summed,
        max_memory_bytes=limits.max_memory_bytes,
    )


def _infeasible(
    options: Sequence[Sequence[LayerChoice]],
    problem: Problem,
    context: PlanContext,
    limits: Limits,
    allowed: float | None,
) -> str:
    """Why no plan is within the limits, and what would have to give."""
    picks = smallest(problem, max_loss=None if allowed is None else context.loss_map.summed(allowed))
    if picks is None:
        return (
            f"no plan is predicted to be the {limits}: the constraints of this search cost more quality; allow more, or"
            " search with fewer of --keep, --pin and --fusable"
        )
    least_bytes = context.other_bytes + sum(layer[i].memory_bytes for layer, i in zip(options, picks, strict=True))
    return (
        f"no plan is predicted to be the {limits}: within the limit of quality the smallest takes {least_bytes:,} bytes;"
        " allow that with --max-memory, or a larger increase or divergence"
    )
