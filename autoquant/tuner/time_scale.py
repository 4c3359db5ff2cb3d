"""Predict times of whole models from those of linears, with factors learnt from proven plans.

Inside a compiled model a linear is not as fast as on its own: neighbours are fused into it, caches
are shared, calls cost. The model of a phase's time is
`rest + sum over layers of factor[candidate] * isolated time`, with one factor for each candidate.
Uniform plans determine the factors and the rest only up to a common part. So of all fits the one
whose factors are nearest to 1 is taken (ridge regression towards 1, with bounds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_high

import numpy as np
from scipy.optimize import lsq_linear

from autoquant.candidates import timed_as
from autoquant.records import LayerChoice, Plan, Proof, Site, request_time, route_kernel
from autoquant.solver.planning import PlanContext, predict
from autoquant.solver.space import SearchSpace

_STRENGTH = 0.05
_LOWEST, _HIGHEST = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class TimeScale:
    """Turns isolated times of linears into times of the whole model.

    A candidate that no proven plan used gets the median of its phase's factors, or 1 without any.

    Attributes:
        rest_ms: Each phase's time outside its linears.
        factors: By (phase, candidate).
        original_ms: Time of each phase of the unquantized model, to which all others are scaled.
    """

    rest_ms: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    original_ms: Mapping[str, float] = field(default_factory=dict)

    def factor(self, phase: str, candidate: str) -> float:
        """Return what an isolated time is multiplied by."""
        known = sorted(factor for (of, _), factor in self.factors.items() if of == phase)
        return self.factors.get((phase, candidate), known[len(known) // 2] if known else 1.0)

    def choice(self, choice: LayerChoice, site: Site) -> LayerChoice:
        """Return the choice with the latencies expected inside the model."""
        latency = {
            phase: us * self.factor(phase, candidate_of(choice, site, phase))
            for phase, us in choice.latency_us.items()
        }
        return replace(choice, latency_us=latency)

    def within(self, context: PlanContext) -> PlanContext:
        """Return the context with the time of a request outside its linears."""
        calls = context.workload.calls()
        original_ms = request_time(self.original_ms, calls) if self.original_ms else None
        return replace(
            context, rest_ms=request_time(self.rest_ms, calls), original_request_ms=original_ms
        )

    def predicted(self, plan: Plan, sites: Sequence[Site], context: PlanContext) -> Plan:
        """Return the plan with its request time predicted; its layers keep isolated times."""
        by_name = {site.name: site for site in sites}
        choices = [self.choice(layer, by_name[layer.name]) for layer in plan.layers]
        return replace(plan, prediction=predict(choices, self.within(context)))

    def space(self, space: SearchSpace, sites: Sequence[Site]) -> SearchSpace:
        """Return the space in whole-model time.

        There the solver decides which layers are computed as one, so plans are not joined further.
        """
        options = [
            [self.choice(choice, site) for choice in layer]
            for layer, site in zip(space.options, sites, strict=True)
        ]
        return replace(
            space, options=options, context=replace(self.within(space.context), fusion=None)
        )


def candidate_of(choice: LayerChoice, site: Site, phase: str) -> str:
    """Return the candidate that does most of the layer's work in a phase."""
    uses = [use for use in site.uses if use.phase == phase]
    m = max(uses, key=lambda use: use.m * use.calls).m
    return f"{timed_as(choice.format)}/{route_kernel(choice.route, m)}"


def fit_time_scale(
    plans: Sequence[Plan], proofs: Mapping[str, Proof], sites: Sequence[Site]
) -> TimeScale:
    """Fit every phase on plans whose latencies are the isolated ones."""
    by_name = {site.name: site for site in sites}
    proven = [plan for plan in plans if plan.plan_id in proofs]
    phases = dict.fromkeys(use.phase for site in sites for use in site.uses)
    rest: dict[str, float] = {}
    factors: dict[tuple[str, str], float] = {}
    for phase in phases:
        isolated = [_isolated_ms(plan, by_name, phase) for plan in proven]
        measured = [_drift_free_ms(proofs, plan.plan_id, phase) for plan in proven]
        rest[phase], found = _fit_phase(isolated, measured)
        factors |= {(phase, candidate): factor for candidate, factor in found.items()}
    return TimeScale(
        rest, factors, {phase: _original_ms(proofs, phase) for phase in phases} if proven else {}
    )


def _isolated_ms(plan: Plan, sites: Mapping[str, Site], phase: str) -> dict[str, float]:
    """Return isolated milliseconds by candidate in one run of the phase."""
    sums: dict[str, float] = {}
    for layer in plan.layers:
        if phase in layer.latency_us:
            candidate = candidate_of(layer, sites[layer.name], phase)
            sums[candidate] = sums.get(candidate, 0.0) + layer.latency_us[phase] / 1e3
    return sums


def _drift_free_ms(proofs: Mapping[str, Proof], plan_id: str, phase: str) -> float:
    """Return the plan's time, without the machine's drift between proofs.

    The unquantized model was timed in turn with each plan; the ratio is applied to its median.
    """
    proof = proofs[plan_id]
    return proof.phase_ms[phase] / proof.original_phase_ms[phase] * _original_ms(proofs, phase)


def _original_ms(proofs: Mapping[str, Proof], phase: str) -> float:
    """Return the median of the unquantized model's times."""
    return median_high(proof.original_phase_ms[phase] for proof in proofs.values())


def _fit_phase(
    isolated: Sequence[Mapping[str, float]], measured: Sequence[float]
) -> tuple[float, dict[str, float]]:
    candidates = list(dict.fromkeys(name for sums in isolated for name in sums))
    scale = float(np.median(measured))
    # One equation for each proven plan: rest + sum of factor * isolated = measured.
    rows = []
    for sums in isolated:
        times = [sums.get(name, 0.0) / scale for name in candidates]
        rows.append([1.0, *times])
    # And a weak one for each candidate, which pulls its factor towards 1.
    pull = [
        [0.0, *(_STRENGTH if i == j else 0.0 for j in range(len(candidates)))]
        for i in range(len(candidates))
    ]
    targets = [*(value / scale for value in measured), *([_STRENGTH] * len(candidates))]
    lowest = [0.0, *([_LOWEST] * len(candidates))]
    highest = [np.inf, *([_HIGHEST] * len(candidates))]
    solution = lsq_linear(
        np.asarray([*rows, *pull]), np.asarray(targets), bounds=(lowest, highest)
    ).x
    return float(solution[0]) * scale, {
        name: float(x) for name, x in zip(candidates, solution[1:], strict=True)
    }
