"""Constraints on single layers: unquantized, of certain formats, or of the same format. No torch.

Patterns are globs (`fnmatch`) over the names of the recorder's sites, e.g. `lm_head`,
`*.down_proj`. Formats are given as for `--candidates`. A constraint narrows the choices of layers
before anything is scored; the solver and the refinement see what is left. vLLM needs one format for
what it computes as one (q, k, v; gate, up; all experts of a layer). Such layers are found by the
input that they share, as recorded, and the module that holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from autoquant.errors import ConstraintError
from autoquant.records import LayerChoice, Plan, Site

FUSABLE = ("vllm",)
"""The inference engines that layers can be kept fusable for."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Restricts the layers that one glob matches to the formats or candidates of another glob."""

    layers: str
    formats: str

    @classmethod
    def parse(cls, text: str) -> Pin:
        """Read `LAYERS=FORMATS`.

        Raises:
            ConstraintError: The text has another form.
        """
        layers, sign, formats = (part.strip() for part in text.partition("="))
        if not (layers and sign and formats):
            raise ConstraintError(
                f"--pin: cannot read {text!r}; write it as LAYERS=FORMATS, e.g."
                " '*.q_proj=int8-row*'"
            )
        return cls(layers, formats)

    def __str__(self) -> str:
        return f"{self.layers}={self.formats}"


@dataclass(frozen=True, slots=True)
class Constraints:
    """All constraints of a search.

    Attributes:
        keep: Globs of the layers that stay unquantized.
        fusable: One of `FUSABLE`: what the inference engine fuses gets one format.
    """

    keep: tuple[str, ...] = ()
    pins: tuple[Pin, ...] = ()
    fusable: str | None = None

    @classmethod
    def parse(
        cls, keep: Sequence[str] = (), pin: Sequence[str] = (), fusable: str | None = None
    ) -> Constraints:
        """Read the options of a search.

        Raises:
            ConstraintError: A pin cannot be read, or there is no such engine.
        """
        if fusable is not None and fusable not in FUSABLE:
            raise ConstraintError(
                f"--fusable: no engine {fusable!r}; choose one of {', '.join(FUSABLE)}"
            )
        return cls(tuple(dict.fromkeys(keep)), tuple(dict.fromkeys(map(Pin.parse, pin))), fusable)

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> Constraints:
        """Return the constraints that a study was searched under."""
        found = identity.get("constraints") or {}
        return cls.parse(found.get("keep", ()), found.get("pin", ()), found.get("fusable"))

    def as_object(self) -> dict[str, Any]:
        """Return those that are set, for JSON and for a study's identity."""
        values = {
            "keep": list(self.keep),
            "pin": list(map(str, self.pins)),
            "fusable": self.fusable,
        }
        return {name: value for name, value in values.items() if value}

    def kept(self, layer: str) -> str | None:
        """Return the first glob that keeps the layer unquantized, or None."""
        return next((glob for glob in self.keep if fnmatchcase(layer, glob)), None)

    def pinned(self, layer: str) -> list[Pin]:
        """Return the pins that the layer has to meet."""
        return [pin for pin in self.pins if fnmatchcase(layer, pin.layers)]

    def admits(self, layer: str, candidate: str, original: str) -> bool:
        """Check whether a layer may be computed by a candidate.

        Args:
            candidate: `FORMAT/KERNEL`.
            original: Format id of the unquantized weight.
        """
        if self.kept(layer) is not None and format_of(candidate) != original:
            return False
        return all(_matches(candidate, pin.formats) for pin in self.pinned(layer))

    def reason(self, layer: str) -> str:
        """Say what constrains the layer; empty if nothing does."""
        if (glob := self.kept(layer)) is not None:
            return f"kept unquantized by --keep {glob}"
        return " and ".join(f"pinned by --pin {pin}" for pin in self.pinned(layer))

    def allow(self, plan: Plan) -> bool:
        """Check whether a plan meets every pin. The unquantized model may not."""
        return all(
            self.admits(layer.name, f"{layer.format}/{step.kernel}", layer.format)
            for layer in plan.layers
            for step in layer.route
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """The layers of one model that constraints are about.

    Attributes:
        groups: Names of the layers that get the same format.
        reasons: By layer name, what constrains the layer.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def group_of(self, layer: str) -> tuple[str, ...]:
        """Return the layers that get the same format as this one, itself included; or nothing."""
        return next((group for group in self.groups if layer in group), ())

    def narrowed(self, options: Sequence[Sequence[LayerChoice]]) -> list[list[LayerChoice]]:
        """Drop from the layers of a group the formats that one of them cannot have.

        Raises:
            ConstraintError: The members of a group have no format in common.
        """
        by_name = {layer[0].name: list(layer) for layer in options}
        for group in self.groups:
            common = set.intersection(
                *({choice.format for choice in by_name[name]} for name in group)
            )
            if not common:
                raise ConstraintError(
                    f"{', '.join(group)} must get the same format, and no format can be used for"
                    " all of them: leave out --fusable, or loosen --pin and --keep"
                )
            for name in group:
                by_name[name] = [choice for choice in by_name[name] if choice.format in common]
        return [by_name[layer[0].name] for layer in options]


UNBOUND = Bound()
"""Nothing is constrained."""


def bind(
    constraints: Constraints, sites: Sequence[Site], candidates: Iterable[str], original: str
) -> Bound:
    """Find the layers that the constraints are about.

    Args:
        candidates: Ids of those of the search, the unquantized one among them.
        original: Its format's id.

    Raises:
        ConstraintError: A pattern matches nothing, or constraints contradict one another.
    """
    candidates = list(candidates)
    names = [site.name for site in sites]
    _check_patterns(constraints, names, candidates)
    reasons = {name: reason for name in names if (reason := constraints.reason(name))}
    for name in reasons:
        if not any(constraints.admits(name, candidate, original) for candidate in candidates):
            raise ConstraintError(
                f"{name} is {reasons[name]}: these contradict each other, leave out one of them"
            )
    groups = fused_groups(sites) if constraints.fusable else ()
    for group in groups:
        _check_group(group, constraints, candidates, original)
        for name in group:
            others = ", ".join(other.rpartition(".")[2] for other in group if other != name)
            same = f"same format as {others} (--fusable {constraints.fusable})"
            reasons[name] = "; ".join(filter(None, [reasons.get(name, ""), same]))
    return Bound(tuple(groups), reasons)


def fused_groups(sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """Find the layers that an engine computes as one.

    These are the layers of one module that read the same input, and all experts of a layer.
    """
    groups: dict[str, set[str]] = {}
    for site in sites:
        holder = site.name.rpartition(".")[0]
        alike = {name for name in site.siblings if name.rpartition(".")[0] == holder} | {site.name}
        expert = re.match(r"(.*\.experts)\.\d+\.", site.name)
        # Experts read tokens of their own, so only their names tell that they belong together.
        key = expert[1] if expert else "\n".join(sorted(alike))
        groups.setdefault(key, set()).update(alike)
    order = {site.name: number for number, site in enumerate(sites)}
    members = [
        sorted((name for name in group if name in order), key=order.__getitem__)
        for group in groups.values()
    ]
    return [tuple(group) for group in members if len(group) > 1]


def _check_patterns(
    constraints: Constraints, names: Sequence[str], candidates: Sequence[str]
) -> None:
    patterns = [("--keep", glob) for glob in constraints.keep] + [
        ("--pin", pin.layers) for pin in constraints.pins
    ]
    for option, glob in patterns:
        if not any(fnmatchcase(name, glob) for name in names):
            example = f"; layers are called like {names[0]}" if names else ""
            raise ConstraintError(
                f"{option}: no searched layer matches {glob!r}{example} (`autoquant show` lists"
                " them)"
            )
    for pin in constraints.pins:
        if not any(_matches(candidate, pin.formats) for candidate in candidates):
            raise ConstraintError(
                f"--pin {pin}: no candidate of this search matches {pin.formats!r}; `autoquant"
                " candidates` lists them, --candidates chooses them"
            )


def _check_group(
    group: Sequence[str], constraints: Constraints, candidates: Sequence[str], original: str
) -> None:
    allowed = [
        {format_of(c) for c in candidates if constraints.admits(name, c, original)}
        for name in group
    ]
    if not set.intersection(*allowed):
        reasons = {name: constraints.reason(name) for name in group}
        listed = "; ".join(f"{name} is {reason}" for name, reason in reasons.items() if reason)
        raise ConstraintError(
            f"{', '.join(group)} must get the same format (--fusable {constraints.fusable}), but"
            f" {listed}: give them one format"
        )


def format_of(candidate: str) -> str:
    """Return the format id of a candidate's id."""
    return candidate.rpartition("/")[0]


def _matches(candidate: str, glob: str) -> bool:
    """Match as `--candidates` does: the values, the format's id, or the candidate's id."""
    names = (candidate.partition("/")[0], format_of(candidate), candidate)
    return any(fnmatchcase(name, glob) for name in names)
