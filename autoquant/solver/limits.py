"""The limits of a search: what the recommended plan keeps to, and what it minimizes. No torch.

A limit of quality is compared with the upper end of the 95 % interval on the selection part, never
the report part. The interval of the increase is paired window by window. That of the divergence is
of its mean over windows; a divergence is paired by definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autoquant.records import ORIGINAL_LABEL, Objective, Plan, Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits that the recommended plan keeps to. None means no limit.

    Attributes:
        max_ppl_increase: Limit of what `measure` names, a fraction.
        max_kl: Mean divergence from the unquantized model, nats per token.
        max_memory_bytes: Of all parameters.
        measure: The increase of perplexity or of the user's own loss, or the divergence of outputs
            from those of the unquantized model.
    """

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    max_memory_bytes: int | None = None
    minimize: Objective = "time"
    measure: Literal["increase", "divergence"] = "increase"

    @classmethod
    def of(cls, limits: Mapping[str, Any]) -> Limits:
        """Return the limits that the store keeps of a study."""
        return cls(
            max_ppl_increase=limits.get("max_ppl_increase"),
            max_kl=limits.get("max_kl"),
            max_memory_bytes=limits.get("max_memory_bytes"),
            minimize=limits.get("minimize") or "time",
            measure=limits.get("measure") or "increase",
        )

    def as_object(self) -> dict[str, Any]:
        """Return the limits for the store and for programs.

        Limits that were added in later versions are left out if not set.
        """
        values: dict[str, Any] = {
            "max_ppl_increase": self.max_ppl_increase,
            "max_memory_bytes": self.max_memory_bytes,
        }
        values |= {} if self.max_kl is None else {"max_kl": self.max_kl}
        values |= {"minimize": self.minimize} if self.minimize != "time" else {}
        return values | ({"measure": self.measure} if self.measure != "increase" else {})

    def __str__(self) -> str:
        parts = []
        if self.max_ppl_increase is not None:
            parts.append(f"{self.measure} at most {100 * self.max_ppl_increase:g}%")
        if self.max_kl is not None:
            parts.append(f"KL at most {self.max_kl:g}")
        if self.max_memory_bytes is not None:
            parts.append(f"memory at most {self.max_memory_bytes:,} bytes")
        wanted = "fastest" if self.minimize == "time" else "smallest"
        return f"{wanted} with {' and '.join(parts) or 'no limits'}"

    def within(self, proof: Proof, plan: Plan) -> bool:
        """Check whether a proven plan keeps to all limits.

        The unquantized model keeps to every limit of quality.
        """
        if self.max_memory_bytes is not None and proof.memory_bytes > self.max_memory_bytes:
            return False
        if plan.label == ORIGINAL_LABEL:
            return True
        if (
            self.max_ppl_increase is not None
            and not proof.selection_increase.high <= self.max_ppl_increase
        ):
            return False  # NaN is not within
        return self.max_kl is None or (
            proof.selection_kl is not None and proof.selection_kl.high <= self.max_kl
        )

    def used(self, proof: Proof) -> float | None:
        """Return the share of the tightest limit of quality that a plan uses (1: just within).

        None if there is no such limit.
        """
        shares = []
        if self.max_ppl_increase:
            shares.append(proof.selection_increase.high / self.max_ppl_increase)
        if self.max_kl and proof.selection_kl is not None:
            shares.append(proof.selection_kl.high / self.max_kl)
        return max(filter(math.isfinite, shares), default=None)

    def allowed_loss(self, *, logarithmic: bool) -> float | None:
        """Return the loss that a plan may have, as it is measured; None if there is no such limit.

        Args:
            logarithmic: Losses are log-likelihoods, and the increase is one of perplexity.
        """
        if self.max_ppl_increase is None:
            return self.max_kl
        return math.log1p(self.max_ppl_increase) if logarithmic else self.max_ppl_increase
