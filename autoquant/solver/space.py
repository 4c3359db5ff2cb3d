"""The search space: what every layer may get, with what all plans have in common. No torch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from autoquant.errors import PlanError
from autoquant.records import LayerChoice, Objective, Plan, PlanKind, Workload
from autoquant.solver.additivity import LossMap
from autoquant.solver.constraints import Bound, Scheme, scheme_of
from autoquant.solver.planning import PlanContext, explain, make_plan, request_ms
from autoquant.solver.solve import AdditiveProblem, Picks, fastest, smallest
from autoquant.solver.units import Unit, units_of

Options = Sequence[Sequence[LayerChoice]]
"""By layer, every layer with at least one."""


def complete(options: Options) -> list[list[LayerChoice]]:
    """Drop the options to compute layers as one that one of these layers lacks.

    A layer lacks an option that was not scored, or that constraints bar it from.
    """
    known = {(c.name, c.joined, c.format, c.route) for layer in options for c in layer}

    def for_all(c: LayerChoice) -> bool:
        return all((name, c.joined, c.format, c.route) in known for name in c.joined)

    return [list(filter(for_all, layer)) for layer in options]


@dataclass(frozen=True)
class SearchSpace:
    """The options of all layers, from which plans are solved.

    A solution has an option for each unit of layers, see `autoquant.solver.units`.

    Attributes:
        unquantized: The unquantized choice of each layer. It is not among a layer's options if a
            constraint bars it. Empty in a space that was read from the store.
        logarithmic: Losses are log-likelihoods, and the increase is one of perplexity.
        factors: By numerics, what predicted losses are multiplied by before they are solved for
            (see `autoquant.solver.loss_scale`). Options and plans keep the predicted ones.
        usual_factor: That of all other numerics.
    """

    options: Options
    context: PlanContext
    unquantized: Sequence[LayerChoice] = ()
    logarithmic: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)
    usual_factor: float = 1.0

    @cached_property
    def units(self) -> list[Unit]:
        """The layers that get the same choice."""
        return units_of(self.options)

    @cached_property
    def problem(self) -> AdditiveProblem:
        """The numbers to solve: milliseconds per request, loss and bytes of every unit's options.

        Options that compute layers as one are taken by all of these layers or by none.
        """
        numbers = [[self._numbers(option) for option in unit.options] for unit in self.units]
        return AdditiveProblem.build(numbers, self._joined(), self._same_scheme())

    def _numbers(self, choices: Sequence[LayerChoice]) -> tuple[float, float, float]:
        workload = self.context.workload
        return (
            sum(request_ms(choice, workload) for choice in choices),
            self.summed_loss(choices),
            float(sum(choice.memory_bytes for choice in choices)),
        )

    def summed_loss(self, choices: Sequence[LayerChoice]) -> float:
        """Return the sum of the layers' losses, in the units that budgets have."""
        return sum(
            self.factors.get(choice.numerics, self.usual_factor) * choice.loss for choice in choices
        )

    def plan_loss(self, plan: Plan) -> float:
        """Return the loss that a plan is expected to be measured with."""
        return self.context.loss_map.plan_loss(self.summed_loss(plan.layers))

    def budget(self, max_loss: float | None) -> float | None:
        """Return the summed loss of a plan whose loss is `max_loss`; None means no limit."""
        if max_loss is None:
            return None
        summed = self.context.loss_map.summed(max_loss)
        return summed if summed < math.inf else None

    def solve(
        self, minimize: Objective, *, max_summed_loss: float | None, max_memory_bytes: int | None
    ) -> Picks | None:
        """Return the fastest or smallest solution within the limits, or None.

        Args:
            max_summed_loss: Limit on the layers' summed losses, see `budget`.
            max_memory_bytes: Limit on the bytes of all parameters, searched or not.
        """
        allowed = None if max_memory_bytes is None else max_memory_bytes - self.context.other_bytes
        if minimize == "time":
            return fastest(self.problem, max_loss=max_summed_loss, max_memory=allowed)
        picks = smallest(self.problem, max_loss=max_summed_loss)
        fits = picks is None or allowed is None or self.problem.totals(picks)[2] <= allowed
        return picks if fits else None

    def chosen(self, picks: Picks) -> list[LayerChoice]:
        """Return the choice of each layer in a solution."""
        by_layer: dict[int, LayerChoice] = {}
        for unit, pick in zip(self.units, picks, strict=True):
            by_layer |= zip(unit.layers, unit.options[pick], strict=True)
        return [by_layer[position] for position in range(len(self.options))]

    def plan(self, picks: Picks, label: str, kind: PlanKind) -> Plan:
        """Make the plan of a solution, each layer with the reason for its option."""
        layers = [
            replace(choice, reason=explain(choice, layer, self.context))
            for choice, layer in zip(self.chosen(picks), self.options, strict=True)
        ]
        return make_plan(layers, label, kind, self.context)

    def memory_bytes(self, picks: Picks) -> int:
        """Return the bytes of all parameters in a solution."""
        return self.context.other_bytes + sum(c.memory_bytes for c in self.chosen(picks))

    def check_memory(
        self,
        max_memory_bytes: int | None,
        advice: str = "allow at least that with --max-memory",
    ) -> None:
        """Refuse a limit that no choice of formats can keep to.

        Args:
            advice: What would do.

        Raises:
            PlanError: The smallest of all plans is larger.
        """
        if max_memory_bytes is None:
            return
        picks = smallest(self.problem)
        assert picks is not None  # without a limit there is always a solution
        least_bytes = self.memory_bytes(picks)
        if least_bytes > max_memory_bytes:
            constrained = (
                ", or fewer of --keep, --pin and --for" if self.context.bound.reasons else ""
            )
            raise PlanError(
                f"no plan is as small as {max_memory_bytes:,} bytes: the smallest formats take"
                f" {least_bytes:,}; {advice}{constrained}"
            )

    def scaled(self, multiplier: Mapping[str, float]) -> SearchSpace:
        """Return the space with the losses of each layer scaled by its factor."""
        options = [
            [replace(c, loss=c.loss * multiplier.get(c.name, 1.0)) for c in layer]
            for layer in self.options
        ]
        return replace(self, options=options)

    def about(self) -> dict[str, Any]:
        """Return what the store keeps in addition to the options."""
        context = self.context
        return {
            "other_bytes": context.other_bytes,
            "rest_ms": context.rest_ms,
            "original_request_ms": context.original_request_ms,
            "dtype": context.dtype,
            "curvature": context.loss_map.curvature,
            "groups": [list(group) for group in context.bound.groups],
            "reasons": dict(context.bound.reasons),
            "logarithmic": self.logarithmic,
        }

    @classmethod
    def from_store(
        cls,
        options: Options,
        about: Mapping[str, Any],
        *,
        study_id: str,
        model_hash: str,
        workload: Workload,
    ) -> SearchSpace:
        """Restore a space from its options and the result of `about`."""
        context = PlanContext(
            study_id=study_id,
            model_hash=model_hash,
            dtype=about["dtype"],
            workload=workload,
            other_bytes=about["other_bytes"],
            rest_ms=about["rest_ms"],
            original_request_ms=about.get("original_request_ms"),
            loss_map=LossMap(about["curvature"]),
            bound=Bound(tuple(tuple(group) for group in about["groups"]), about["reasons"]),
        )
        return cls(options, context, logarithmic=bool(about["logarithmic"]))

    def _joined(self) -> list[list[tuple[int, int]]]:
        """Return, for each way to compute layers as one, its options as (unit, option)."""
        together: dict[Hashable, dict[tuple[int, int], None]] = {}
        for position, unit in enumerate(self.units):
            for index, option in enumerate(unit.options):
                for choice in option:
                    if choice.joined:
                        way = (choice.joined, choice.format, choice.route)
                        together.setdefault(way, {})[position, index] = None
        # Blocks of the same units join their layers in the same way.
        return [list(ways) for ways in dict.fromkeys(map(tuple, together.values()))]

    def _same_scheme(self) -> list[list[tuple[int, list[int]]]]:
        """Return, for each group and scheme, the options of each unit that have the scheme."""
        unit_of = {
            self.options[layer][0].name: position
            for position, unit in enumerate(self.units)
            for layer in unit.layers
        }
        groups = [
            dict.fromkeys(unit_of[name] for name in group) for group in self.context.bound.groups
        ]
        found: list[list[tuple[int, list[int]]]] = []
        for units in dict.fromkeys(map(tuple, groups)):
            options = [option for unit in units for option in self.units[unit].options]
            # Each once and in order, so that the same space gives the same problem.
            schemes = dict.fromkeys(scheme_of(option[0]) for option in options)
            # A unit without the scheme has no option here, so none of them may take it.
            found.extend([(unit, self._having(unit, each)) for unit in units] for each in schemes)
        return found

    def _having(self, unit: int, scheme: Scheme) -> list[int]:
        options = self.units[unit].options
        return [i for i, option in enumerate(options) if scheme_of(option[0]) == scheme]
