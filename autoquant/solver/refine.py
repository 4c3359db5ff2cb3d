"""Refinement: Optuna proposes plans around the front until the time is up. No torch.

The additive model may misjudge what layers cost together. A trial scales the losses of each kind of
layer (all query projections, all down projections, ...) and those along the depth of the model. It
solves for a budget between those of the front, and the plan that comes out is proven. The sampler
learns which scalings and budgets give good plans. Its study is Optuna's own, kept in the same
database, and starts from the plans already proven. Refinement ends when the front stops growing:
when its hypervolume grew by no more than 0.5 % over 12 further plans.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy import inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError

from autoquant.errors import StoreError, first_line
from autoquant.files import one_at_a_time
from autoquant.records import Objective, Plan, Proof
from autoquant.solver.hypervolume import Growth
from autoquant.solver.planning import ProvenPlans
from autoquant.solver.space import SearchSpace
from autoquant.store import Store, postgres
from autoquant.store.addresses import shown_address
from autoquant.store.connect import folder_of
from autoquant.store.integrity import damaged, is_damage
from autoquant.store.refused import BUSY_TIMEOUT_S, refusal

if TYPE_CHECKING:
    import optuna

# By how much a trial may scale losses.
_LOW, _HIGH = 0.25, 4.0
# After so many trials in a row without a new plan, none is expected any more.
_FAILED_TRIALS_IN_A_ROW = 8
# See `autoquant.solver.hypervolume.Growth`.
PATIENCE, LEAST_GROWTH = 12, 0.005
# Plans that are worse than this multiple of the limit do not let the front grow.
_LIMITS_THAT_COUNT = 4.0
# Budgets are from the limit divided by the first of these to the limit times the second.
_BELOW_LIMIT, _ABOVE_LIMIT = 16.0, 2.0


def layer_kind(name: str) -> str:
    """Return a layer's name without its numbers, e.g. `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def proposals(
    space: SearchSpace,
    *,
    storage_url: str,
    seed: int,
    known: ProvenPlans,
    max_memory_bytes: int | None,
    minimize: Objective = "time",
    allowed: float | None = None,
) -> Iterator[tuple[Plan, Callable[[Proof | None], None]]]:
    """Yield new plans until trials keep giving plans that are known.

    With each plan comes a function that takes its proof (None: it could not be proven). A plan that
    is asked for before the last ones are proven is proposed without what they would have taught.

    Args:
        storage_url: SQLAlchemy URL of the store.
        known: Plans already proven: the sampler starts from them, and they are not yielded.
        allowed: The predicted loss that the limits are expected to allow. Budgets are from a
            sixteenth of it to twice it.
    """
    import optuna

    summed = [space.summed_loss(plan.layers) for plan, _ in known.values()]
    losses = [loss for loss in summed if loss > 0]
    if not losses:
        return
    if allowed is not None:
        limit = space.context.loss_map.summed(allowed)
        losses = [min(max(loss, limit / _BELOW_LIMIT), limit * _ABOVE_LIMIT) for loss in losses]
    with _its_tables_whole(storage_url):
        study = _open(storage_url, _study_name(space.context.study_id, minimize), seed)
        _warm_start(study, space, known, _distributions(space, losses), minimize)
    seen = set(known)
    repeats = 0
    while repeats < _FAILED_TRIALS_IN_A_ROW:
        with _its_answers(storage_url):
            trial = study.ask()
            plan = _propose(trial, space, losses, max_memory_bytes, minimize)
            if plan is None or plan.plan_id in seen:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                repeats += 1
                continue
        repeats = 0
        seen.add(plan.plan_id)

        def tell(proof: Proof | None, trial: optuna.Trial = trial, plan: Plan = plan) -> None:
            with _its_answers(storage_url):
                trial.set_user_attr("plan_id", plan.plan_id)
                if proof is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, _objectives(proof, minimize))

        yield plan, tell


def growth_of(
    known: ProvenPlans, minimize: Objective, max_ppl_increase: float | None = None
) -> Growth:
    """Return the front before refinement.

    Only plans count that cost less than the unquantized model, and that are no worse in quality
    than the worst plan that was solved for, nor than four times the limit.
    """
    points = {plan_id: _objectives(proof, minimize) for plan_id, (_, proof) in known.items()}
    kinds = {plan_id: plan.kind for plan_id, (plan, _) in known.items()}
    originals = [points[plan_id][0] for plan_id, kind in kinds.items() if kind == "original"]
    solved = [points[plan_id][1] for plan_id, kind in kinds.items() if kind == "front"]
    worst = [max(solved, default=0.0), _LIMITS_THAT_COUNT * (max_ppl_increase or math.inf)]
    # 0 if no plan of the front was proven: then every loss below 1 counts.
    reference = (max(originals, default=1.0), min(worst) or 1.0)
    return Growth(list(points.values()), reference, PATIENCE, LEAST_GROWTH)


def point_of(proof: Proof | None, minimize: Objective) -> tuple[float, float] | None:
    """Return a proven plan as `Growth` counts it; None if it could not be proven."""
    return None if proof is None else _objectives(proof, minimize)


def _open(storage_url: str, study_name: str, seed: int) -> optuna.Study:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental features of the sampler
        # Few random trials, as the study starts from the exact front.
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=4)
        return optuna.create_study(
            study_name=study_name,
            storage=_storage(storage_url),
            directions=["minimize", "minimize"],
            sampler=sampler,
            load_if_exists=True,
        )


def _storage(storage_url: str) -> optuna.storages.RDBStorage:
    """Open Optuna's storage, which makes its tables if there are none."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = make_url(storage_url)
    # Two that make the tables at once would collide.
    if url.get_backend_name() == postgres.BACKEND:
        with postgres.one_at_a_time(storage_url):
            return optuna.storages.RDBStorage(storage_url, engine_kwargs={"pool_pre_ping": True})
    if url.get_backend_name() != "sqlite" or not url.database:
        return optuna.storages.RDBStorage(storage_url)
    waiting = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    with one_at_a_time(folder_of(storage_url)):
        return optuna.storages.RDBStorage(storage_url, engine_kwargs=waiting)


def forget(store: Store, study_id: str) -> int | None:
    """Delete what Optuna keeps of a study, for every objective.

    Returns:
        The number of trials, or None if Optuna keeps nothing of it.
    """
    # Optuna would create its tables in order to look into them.
    if not inspect(store.engine).has_table("studies"):
        return None
    url = store.engine.url.render_as_string(hide_password=False)
    with _its_tables_whole(url):
        return _forget(_storage(url), study_id)


def _forget(storage: optuna.storages.RDBStorage, study_id: str) -> int | None:
    import optuna

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


@contextmanager
def _its_tables_whole(storage_url: str) -> Iterator[None]:
    """Inside, what Optuna stumbles over is damage of its tables, which it does not check.

    Raises:
        StoreError: It stumbled, or the database refused a statement.
    """
    try:
        with _its_answers(storage_url):
            yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        place = _shown(storage_url)
        raise damaged(place, f"what Optuna keeps there, {first_line(e)}") from e


@contextmanager
def _its_answers(storage_url: str) -> Iterator[None]:
    """Inside, the database may refuse what Optuna asks for.

    Raises:
        StoreError: It refused, or lacks a table of Optuna's.
    """
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except StorageInternalError as error:
        refused, place = error.__cause__, _shown(storage_url)
        if isinstance(refused, DatabaseError) and not is_damage(refused):
            raise StoreError(refusal(refused, place)) from error
        raise damaged(place, f"what Optuna keeps there, {first_line(refused or error)}") from error


def _shown(storage_url: str) -> str | None:
    """Return the file of a store, or the URL of another one without its password."""
    url = make_url(storage_url)
    return url.database if url.get_backend_name() == "sqlite" else shown_address(storage_url)


def _study_name(study_id: str, minimize: Objective) -> str:
    """Return the name of Optuna's study. Each objective has its own: trials do not carry over."""
    return f"autoquant-{study_id}{'' if minimize == 'time' else f'-{minimize}'}"


def _objectives(proof: Proof, minimize: Objective) -> tuple[float, float]:
    """Return (cost, loss): what is minimized, and the quality that limits are checked on.

    The loss is of the selection part, never the report part.
    """
    cost = float(proof.memory_bytes)
    if minimize == "time":
        cost = proof.request_ms / proof.original_request_ms
    return cost, proof.selection_increase.value


def _distributions(space: SearchSpace, losses: Sequence[float]) -> dict[str, Any]:
    import optuna

    scale = optuna.distributions.FloatDistribution(_LOW, _HIGH, log=True)
    kinds = dict.fromkeys(layer_kind(layer[0].name) for layer in space.options)
    distributions = dict.fromkeys((f"scale {kind}" for kind in kinds), scale)
    distributions["scale with depth"] = scale
    low = min(losses)
    high = max(max(losses), low * 1.01)  # a range, even of equal losses
    distributions["loss budget"] = optuna.distributions.FloatDistribution(low, high, log=True)
    return distributions


def _warm_start(
    study: optuna.Study,
    space: SearchSpace,
    known: ProvenPlans,
    distributions: Mapping[str, Any],
    minimize: Objective,
) -> None:
    """Add the plans of the exact front as trials: all scales 1, their loss as the budget."""
    import optuna

    known_ids = {trial.user_attrs.get("plan_id") for trial in study.get_trials(deepcopy=False)}
    for plan, proof in known.values():
        summed = space.summed_loss(plan.layers)
        if plan.kind != "front" or plan.plan_id in known_ids or summed <= 0:
            continue
        budget = distributions["loss budget"]
        parameters = dict.fromkeys(distributions, 1.0) | {
            "loss budget": min(max(summed, budget.low), budget.high)
        }
        study.add_trial(
            optuna.trial.create_trial(
                params=parameters,
                distributions=dict(distributions),
                values=list(_objectives(proof, minimize)),
                user_attrs={"plan_id": plan.plan_id},
            )
        )


def _propose(
    trial: optuna.Trial,
    space: SearchSpace,
    losses: Sequence[float],
    max_memory_bytes: int | None,
    minimize: Objective,
) -> Plan | None:
    """Solve for what the trial suggests; None if nothing is within the budgets."""
    values = {
        name: trial.suggest_float(name, of.low, of.high, log=True)
        for name, of in _distributions(space, losses).items()
    }
    # The losses of a layer are scaled by its kind and, exponentially, along the depth.
    last = max(len(space.options) - 1, 1)
    with_depth = math.log(values["scale with depth"])
    multiplier = {}
    for position, layer in enumerate(space.options):
        name = layer[0].name
        depth = 2 * position / last - 1  # from -1 to 1
        multiplier[name] = values[f"scale {layer_kind(name)}"] * math.exp(with_depth * depth)
    picks = space.scaled(multiplier).solve(
        minimize, max_summed_loss=values["loss budget"], max_memory_bytes=max_memory_bytes
    )
    return None if picks is None else space.plan(picks, f"refined {trial.number}", "refined")
