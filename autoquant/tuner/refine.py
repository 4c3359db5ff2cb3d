"""Refinement: Optuna proposes plans around the front, each proven like any other, until the time is up.

The additive model may misjudge what layers cost together. A trial scales the scores of each kind of layer (all query
projections, all down projections, ...) and of the depth of the model, solves for a budget between those of the front, and
proves the plan that comes out; the sampler learns which scalings and budgets gave plans that pay. The study is Optuna's own,
kept in the same database, and starts from the plans already proven.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoquant.records import LayerChoice, Plan, Proof
from autoquant.tuner.planning import PlanContext, explain, make_plan, make_problem, with_multipliers
from autoquant.tuner.solve import fastest

if TYPE_CHECKING:
    import optuna

_LOW, _HIGH = 0.25, 4.0
_FAILED_TRIALS_IN_A_ROW = 8


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
) -> Iterator[tuple[Plan, Callable[[Proof | None], None]]]:
    """New plans, each with a function that takes its proof (None: it could not be proven) before the next is asked for.

    Args:
        storage_url: SQLAlchemy URL of the store.
        known: Plans already proven, by id: what the sampler starts from, and what is not proposed again.

    Ends when trials keep giving plans that are known.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    losses = [_summed(plan) for plan, _ in known.values() if _summed(plan) > 0]
    if not losses:
        return
    study = _open(storage_url, context.study_id, seed)
    _warm_start(study, known, _space(options, losses))
    seen = set(known)
    repeats = 0
    while repeats < _FAILED_TRIALS_IN_A_ROW:
        trial = study.ask()
        plan = _propose(trial, options, context, losses, max_memory_bytes)
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
                study.tell(trial, _objectives(proof))

        yield plan, tell


def _summed(plan: Plan) -> float:
    """The layers' losses added up: what the solver has a budget for."""
    return sum(layer.loss for layer in plan.layers)


def _open(storage_url: str, study_id: str, seed: int) -> optuna.Study:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features of the sampler
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4)
        return optuna.create_study(
            study_name=f"autoquant-{study_id}",
            storage=optuna.storages.RDBStorage(storage_url),
            directions=["minimize", "minimize"],
            sampler=sampler,
            load_if_exists=True,
        )


def _objectives(proof: Proof) -> tuple[float, float]:
    """Request time against the unquantized model, and the quality that the limit is checked on (never the report part)."""
    return proof.request_ms / proof.original_request_ms, proof.selection_increase.value


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


def _warm_start(study: optuna.Study, known: Mapping[str, tuple[Plan, Proof]], space: Mapping[str, Any]) -> None:
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
                values=list(_objectives(proof)),
                user_attrs={"plan_id": plan.plan_id},
            )
        )


def _propose(
    trial: optuna.Trial,
    options: Sequence[Sequence[LayerChoice]],
    context: PlanContext,
    losses: Sequence[float],
    max_memory_bytes: int | None,
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
    problem = make_problem(with_multipliers(options, multiplier), context.workload)
    budget = None if max_memory_bytes is None else max_memory_bytes - context.other_bytes
    picks = fastest(problem, max_loss=values["loss budget"], max_memory=budget)
    if picks is None:
        return None
    layers = [
        replace(layer[i], reason=explain(layer, i, context.workload)) for layer, i in zip(options, picks, strict=True)
    ]
    return make_plan(layers, f"refined {trial.number}", "refined", context)
