"""A study as the user sees it: its plans, the front, the best plan within limits. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoquant.errors import PlanError
from autoquant.records import BASELINES, ORIGINAL_LABEL, Delivery, Objective, Plan, Proof
from autoquant.solver.alternatives import Alternatives, alternatives
from autoquant.solver.constraints import Constraints
from autoquant.solver.limits import Limits
from autoquant.solver.space import SearchSpace
from autoquant.solver.tied import beside
from autoquant.solver.ties import TIE_FRACTION, preferred, tied, ties
from autoquant.store import Store, StudyFacts
from autoquant.store.connect import open_existing
from autoquant.study.columns import (
    COLUMNS,
    accuracy_of,
    as_run_columns,
    measure_of,
    original_request_ms,
    plans_on_front,
    request_times,
)
from autoquant.study.delivered import refusal

if TYPE_CHECKING:
    import pandas as pd


class Study:
    """One search in a store.

    Args:
        store: The open store.
        study_id: Which study; None is the one last worked on.

    Raises:
        PlanError: There is no such study.
    """

    def __init__(self, store: Store, study_id: str | None = None) -> None:
        self.store = store
        self.study_id = store.study(study_id).study_id

    @classmethod
    def open(cls, address: str | os.PathLike[str], study_id: str | None = None) -> Study:
        """Open a study of an existing database (a path or an SQLAlchemy URL)."""
        return cls(open_existing(address), study_id)

    @property
    def facts(self) -> StudyFacts:
        """The study's model, device, workload, limits and recording."""
        return self.store.study(self.study_id)

    @property
    def calibration(self) -> Sequence[Sequence[int]] | None:
        """Token ids that weights of its plans are rounded for, for `autoquant.apply`; or None."""
        return self.facts.calibration

    @property
    def limits(self) -> Limits:
        """The limits of the last search."""
        return Limits.of(self.facts.limits)

    @property
    def constraints(self) -> Constraints:
        """The constraints that every plan but the unquantized model meets."""
        return Constraints.of_identity(self.facts.identity)

    def plans(self) -> list[Plan]:
        """Return every plan, proven or not."""
        return self.store.plans(self.study_id)

    def proofs(self) -> dict[str, Proof]:
        """Return what was measured, by plan id."""
        return self.store.proofs(self.study_id)

    def deliveries(self) -> dict[str, Delivery]:
        """Return the deliveries by plan id, in the order of trying."""
        return self.store.deliveries(self.study_id)

    def refused(self, limits: Limits | None = None) -> dict[str, str]:
        """Return why delivered plans are not recommended, by plan id.

        Args:
            limits: Those that the recommended plan keeps to; None means the search's.
        """
        limits = limits or self.limits
        instead = self._original_fits(limits)
        reasons = {
            plan_id: refusal(delivery, limits, instead=instead)
            for plan_id, delivery in self.deliveries().items()
        }
        return {plan_id: reason for plan_id, reason in reasons.items() if reason}

    def _original_fits(self, limits: Limits) -> bool:
        """Check whether the unquantized model is within the limits."""
        proofs = self.proofs()
        return any(
            limits.within(proofs[plan.plan_id], plan)
            for plan in self.plans()
            if plan.label == ORIGINAL_LABEL and plan.plan_id in proofs
        )

    def left_out(self) -> dict[str, str]:
        """Return why a baseline is missing, by kind of plan."""
        kinds = {f"no {kind} plan": kind for kind in BASELINES}
        there = {plan.kind for plan in self.plans()}
        references = self.store.references(self.study_id)
        return {
            kind: str(references[name]["reason"])
            for name, kind in kinds.items()
            if name in references and kind not in there
        }

    def stage_seconds(self) -> dict[str, float]:
        """Return what each stage took, over all runs; empty in studies of older versions."""
        kept = self.store.references(self.study_id).get("stages", {"seconds": {}})
        return dict(kept["seconds"])

    def stage_memory(self) -> dict[str, dict[str, int]]:
        """Return the most bytes that each stage took, by `host` and `device`, where known."""
        kept = self.store.references(self.study_id).get("stages", {})
        return {stage: dict(sizes) for stage, sizes in kept.get("memory_bytes", {}).items()}

    def refinement_ended(self) -> str | None:
        """Say why the last refinement ended, or None."""
        kept = self.store.references(self.study_id).get("refinement")
        if kept is None:
            return None
        return f"{kept['plans']} further plans proven; ended: {kept['ended']}"

    def plan(self, plan_id: str) -> Plan:
        """Return the plan whose id starts with `plan_id`."""
        return self.store.plan(plan_id)

    def best(
        self,
        max_ppl_increase: float | None = None,
        max_memory_bytes: int | None = None,
        minimize: Objective = "time",
        max_kl: float | None = None,
    ) -> Plan:
        """Return the fastest (or smallest) proven plan within the limits, see `Limits`.

        It meets the constraints of the search. Plans that are known to be unusable as a user runs
        them, or no faster there, are left out. Of request times within 1 % of one another the
        better quality wins; of such sizes the faster plan. A plan that ties with the winner, see
        `autoquant.solver.ties`, is preferred if it is clearly more exact.

        Raises:
            PlanError: No proven plan is within the limits.
        """
        return self.best_within(
            Limits(
                max_ppl_increase=max_ppl_increase,
                max_kl=max_kl,
                max_memory_bytes=max_memory_bytes,
                minimize=minimize,
                measure=self.limits.measure,
            )
        )

    def best_within(self, limits: Limits) -> Plan:
        """Return the best plan within limits, see `best`."""
        return self._best(limits, delivered=False)

    def _best(self, limits: Limits, *, delivered: bool) -> Plan:
        """Return the best plan, see `best`.

        Args:
            delivered: Consider only delivered plans and the unquantized model.
        """
        proofs = self.proofs()
        known, refused = self.deliveries(), self.refused(limits)
        plans = {plan.plan_id: plan for plan in self.plans()}
        constraints, minimize = self.constraints, limits.minimize
        within = [
            proof
            for proof in proofs.values()
            if limits.within(proof, plans[proof.plan_id])
            and constraints.allow(plans[proof.plan_id])
        ]
        if not within:
            raise PlanError(_nothing_within(proofs.values(), limits))
        if delivered:
            originals = {plan.plan_id for plan in plans.values() if plan.label == ORIGINAL_LABEL}
            usable = originals | known.keys()
            within = [proof for proof in within if proof.plan_id in usable]
        within = [proof for proof in within if proof.plan_id not in refused]
        if not within:
            raise PlanError(
                f"no plan within the limits can be used: {'; '.join(_refusals(refused))}"
            )
        times = request_times(proofs.values())
        costs = {
            proof.plan_id: times[proof.plan_id] if minimize == "time" else proof.memory_bytes
            for proof in within
        }
        least = min(costs.values())
        close = [proof for proof in within if costs[proof.plan_id] <= least * (1 + TIE_FRACTION)]

        def preference(proof: Proof) -> tuple[float, float]:
            quality, time = proof.selection_increase.high, times[proof.plan_id]
            return (quality, time) if minimize == "time" else (time, quality)

        best = min(close, key=preference)
        rivals = close if minimize == "memory" else within
        return plans[preferred(best, [proof for proof in rivals if tied(proof, best)]).plan_id]

    def best_of_search(self) -> Plan:
        """Return the best plan within the limits of the last search.

        Once a plan of the study was delivered, only delivered plans count, and the unquantized
        model.

        Raises:
            PlanError: No proven plan is within the limits.
        """
        return self._best(self.limits, delivered=bool(self.deliveries()))

    def candidate(self) -> Plan | None:
        """Return the best plan of the search, delivered or not; or None."""
        try:
            return self.best_within(self.limits)
        except PlanError:
            return None

    def recommended(self) -> Plan | None:
        """Return the best plan of the search, or None if no plan is within its limits."""
        try:
            return self.best_of_search()
        except PlanError:
            return None

    def space(self) -> SearchSpace | None:
        """Return what plans are solved from, or None if the store does not hold it (yet)."""
        options, about = self.store.options_and_about(self.study_id)
        if options is None or not about:
            return None
        facts = self.facts
        return SearchSpace.from_store(
            list(options.values()),
            about,
            study_id=self.study_id,
            model_hash=facts.model_hash,
            workload=facts.workload,
        )

    def alternatives(self, plan: Plan) -> Alternatives | None:
        """Return the alternatives of each layer of a plan, or None if they were not kept."""
        options = self.store.options(self.study_id)
        if options is None:
            return None
        workload = self.facts.workload
        layers = {layer.name: layer for layer in plan.layers}
        return {
            name: alternatives(
                layer, beside(options.get(name, []), layers.get(layer.tied)), workload
            )
            for name, layer in layers.items()
        }

    def pareto(self) -> pd.DataFrame:
        """Return every proven plan, fastest first, with the columns of `COLUMNS`.

        `on_front` marks plans that no other one beats in request time, perplexity and memory at
        once. `speedup` compares plan and unquantized model timed in turn, and `measured_request_ms`
        is the unquantized model's time divided by it. So a machine that gets slower during the
        search does not favour early plans. `predicted_request_ms` is scaled in the same way, by
        what the unquantized model takes now and took when the prediction was made. `measure` says
        what `perplexity_increase` is an increase of; a `divergence` is given itself.
        """
        import pandas as pd

        return pd.DataFrame(self.rows(), columns=list(COLUMNS))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `pareto` as plain dicts."""
        proofs = self.proofs()
        times = request_times(proofs.values())
        original_ms = original_request_ms(proofs.values())
        recommended = self.recommended()
        deliveries, refused = self.deliveries(), self.refused()
        tied_with = ties(proofs)
        front = plans_on_front(proofs, times)
        limits = self.limits
        rows = [
            {
                "plan_id": plan.plan_id,
                "label": plan.label,
                "kind": plan.kind,
                "predicted_request_ms": plan.prediction.request_ms_beside(original_ms),
                "measured_request_ms": times[plan.plan_id],
                "speedup": proof.original_request_ms / proof.request_ms,
                "perplexity": proof.perplexity,
                "perplexity_increase": proof.increase.value,
                "perplexity_increase_low": proof.increase.low,
                "perplexity_increase_high": proof.increase.high,
                "kl": proof.kl,
                "accuracy": accuracy_of(proof),
                "memory_bytes": proof.memory_bytes,
                "kv_cache": plan.kv_cache,
                "kv_cache_bytes": proof.kv_bytes,
                "on_front": plan.plan_id in front,
                "within_limits": limits.within(proof, plan),
                "recommended": recommended is not None and plan.plan_id == recommended.plan_id,
                "ties": " ".join(tied_with[plan.plan_id]),
                "measure": measure_of(proof, limits),
                **as_run_columns(deliveries.get(plan.plan_id)),
                "not_recommended": refused.get(plan.plan_id, ""),
            }
            for plan in self.plans()
            if (proof := proofs.get(plan.plan_id)) is not None
        ]
        return sorted(rows, key=lambda row: row["measured_request_ms"])


def _refusals(refused: Mapping[str, str]) -> list[str]:
    return [f"{plan_id} {reason}" for plan_id, reason in refused.items()]


def _nothing_within(proofs: Any, limits: Limits) -> str:
    proofs = list(proofs)
    if not proofs:
        return "no plan has been proven yet: run `autoquant search` to the end"
    parts = []
    if limits.max_ppl_increase is not None:
        measure = "an increase" if limits.measure == "increase" else "a divergence"
        parts.append(f"{measure} of at most {limits.max_ppl_increase:.3%}")
    if limits.max_kl is not None:
        known = [proof.selection_kl.high for proof in proofs if proof.selection_kl]
        least = (
            f" (least: {min(known):.3g})"
            if known
            else " (proven before it was measured: search again)"
        )
        parts.append(f"a divergence of at most {limits.max_kl:g}{least}")
    if limits.max_memory_bytes is not None:
        smallest = min(proof.memory_bytes for proof in proofs)
        parts.append(f"at most {limits.max_memory_bytes:,} bytes (smallest: {smallest})")
    if not parts:
        return "no proven plan meets --pin: loosen it and search again"
    return (
        f"no proven plan has {' and '.join(parts)}; allow more (the same `autoquant search` with"
        " another limit measures nothing anew) or take one that `autoquant pareto` lists"
    )
