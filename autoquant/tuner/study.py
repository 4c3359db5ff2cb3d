"""A study as the user sees it: its plans, the front, the best plan under a limit. Needs no model and no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import median_high
from typing import TYPE_CHECKING, Any

from autoquant.errors import PlanError
from autoquant.records import BASELINES, Measure, Objective, Plan, Proof
from autoquant.store import Store, StudyFacts, open_store
from autoquant.tuner.alternatives import Alternatives, alternatives
from autoquant.tuner.constraints import Constraints
from autoquant.tuner.limits import Limits
from autoquant.tuner.ties import TIE_FRACTION, preferred, tied, ties

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "plan_id",
    "label",
    "kind",
    "predicted_request_ms",
    "measured_request_ms",
    "speedup",
    "perplexity",
    "perplexity_increase",
    "perplexity_increase_low",
    "perplexity_increase_high",
    "kl",
    "memory_bytes",
    "on_front",
    "within_limits",
    "recommended",
    "ties",
    "measure",
)


class Study:
    """One search in a store.

    Args:
        store: The open store.
        study_id: Which study; the one last worked on where None.

    Raises:
        PlanError: There is no such study.
    """

    def __init__(self, store: Store, study_id: str | None = None) -> None:
        self.store = store
        self.study_id = store.study(study_id).study_id

    @classmethod
    def open(cls, address: str | os.PathLike[str], study_id: str | None = None) -> Study:
        """Open a study of an existing database (a path or an SQLAlchemy URL)."""
        return cls(open_store(address, create=False), study_id)

    @property
    def facts(self) -> StudyFacts:
        """What the store knows of the study: model, device, workload, limits, recording."""
        return self.store.study(self.study_id)

    @property
    def calibration(self) -> Sequence[Sequence[int]] | None:
        """Token ids that weights of its plans are rounded for, for `autoquant.apply`; None where there are none."""
        return self.facts.calibration

    @property
    def limits(self) -> Limits:
        """What the last search was asked for."""
        return Limits.of(self.facts.limits)

    @property
    def constraints(self) -> Constraints:
        """What every plan but the unquantized model meets."""
        return Constraints.of_identity(self.facts.identity)

    def plans(self) -> list[Plan]:
        """Every plan made, proven or not."""
        return self.store.plans(self.study_id)

    def proofs(self) -> dict[str, Proof]:
        """What was measured, by plan id."""
        return self.store.proofs(self.study_id)

    def left_out(self) -> dict[str, str]:
        """Why a plan of a kind that is always set beside the front is not there, by kind."""
        kinds = {f"no {kind} plan": kind for kind in BASELINES}
        there = {plan.kind for plan in self.plans()}
        references = self.store.references(self.study_id)
        return {
            kind: str(references[name]["reason"])
            for name, kind in kinds.items()
            if name in references and kind not in there
        }

    def refinement_ended(self) -> str | None:
        """Why the last refinement ended, or None where there was none."""
        kept = self.store.references(self.study_id).get("refinement")
        return None if kept is None else f"{kept['plans']} further plans proven; ended: {kept['ended']}"

    def plan(self, plan_id: str) -> Plan:
        """The plan whose id starts with `plan_id`."""
        return self.store.plan(plan_id)

    def best(
        self,
        max_ppl_increase: float | None = None,
        max_memory_bytes: int | None = None,
        minimize: Objective = "time",
        max_kl: float | None = None,
    ) -> Plan:
        """The fastest, or the smallest, proven plan within the limits, see `Limits`, that meets the constraints of the search.

        Of request times within 1 % of one another the better quality wins; of such sizes the faster plan. Among that plan and
        those that are a tie with it, see `autoquant.tuner.ties`, one that is clearly more exact is preferred.

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
        """As `best`."""
        proofs = self.proofs()
        plans = {plan.plan_id: plan for plan in self.plans()}
        constraints, minimize = self.constraints, limits.minimize
        within = [
            proof
            for proof in proofs.values()
            if limits.within(proof, plans[proof.plan_id]) and constraints.allow(plans[proof.plan_id])
        ]
        if not within:
            raise PlanError(_nothing_within(proofs.values(), limits))
        times = request_times(proofs.values())
        costs = {proof.plan_id: times[proof.plan_id] if minimize == "time" else proof.memory_bytes for proof in within}
        least = min(costs.values())
        close = [proof for proof in within if costs[proof.plan_id] <= least * (1 + TIE_FRACTION)]

        def preference(proof: Proof) -> tuple[float, float]:
            quality, time = proof.selection_increase.high, times[proof.plan_id]
            return (quality, time) if minimize == "time" else (time, quality)

        best = min(close, key=preference)
        rivals = close if minimize == "memory" else within
        return plans[preferred(best, [proof for proof in rivals if tied(proof, best)]).plan_id]

    def best_of_search(self) -> Plan:
        """The best plan by what the last search was asked for: its limits, and what it minimized.

        Raises:
            PlanError: No proven plan is within the limits.
        """
        return self.best_within(self.limits)

    def recommended(self) -> Plan | None:
        """The best plan of the search, or None where no plan is within its limits."""
        try:
            return self.best_of_search()
        except PlanError:
            return None

    def alternatives(self, plan: Plan) -> Alternatives | None:
        """What else each layer of a plan could have, by layer name; None where the search did not keep it."""
        options = self.store.options(self.study_id)
        if options is None:
            return None
        workload = self.facts.workload
        return {layer.name: alternatives(layer, options.get(layer.name, []), workload) for layer in plan.layers}

    def pareto(self) -> pd.DataFrame:
        """Every proven plan, fastest first, with the columns of `COLUMNS`.

        `on_front` marks plans that no other one beats or equals in request time, perplexity and memory at once (and beats
        in one). `measured_request_ms` is the unquantized model's time divided by `speedup`, and `speedup` compares plan and
        unquantized model timed in turn: so a machine that gets slower during the search does not favour early plans.
        `predicted_request_ms` is in the same units: as much longer or shorter as the unquantized model's time is than it was when
        the prediction was made. `measure` says what `perplexity_increase` is an increase of; `divergence` is that itself.
        """
        import pandas as pd

        return pd.DataFrame(self.rows(), columns=list(COLUMNS))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `pareto`, as plain dicts."""
        proofs = self.proofs()
        times = request_times(proofs.values())
        original_ms = _original_ms(proofs.values())
        recommended = self.recommended()
        tied_with = ties(proofs)
        front = _front(proofs, times)
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
                "memory_bytes": proof.memory_bytes,
                "on_front": plan.plan_id in front,
                "within_limits": limits.within(proof, plan),
                "recommended": recommended is not None and plan.plan_id == recommended.plan_id,
                "ties": " ".join(tied_with[plan.plan_id]),
                "measure": _measure(proof, limits),
            }
            for plan in self.plans()
            if (proof := proofs.get(plan.plan_id)) is not None
        ]
        return sorted(rows, key=lambda row: row["measured_request_ms"])


def request_times(proofs: Sequence[Proof] | Any) -> dict[str, float]:
    """Request milliseconds by plan id, freed of the machine's drift between proofs.

    Each proof timed its plan and the unquantized model in turn; the ratio is applied to the median of the unquantized
    model's times.
    """
    proofs = list(proofs)
    original_ms = _original_ms(proofs)
    return {proof.plan_id: proof.request_ms / proof.original_request_ms * original_ms for proof in proofs}


def _measure(proof: Proof, limits: Limits) -> Measure:
    if limits.measure == "divergence":
        return "divergence"
    return "loss" if proof.perplexity is None else "perplexity"


def _original_ms(proofs: Sequence[Proof] | Any) -> float:
    """The median of the unquantized model's request times; 0 where there are no proofs."""
    originals = [proof.original_request_ms for proof in proofs]
    return median_high(originals) if originals else 0.0


def _nothing_within(proofs: Any, limits: Limits) -> str:
    proofs = list(proofs)
    if not proofs:
        return "no plan has been proven yet: run `autoquant search` to the end"
    parts = []
    if limits.max_ppl_increase is not None:
        parts.append(
            f"{'an increase' if limits.measure == 'increase' else 'a divergence'} of at most {limits.max_ppl_increase:.3%}"
        )
    if limits.max_kl is not None:
        known = [proof.selection_kl.high for proof in proofs if proof.selection_kl]
        least = f" (least: {min(known):.3g})" if known else " (proven before it was measured: search again)"
        parts.append(f"a divergence of at most {limits.max_kl:g}{least}")
    if limits.max_memory_bytes is not None:
        smallest = min(proof.memory_bytes for proof in proofs)
        parts.append(f"at most {limits.max_memory_bytes:,} bytes (smallest: {smallest})")
    if not parts:
        return "no proven plan meets --pin: loosen it and search again"
    return (
        f"no proven plan has {' and '.join(parts)}; allow more (the same `autoquant search` with another limit measures"
        " nothing anew) or take one that `autoquant pareto` lists"
    )


def _front(proofs: Mapping[str, Proof], times: Mapping[str, float]) -> set[str]:
    points = {
        plan_id: (
            times[plan_id],
            proof.increase.value if proof.perplexity is None else proof.perplexity,
            proof.memory_bytes,
        )
        for plan_id, proof in proofs.items()
    }
    return {
        plan_id
        for plan_id, point in points.items()
        if not any(_dominates(other, point) for other_id, other in points.items() if other_id != plan_id)
    }


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b
