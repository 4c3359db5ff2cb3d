"""What a model does in a request, and where it multiplies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from autoquant.errors import WorkloadError
from autoquant.records.numbers import Count, Positive, Share
from autoquant.records.timings import LinearShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One kind of forward pass.

    Attributes:
        tokens: Tokens per sequence in one call.
        calls: Calls in one request.
    """

    name: str
    tokens: Count
    calls: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model does in one request: phases at a batch size."""

    phases: tuple[Phase, ...]
    batch: Positive = 1

    @classmethod
    def parse(cls, text: str, batch: int = 1) -> Workload:
        """Read `prefill=TOKENS,decode=STEPS`. Either part may be left out.

        Raises:
            WorkloadError: The text does not follow that form, or a number is not positive.
        """
        advice = (
            f"cannot read workload {text!r}: write it as prefill=TOKENS,decode=STEPS, "
            "e.g. prefill=512,decode=128"
        )
        if batch < 1:
            raise WorkloadError(f"batch must be at least 1, not {batch}")
        counts: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if (
                name not in ("prefill", "decode")
                or name in counts
                or not re.fullmatch("[0-9]{1,9}", number)
            ):
                raise WorkloadError(advice)
            counts[name] = int(number)
        if not all(counts.values()):
            raise WorkloadError(advice)
        phases = []
        if "prefill" in counts:
            phases.append(Phase(name="prefill", tokens=counts["prefill"], calls=1))
        if "decode" in counts:
            phases.append(Phase(name="decode", tokens=1, calls=counts["decode"]))
        return cls(phases=tuple(phases), batch=batch)

    @classmethod
    def single(cls) -> Workload:
        """Return the workload of a module with sample inputs: one forward pass."""
        return cls(phases=(Phase(name="forward", tokens=0, calls=1),))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a sequence before the first new one. Decoding alone starts after one token."""
        return next((phase.tokens for phase in self.phases if phase.name == "prefill"), 1)

    @property
    def new_tokens(self) -> int:
        """Tokens that a request generates. A prompt alone generates one."""
        return next((phase.calls for phase in self.phases if phase.name == "decode"), 1)

    def calls(self) -> dict[str, int]:
        """Return the calls in one request by phase."""
        return {phase.name: phase.calls for phase in self.phases}

    def __str__(self) -> str:
        parts = []
        for phase in self.phases:
            count = phase.calls if phase.name == "decode" else phase.tokens
            parts.append(f"{phase.name}={count}")
        batch = f" batch={self.batch}" if self.batch != 1 else ""
        return ",".join(parts) + batch


def request_time(phase_times: Mapping[str, float], calls: Mapping[str, int]) -> float:
    """Return the time of one request, in the unit of its phases.

    It is the sum over phases of the calls times the time of one.
    """
    return sum(calls[phase] * time for phase, time in phase_times.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUse:
    """How one phase uses a linear.

    Attributes:
        m: Rows of the activation.
        calls: Calls in one run of the phase.
    """

    phase: str
    m: Positive
    calls: Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One weight that is multiplied as a linear, the weights of a layer's experts, or a table.

    Attributes:
        name: Module path, or parameter name if no module holds the weight alone.
        parameters: Parameter names that quantizing replaces. Linears that share a weight give
            more than one.
        kept: Parameter names of the same tensor that stay unquantized, such as an embedding tied
            to the head. Quantizing frees no memory then.
        siblings: Names of the sites that read the same input tensor, in order, with this one.
        experts: The matrices of `shape` in the parameter. Each expert that gets rows is one call.
        turned: The parameter of experts is `[experts, k, n]`.
        lookup: It is a table, of which `m` rows are looked up. Nothing is multiplied.
        tied: Of a table, the name of the site that multiplies with the same tensor, or "".
    """

    name: str
    parameters: tuple[str, ...]
    shape: LinearShape
    uses: tuple[SiteUse, ...]
    kept: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()
    experts: Positive = 1
    turned: bool = False
    lookup: bool = False
    tied: str = ""

    @property
    def weights(self) -> int:
        """How many numbers the weight has."""
        return self.experts * self.shape.n * self.shape.k


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A weight that is not searched, and why.

    Attributes:
        share: Fraction of the model's parameters, 0 to 1.
    """

    name: str
    numel: Count
    share: Share
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The sites of a model, and the fractions of the model that they cover (0 to 1).

    Attributes:
        tables: Embeddings that are searched, too.
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    weights_share: Share
    flops_share: Mapping[str, Share]
    parameter_bytes: Count
    tables: tuple[Site, ...] = ()

    @property
    def layers(self) -> tuple[Site, ...]:
        """All that plans choose for: linears, then tables."""
        return self.sites + self.tables
