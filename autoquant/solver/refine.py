"""Refinement: Optuna proposes plans around the front, each proven like any other, until the time is up.

The additive model may misjudge what layers cost together. A trial scales the scores of each kind of layer (all query
projections, all down projections, ...) and of the depth of the model, solves for a budget between those of the front, and
proves the plan that comes out; the sampler learns which scalings and budgets gave plans that pay. The study is Optuna's own,
kept in the same database, and starts from the plans already proven. It ends when the front does not grow any more: its
hypervolume by no more than 0.5 % over 12 further plans.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy import inspect

from autoquant.records import LayerChoice, Objective, Plan, Proof
from autoquant.solver.hypervolume import Growth
from autoquant.solver.planning import PlanContext, least, make_problem, plan_of, with_multipliers
from autoquant.store import Store

if TYPE_CHECKING:
    import optuna

_LOW, _HIGH = 0.25, 4.0
_FAILED_TRIALS_IN_A_ROW = 8
PATIENCE, LEAST_GROWTH = 12, 0.005
_LIMITS_THAT_COUNT = 4.0
_BELOW_LIMIT, _ABOVE_LIMIT = 16.0, 2.0


def layer_kind(name: str) -> str:
    """What a layer is called without its numbers: `model.layers.3.mlp.up_proj` is of the kind `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def proposals(
    options: Sequence[Sequence[LayerChoice]],
    context: PlanContext,
    *,
    storage_url: str,
    seed: int,
    known: Mapping[str, tuple[Plan, Proof]],
    max_memory_bytes: int | None,
    minimize: Objective = "time",
    allowed: float | None = None,
) -> Iterator[tuple[Plan, Callable[[Proof | None], None]]]:
    """New plans, each with a function that takes its proof (None: it could not be proven) before the next is asked for.

    Args:
        storage_url: SQLAlchemy URL of the store.
        known: Plans already proven, by id: what the sampler starts from, and what is not proposed again.
        allowed: The predicted loss that the limits are expected to allow: budgets are from a sixteenth of it to twice it.

    Ends when trials keep giving plans that are known.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    losses = [_summed(plan) for plan, _ in known.values() if _summed(plan) > 0]
    if not losses:
        return
    if allowed is not None:
        limit = context.loss_map.summed(allowed)
        losses = [min(max(loss, limit / _BELOW_LIMIT), limit * _ABOVE_LIMIT) for loss in losses]
    study = _open(storage_url, _study_name(context.study_id, minimize), seed)
    _warm_start(study, known, _space(options, losses), minimize)
    seen = set(known)
    repeats = 0
    while repeats < _FAILED_TRIALS_IN_A_ROW:
        trial = study.ask()
        plan = _propose(trial, options, context, losses, max_memory_bytes, minimize)
        if plan is None or plan.plan_id in seen:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            repeats += 1
            continue
        repeats = 0
        seen.add(plan.plan_id)

        def tell(proof: Proof | None, trial: optuna.Trial = trial, plan: Plan = plan) -> None:
            trial.set_user_attr("plan_id", plan.plan_id)
            if proof is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, _objectives(proof, minimize))

        yield plan, tell


def growth_of(
    known: Mapping[str, tuple[Plan, Proof]], minimize: Objective, max_ppl_increase: float | None = None
) -> Growth:
    """The front before refinement. What counts of it costs less than the unquantized model, and is no worse in quality than the
    worst plan that was solved for, nor than four times the limit."""
    points = {plan_id: _objectives(proof, minimize) for plan_id, (_, proof) in known.items()}
    kinds = {plan_id: plan.kind for plan_id, (plan, _) in known.items()}
    originals = [points[plan_id][0] for plan_id, kind in kinds.items() if kind == "original"]
    solved = [points[plan_id][1] for plan_id, kind in kinds.items() if kind == "front"]
    worst = [max(solved, default=0.0), _LIMITS_THAT_COUNT * (max_ppl_increase or math.inf)]
    reference = (max(originals, default=1.0), min(worst) or 1.0)
    return Growth(list(points.values()), reference, PATIENCE, LEAST_GROWTH)


def point_of(proof: Proof | None, minimize: Objective) -> tuple[float, float] | None:
    """A proven plan as the growth counts it."""
    return None if proof is None else _objectives(proof, minimize)


def _summed(plan: Plan) -> float:
    """The layers' losses added up: what the solver has a budget for."""
    return sum(layer.loss for layer in plan.layers)


def _open(storage_url: str, study_name: str, seed: int) -> optuna.Study:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features of the sampler
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4)
        return optuna.create_study(
            study_name=study_name,
            storage=optuna.storages.RDBStorage(storage_url),
            directions=["minimize", "minimize"],
            sampler=sampler,
            load_if_exists=True,
        )


def forget(store: Store, study_id: str) -> int | None:
    """Delete what Optuna keeps of a study, whatever was minimized: how many trials that was, or None where there is nothing."""
    if not inspect(store.engine).has_table("studies"):  # looked for first: Optuna would make its tables to look
        return None
    import optuna

    storage = optuna.storages.RDBStorage(store.engine.url.render_as_string(hide_password=False))
    try:
        names = {_study_name(study_id, minimize) for minimize in get_args(Objective)}
        found = [
            study
            for study in optuna.get_all_study_summaries(storage, include_best_trial=False)
            if study.study_name in names
        ]
        for study in found:
            optuna.delete_study(study_name=study.study_name, storage=storage)
        return sum(int(study.n_trials) for study in found) if found else None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _study_name(study_id: str, minimize: Objective) -> str:
    """Trials of one objective are no lesson for the other."""
    return f"autoquant-{study_id}{'' if minimize == 'time' else f'-{minimize}'}"


def _objectives(proof: Proof, minimize: Objective) -> tuple[float, float]:
    """Request time against the unquantized model, or bytes; and the quality that the limit is checked on (never the report
    part)."""
    cost = proof.request_ms / proof.original_request_ms if minimize == "time" else float(proof.memory_bytes)
    return cost, proof.selection_increase.value


def _space(options: Sequence[Sequence[LayerChoice]], losses: Sequence[float]) -> dict[str, Any]:
    import optuna

    scale = optuna.distributions.FloatDistribution(_LOW, _HIGH, log=True)
    kinds = dict.fromkeys(layer_kind(layer[0].name) for layer in options)
    names = {f"scale {kind}": scale for kind in kinds} | {"scale with depth": scale}
    return names | {
        "loss budget": optuna.distributions.FloatDistribution(
            min(losses), max(max(losses), min(losses) * 1.01), log=True
        )
    }


def _warm_start(
    study: optuna.Study, known: Mapping[str, tuple[Plan, Proof]], space: Mapping[str, Any], minimize: Objective
) -> None:
    """Tell the study of the plans that the exact front gave: all scales 1, the budget being their loss."""
    import optuna

    told = {trial.user_attrs.get("plan_id") for trial in study.get_trials(deepcopy=False)}
    for plan, proof in known.values():
        if plan.kind != "front" or plan.plan_id in told or _summed(plan) <= 0:
            continue
        budget = space["loss budget"]
        parameters = dict.fromkeys(space, 1.0) | {"loss budget": min(max(_summed(plan), budget.low), budget.high)}
        study.add_trial(
            optuna.trial.create_trial(
                params=parameters,
                distributions=dict(space),
                values=list(_objectives(proof, minimize)),
                user_attrs={"plan_id": plan.plan_id},
            )
        )


def _propose(
    trial: optuna.Trial,
    options: Sequence[Sequence[LayerChoice]],
    context: PlanContext,
    losses: Sequence[float],
    max_memory_bytes: int | None,
    minimize: Objective,
) -> Plan | None:
    values = {
        name: trial.suggest_float(name, space.low, space.high, log=True)
        for name, space in _space(options, losses).items()
    }
    last = max(len(options) - 1, 1)
    multiplier = {
        layer[0].name: values[f"scale {layer_kind(layer[0].name)}"]
        * math.exp(math.log(values["scale with depth"]) * (2 * position / last - 1))
        for position, layer in enumerate(options)
    }
    problem = make_problem(with_multipliers(options, multiplier), context.workload, context.bound.groups)
    picks = least(problem, context, minimize, max_loss=values["loss budget"], max_memory_bytes=max_memory_bytes)
    return None if picks is None else plan_of(options, picks, f"refined {trial.number}", "refined", context)
