"""The prove stage: plans really applied and measured, those first that are worth most.

Three plans are proven whatever the time budget: the unquantized model, the uniform plan that is
predicted best, and the best plan of the search. The others follow while there is time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.errors import CandidateError
from autoquant.events import Ending, Notice, StageFinished, StageStarted
from autoquant.records import Plan, Site
from autoquant.solver.aim import aimed, first_loss
from autoquant.solver.baselines import bits_plan, structural_plan
from autoquant.solver.front import front_plans
from autoquant.solver.limits import Limits
from autoquant.solver.loss_scale import fit_loss_scale
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import original_plan, uniform_plans
from autoquant.tuner.expected import LEAST_PROOFS
from autoquant.tuner.ledger import ProofLedger
from autoquant.tuner.time_scale import TimeScale, fit_time_scale

FRONT_PLANS = 3
"""This many plans of the front are proven, if there is time."""
LEAST_PLANS = 10
"""This many plans are proven in all, if there is time and there are as many."""
_MORE_ROOM = (
    f"the device has no room for that: use one with more memory, allow more with {LIMIT_VARIABLE},"
    " or name candidates with fewer bits"
)
_OWN_PLANS = 1
_LEAST_FURTHER = LEAST_PROOFS - 1
"""Proven beside the unquantized model whatever the time budget, one of them the search's own."""


@dataclass(frozen=True, slots=True)
class Referenced:
    """The search space after the references were proven.

    Attributes:
        space: Its latencies are those inside the whole model, its losses in units of the limits.
        plan_ids: Those of the references for which there was time: the unquantized model, the
            uniform plans, the heuristic.
        allowed_loss: The plan loss that the limits are expected to allow (None: no limit).
        room_bytes: What plans may take to fit the device; None for any size.
        owed: The heuristic, if its proof was begun but is not known yet.
    """

    space: SearchSpace
    plan_ids: frozenset[str]
    allowed_loss: float | None
    room_bytes: int | None = None
    owed: tuple[Plan, ...] = ()


def prove_references(
    space: SearchSpace, ledger: ProofLedger, sites: Sequence[Site], limits: Limits
) -> Referenced:
    """Prove the unquantized model, the uniform plans and the heuristic, and learn from them.

    Raises:
        PlanError: No plan is as small as the limit of memory.
        CandidateError: The unquantized model cannot be run.
    """
    if limits.max_memory_bytes == ledger.room_bytes is not None:
        space.check_memory(limits.max_memory_bytes, _MORE_ROOM)
    else:
        space.check_memory(limits.max_memory_bytes)
    ledger.listener(StageStarted("prove", 1 + FRONT_PLANS))
    original, scale = _prove_original(space, ledger, sites)
    _tell_what_fits(ledger)
    isolated = {plan.plan_id: plan for plan in uniform_plans(space)}
    uniform = [scale.predicted(plan, sites, space.context) for plan in isolated.values()]
    uniform = _with_room(uniform, ledger)
    losses = fit_loss_scale(space, limits, ledger.plans, ledger.proofs)
    # Only now is it known how many plans there are at least.
    ledger.listener(StageStarted("prove", 1 + len(uniform) + FRONT_PLANS))
    ordered = _by_worth(uniform, limits, losses.space(space), losses.allowed)
    ledger.ahead(*ordered, before=_OWN_PLANS)
    for number, plan in enumerate(ordered):
        if number == 0:
            ledger.prove(plan)
        else:
            ledger.prove_if_time(plan, before=_OWN_PLANS)
    scale = fit_time_scale([original, *isolated.values()], ledger.proofs, sites)
    scaled = scale.space(space, sites)
    ledger.put_space(scaled)
    losses = fit_loss_scale(space, limits, ledger.plans, ledger.proofs)
    scaled = losses.space(scaled)
    references = [original, *uniform]
    owed: tuple[Plan, ...] = ()
    heuristic = structural_plan(space, limits=limits, max_loss=losses.allowed)
    if heuristic is None:
        ledger.leave_out("heuristic", "no formats to choose between")
    elif not _with_room([heuristic], ledger):
        ledger.leave_out("heuristic", "it does not fit")
    else:
        predicted = scale.predicted(heuristic, sites, scaled.context)
        references.append(heuristic)
        if predicted.plan_id not in ledger.plans:
            ledger.ahead(predicted, before=_OWN_PLANS)
        if ledger.is_ahead(predicted):
            owed = (predicted,)
        else:
            ledger.prove_baseline("heuristic", predicted, before=_OWN_PLANS)
    ended = (each for each in references if ledger.has_ended(each) or ledger.is_ahead(each))
    plan_ids = frozenset(plan.plan_id for plan in ended)
    return Referenced(scaled, plan_ids, losses.allowed, ledger.room_bytes, owed)


def _with_room(plans: Sequence[Plan], ledger: ProofLedger) -> list[Plan]:
    """Return the plans that fit the device, and name the others."""
    room_bytes = ledger.room_bytes
    if room_bytes is None:
        return list(plans)
    fitting = [plan for plan in plans if plan.prediction.memory_bytes <= room_bytes]
    if others := [plan.label for plan in plans if plan not in fitting]:
        ledger.listener(Notice(f"not proven, since they do not fit: {', '.join(others)}"))
    return fitting


def _tell_what_fits(ledger: ProofLedger) -> None:
    """Tell how many plans the time budget is expected to have room for."""
    left_s, limit_s = ledger.budget.left_s(), ledger.budget.limit_s
    ledger.listener(Ending(max(left_s, ledger.least_s(_LEAST_FURTHER))))
    if not ledger.has_time(_LEAST_FURTHER):
        missing_s = ledger.least_s(_LEAST_FURTHER) - left_s
        text = (
            f"the time budget of {limit_s:.0f} s is too short for two plans beside the unquantized"
            f" model: they are proven all the same; {limit_s + missing_s:.0f} s are expected to do"
        )
        ledger.listener(Notice(text))
        return
    count = int((left_s - ledger.least_s(0)) / ledger.proof_s)
    ledger.listener(
        Notice(
            f"{left_s:.0f} s of {limit_s:.0f} are left, a proof takes about {ledger.proof_s:.0f}:"
            f" there is time for about {count} plans and for running the best as you will"
        )
    )


def _by_worth(
    plans: Sequence[Plan], limits: Limits, space: SearchSpace, allowed: float | None
) -> list[Plan]:
    """Return the plans that are predicted to be within the limits first; the cheapest first."""

    def rank(plan: Plan) -> tuple[bool, bool, float]:
        prediction, most_bytes = plan.prediction, limits.max_memory_bytes
        cost = prediction.request_ms if limits.minimize == "time" else prediction.memory_bytes
        too_large = most_bytes is not None and prediction.memory_bytes > most_bytes
        too_lossy = allowed is not None and space.plan_loss(plan) > allowed
        return too_large, too_lossy, cost

    return sorted(plans, key=rank)


def _prove_original(
    space: SearchSpace, ledger: ProofLedger, sites: Sequence[Site]
) -> tuple[Plan, TimeScale]:
    """Prove the unquantized model; its plan has isolated times, the ledger's whole-model time."""
    original = original_plan(space)
    ledger.prove(original)
    if original.plan_id not in ledger.proofs:
        reason = ledger.failures[original.plan_id]
        raise CandidateError(f"the unquantized model cannot be run: {reason}")
    scale = fit_time_scale([original], ledger.proofs, sites)
    ledger.put_plan(scale.predicted(original, sites, space.context))
    return original, scale


def prove_front(referenced: Referenced, ledger: ProofLedger, limits: Limits) -> None:
    """Prove the best plan within the limits, others nearer to the limit, and some of the front."""
    # The allocation by bits alone is one of the plans that are proven at least.
    count = max(FRONT_PLANS, LEAST_PLANS - len(referenced.plan_ids) - 1)
    only = not ledger.has_time(_OWN_PLANS + 1)
    loss = first_loss(referenced.space, limits, referenced.allowed_loss, only=only)
    referenced = replace(referenced, allowed_loss=loss)
    # The best plan within the limits comes first. Aiming starts from how it turned out.
    best = _new_plans(referenced, limits, 1)[:1]
    ledger.ahead(*best)
    for plan in referenced.owed:
        ledger.prove_baseline("heuristic", plan)
    for plan in best:
        ledger.prove(plan)
    count -= _prove_aimed(referenced, ledger, limits)
    # The whole front takes long to solve for, if there are many layers.
    new = _new_plans(referenced, limits, count + 1)[1:] if ledger.has_time() else []
    ledger.ahead(*new[: max(count - 1, 0)])
    for plan in new[: max(count - 1, 0)]:
        ledger.prove_if_time(plan)
    prove_bits(referenced.space, ledger)
    missing = max(0, LEAST_PLANS - len(ledger.proofs))  # bits alone may give nothing new
    for plan in new[max(count - 1, 0) :][:missing]:
        ledger.prove_if_time(plan)
    if not new and not ledger.has_time():
        ledger.left_out.append("the rest of the front")
    if ledger.left_out:
        names = ", ".join(dict.fromkeys(ledger.left_out))
        text = f"not proven, for want of time: {names}; a longer --time-budget proves them"
        ledger.listener(Notice(text))
    summary = f"{len(ledger.proofs)} plans proven, {len(ledger.failures)} failed"
    ledger.listener(StageFinished("prove", summary))


def _new_plans(referenced: Referenced, limits: Limits, count: int) -> list[Plan]:
    """Return at least so many plans of the front that are no references; fewer if it is short."""

    def front(points: int) -> list[Plan]:
        plans = front_plans(
            referenced.space,
            count=points,
            max_loss=referenced.allowed_loss,
            max_memory_bytes=limits.max_memory_bytes,
            minimize=limits.minimize,
            room_bytes=referenced.room_bytes,
        )
        return [plan for plan in plans if plan.plan_id not in referenced.plan_ids]

    # The best within the limits is known without the others, and is mostly no reference.
    return (front(1) if count == 1 else []) or front(count + len(referenced.plan_ids))


def _prove_aimed(referenced: Referenced, ledger: ProofLedger, limits: Limits) -> int:
    """Prove plans until one is at the limit of quality; return how many."""
    count = 0
    trials = aimed(
        referenced.space, limits=limits, guess=referenced.allowed_loss, known=ledger.proven()
    )
    for plan, tell in trials:
        if not ledger.has_time():
            ledger.listener(Notice("not aimed at the limit any further: the time budget is spent"))
            break
        tell(ledger.prove(plan))
        count += 1
    return count


def prove_bits(space: SearchSpace, ledger: ProofLedger) -> None:
    """Prove what an allocation by bits alone would choose in place of the recommended plan."""
    recommended = ledger.study.candidate()
    if recommended is None:
        ledger.leave_out("bits", "no plan is within the limits, whose bits it could have")
    elif recommended.kind != "bits":
        plan = bits_plan(space, recommended)
        if plan is None:
            ledger.leave_out("bits", "no formats to choose between")
        else:
            ledger.prove_baseline("bits", plan)
