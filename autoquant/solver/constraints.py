"""Constraints on single layers: unquantized, of certain formats, or what an engine takes. No torch.

Patterns are globs (`fnmatch`) over the names of the recorder's sites, e.g. `lm_head`,
`*.down_proj`. Formats are given as for `--candidates`. A constraint narrows the choices of layers
before anything is scored; the solver and the refinement see what is left. An inference engine holds
some formats only, and needs one scheme for what it computes as one (q, k, v; gate, up): see
`autoquant.engines`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from autoquant.engines import engine as find_engine
from autoquant.errors import ConstraintError
from autoquant.records import LayerChoice, Plan, Site
from autoquant.solver.served import Served

Scheme = tuple[str, str]
"""A format's id, and how the activation is rounded."""


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
        engine: Name of the inference engine that plans are for, or None.
    """

    keep: tuple[str, ...] = ()
    pins: tuple[Pin, ...] = ()
    engine: str | None = None

    @classmethod
    def parse(
        cls, keep: Sequence[str] = (), pin: Sequence[str] = (), engine: str | None = None
    ) -> Constraints:
        """Read the options of a search.

        Raises:
            ConstraintError: A pin cannot be read, or there is no such engine.
        """
        if engine is not None:
            find_engine(engine)
        return cls(tuple(dict.fromkeys(keep)), tuple(dict.fromkeys(map(Pin.parse, pin))), engine)

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> Constraints:
        """Return the constraints that a study was searched under."""
        found = identity.get("constraints") or {}
        return cls.parse(found.get("keep", ()), found.get("pin", ()), found.get("engine"))

    def as_object(self) -> dict[str, Any]:
        """Return those that are set, for JSON and for a study's identity."""
        values = {
            "keep": list(self.keep),
            "pin": list(map(str, self.pins)),
            "engine": self.engine,
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
        groups: Names of the layers that get the same scheme.
        reasons: By layer name, what constrains the layer.
        refused: By layer and candidate, why the engine cannot compute the layer so.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def group_of(self, layer: str) -> tuple[str, ...]:
        """Return the layers that get the same scheme as this one, itself included; or nothing."""
        return next((group for group in self.groups if layer in group), ())

    def refuses(self, layer: str, candidate: str) -> str | None:
        """Return why the engine cannot compute a layer by a candidate, or None if it can."""
        return self.refused.get(layer, {}).get(candidate)

    def narrowed(self, options: Sequence[Sequence[LayerChoice]]) -> list[list[LayerChoice]]:
        """Drop from the layers of a group the schemes that one of them cannot have.

        Raises:
            ConstraintError: The members of a group have no scheme in common.
        """
        by_name = {layer[0].name: list(layer) for layer in options}
        for group in self.groups:
            common = set.intersection(*(set(map(scheme_of, by_name[name])) for name in group))
            if not common:
                raise ConstraintError(
                    f"{', '.join(group)} must get the same scheme, and none can be used for all of"
                    " them: leave out --for, or loosen --pin and --keep"
                )
            for name in group:
                by_name[name] = [each for each in by_name[name] if scheme_of(each) in common]
        return [by_name[layer[0].name] for layer in options]


UNBOUND = Bound()
"""Nothing is constrained."""


def scheme_of(choice: LayerChoice) -> tuple[str, str]:
    """Return what layers that an engine computes as one have in common: format and numerics."""
    return choice.format, choice.numerics


def bind(
    constraints: Constraints,
    sites: Sequence[Site],
    candidates: Mapping[str, str],
    original: str,
    served: Served | None = None,
) -> Bound:
    """Find the layers that the constraints are about.

    Args:
        candidates: How each one of the search rounds the activation, by its id. The unquantized one
            is among them.
        original: Its format's id.
        served: What the constraints' engine makes of the sites.

    Raises:
        ConstraintError: A pattern matches nothing, or constraints contradict one another.
    """
    _check_patterns(constraints, [site.name for site in sites], list(candidates))
    refused = _refused(served, sites, candidates) if served else {}
    admitted: dict[str, set[Scheme]] = {}
    reasons: dict[str, str] = {}
    for site in sites:
        name, no = site.name, refused.get(site.name, {})
        asked = [each for each in candidates if constraints.admits(name, each, original)]
        admitted[name] = {(format_of(c), candidates[c]) for c in asked if c not in no}
        if reason := constraints.reason(name):
            reasons[name] = reason
            if not admitted[name]:
                raise ConstraintError(_nothing_left(name, reason, [no[each] for each in asked]))
    if served is None:
        return Bound((), reasons)
    for group in served.groups:
        _check_group(group, served, admitted, reasons)
    return Bound(served.groups, served.reasons(reasons), refused)


def _refused(
    served: Served, sites: Sequence[Site], candidates: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Return, by layer and candidate, why the engine cannot compute the layer so."""
    found: dict[str, dict[str, str]] = {}
    for site in sites:
        for candidate, activation in candidates.items():
            values = candidate.partition("/")[0]
            if why := served.refuses(site.name, values, activation, site.shape):
                found.setdefault(site.name, {})[candidate] = why
    return found


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


def _nothing_left(name: str, reason: str, refusals: Sequence[str]) -> str:
    if refusals:
        return f"{name} is {reason}, which cannot be served: {'; '.join(dict.fromkeys(refusals))}"
    return f"{name} is {reason}: these contradict each other, leave out one of them"


def _check_group(
    group: Sequence[str],
    served: Served,
    admitted: Mapping[str, set[Scheme]],
    reasons: Mapping[str, str],
) -> None:
    if not set.intersection(*(admitted[name] for name in group)):
        listed = "; ".join(f"{name} is {reasons[name]}" for name in group if name in reasons)
        raise ConstraintError(
            f"{', '.join(group)} must get the same scheme (--for {served.engine.name}), but"
            f" {listed}: give them one format"
        )


def format_of(candidate: str) -> str:
    """Return the format id of a candidate's id."""
    return candidate.rpartition("/")[0]


def _matches(candidate: str, glob: str) -> bool:
    """Match as `--candidates` does: the values, the format's id, or the candidate's id."""
    names = (candidate.partition("/")[0], format_of(candidate), candidate)
    return any(fnmatchcase(name, glob) for name in names)
