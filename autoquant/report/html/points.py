"""Proven plans as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant.records import Plan, Proof
from autoquant.report import units
from autoquant.report.front.geometry import Point, Row, make_front
from autoquant.report.tables.plans import short_ids
from autoquant.report.words import increase_words, measure_words
from autoquant.study.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPoint:
    """A proven plan with its point of the front.

    Attributes:
        index: The plan's place by request time, from 0.
        at: The plan's place in every drawing.
        quality: Perplexity, the user's own loss or output divergence.
        low: Lower end of its paired interval.
        high: Upper end of its paired interval.
        base: The same measure for the unquantized model.
    """

    index: int
    short_id: str
    plan: Plan
    proof: Proof
    at: Point
    quality: float
    low: float
    high: float
    base: float

    @property
    def row(self) -> Row:
        return self.at.row

    @property
    def number(self) -> int:
        """The number that the page shows, from 1."""
        return self.index + 1

    @property
    def request_ms(self) -> float:
        return self.at.request_ms

    @property
    def memory_bytes(self) -> int:
        return self.proof.memory_bytes

    @property
    def formats(self) -> Mapping[str, int]:
        """How many layers have which format."""
        return self.plan.formats()

    @property
    def drawable(self) -> bool:
        """Whether the point has finite numbers on both axes."""
        return self.at.drawable and math.isfinite(self.quality)

    @property
    def quality_text(self) -> str:
        return f"{measure_words(self.row).lower()} {units.digits(self.quality, 5)}"

    @property
    def increase_text(self) -> str:
        """The quality with its increase. A divergence is its own increase."""
        if self.row["measure"] == "divergence":
            return self.quality_text
        return f"{self.quality_text}, {increase_words(self.row)}"


def front_points(study: Study) -> list[PlanPoint]:
    """Return every proven plan, fastest first."""
    rows, proofs = study.rows(), study.proofs()
    plans = {plan.plan_id: plan for plan in study.plans()}
    short = short_ids([row["plan_id"] for row in rows])
    return [
        _plan_point(index, short[plan_id], plans[plan_id], proofs[plan_id], at)
        for index, at in enumerate(make_front(rows).points)
        for plan_id in [at.row["plan_id"]]
    ]


def _plan_point(index: int, short_id: str, plan: Plan, proof: Proof, at: Point) -> PlanPoint:
    row = at.row
    quality = proof.loss if row["perplexity"] is None else row["perplexity"]
    factor = 1 + row["perplexity_increase"]
    base = quality / factor if factor else math.nan
    low, high = (base * (1 + row[f"perplexity_increase_{end}"]) for end in ("low", "high"))
    if row["measure"] == "divergence":
        # A divergence is measured from the unquantized model, whose own is 0.
        base, low, high = 0.0, row["perplexity_increase_low"], row["perplexity_increase_high"]
    return PlanPoint(
        index=index,
        short_id=short_id,
        plan=plan,
        proof=proof,
        at=at,
        quality=quality,
        low=low,
        high=high,
        base=base,
    )
