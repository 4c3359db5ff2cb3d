"""Proven plans as points of the front: where they stand, what they are, and how they are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant.records import ORIGINAL_LABEL, Plan, Proof
from autoquant.report import units
from autoquant.report.front.scales import Row, drawable
from autoquant.report.tables.plans import short_ids
from autoquant.report.words import increase_words, measure_words
from autoquant.study.study import Study


@dataclass(frozen=True, slots=True)
class Family:
    """Plans of one look: `symbol` is plotly's, `glyph` the same as a character."""

    name: str
    symbol: str
    glyph: str
    colour: str


FAMILIES = {
    family.name: family
    for family in (
        Family("searched, dominated", "circle-open", "○", "var(--muted)"),
        Family("uniform, dominated", "diamond-open", "◇", "var(--muted)"),
        Family("searched, on the front", "circle", "●", "var(--c1)"),
        Family("uniform, on the front", "diamond", "◆", "var(--c3)"),
        Family("unquantized", "square", "■", "var(--c9)"),
        Family("recommended", "star", "★", "var(--c5)"),
    )
}
"""In the order in which they are drawn, the last on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A proven plan. `number` is its place by request time, from 1; `base` the quality of the unquantized model.

    `quality`, `low` and `high` are perplexity, the user's own loss or output divergence, with the ends of its paired interval.
    """

    index: int
    short_id: str
    plan: Plan
    proof: Proof
    row: Row
    request_ms: float
    quality: float
    low: float
    high: float
    base: float
    family: str
    quality_text: str
    increase_text: str

    @property
    def number(self) -> int:
        return self.index + 1

    @property
    def memory_bytes(self) -> int:
        return self.proof.memory_bytes

    @property
    def formats(self) -> Mapping[str, int]:
        """The plan's make-up."""
        return self.plan.formats()

    @property
    def drawable(self) -> bool:
        """Whether it has finite numbers on both axes."""
        return drawable(self.row) and math.isfinite(self.quality)


def front_points(study: Study) -> list[Point]:
    """Every proven plan, fastest first."""
    rows, proofs = study.rows(), study.proofs()
    plans = {plan.plan_id: plan for plan in study.plans()}
    short = short_ids([row["plan_id"] for row in rows])
    return [
        _point(index, short[row["plan_id"]], plans[row["plan_id"]], proofs[row["plan_id"]], row)
        for index, row in enumerate(rows)
    ]


def _point(index: int, short_id: str, plan: Plan, proof: Proof, row: Row) -> Point:
    quality = proof.loss if row["perplexity"] is None else row["perplexity"]
    factor = 1 + row["perplexity_increase"]
    base = quality / factor if factor else math.nan
    low, high = (base * (1 + row[f"perplexity_increase_{end}"]) for end in ("low", "high"))
    if row["measure"] == "divergence":  # from the unquantized model: that is its increase
        base, low, high = 0.0, row["perplexity_increase_low"], row["perplexity_increase_high"]
    text = f"{measure_words(row).lower()} {units.digits(quality, 5)}"
    return Point(
        index=index,
        short_id=short_id,
        plan=plan,
        proof=proof,
        row=row,
        request_ms=row["measured_request_ms"],
        quality=quality,
        low=low,
        high=high,
        base=base,
        family=_family(row),
        quality_text=text,
        increase_text=text if row["measure"] == "divergence" else f"{text}, {increase_words(row)}",
    )


def _family(row: Row) -> str:
    if row["recommended"]:
        return "recommended"
    if row["label"] == ORIGINAL_LABEL:
        return "unquantized"
    kind = "uniform" if row["kind"] == "uniform" else "searched"
    return f"{kind}, {'on the front' if row['on_front'] else 'dominated'}"
