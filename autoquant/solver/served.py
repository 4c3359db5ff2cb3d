"""What an inference engine takes of a model: formats, and groups of one scheme. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autoquant.engines import Engine, Values, engine
from autoquant.engines.values import A16, UNQUANTIZED
from autoquant.records import LinearShape

NEAREST = "; nearest: "
"""What stands between a reason of `Engine.refuses` and what the engine can hold instead."""
NOT_EXPORTABLE = "its weight is shared, or is not that of a linear module"
TABLE = "embeddings are held unquantized"
DIVISIBLE = LinearShape(n=4096, k=4096, bias=False, dtype="bfloat16")
"""A layer that no format is refused for because of its sizes."""


@dataclass(frozen=True, slots=True)
class Served:
    """The layers of one model, as an engine serves them.

    Attributes:
        device_type: Kind of the device that serves, e.g. `cuda`.
        groups: Names of the layers that it computes as one. All of a group get one scheme.
        left_alone: By layer, why the engine takes it unquantized only.
    """

    engine: Engine
    device_type: str
    groups: tuple[tuple[str, ...], ...] = ()
    left_alone: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        device_type: str,
        layers: Iterable[str],
        left_alone: Mapping[str, str] | None = None,
    ) -> Served:
        """Return what the engine of that name makes of the layers.

        Raises:
            ConstraintError: There is no such engine.
        """
        found = engine(name)
        return cls(found, device_type, tuple(found.fused(layers)), left_alone or {})

    def refuses(self, layer: str, values: str, activation: str, shape: LinearShape) -> str | None:
        """Return why the engine cannot compute a layer with exactly these numbers, or None.

        Args:
            values: First part of the format's id. The model's own dtype is always taken.
            activation: How the activation is rounded, e.g. `a8-row`.
        """
        if values == shape.dtype:
            return None
        if layer in self.left_alone:
            return self.left_alone[layer]
        if values in UNQUANTIZED:
            return f"{self.engine.name} keeps unquantized layers in the model's dtype"
        if not self._has_rounding(values, activation):
            family = Values.parse(values).family
            return f"{self.engine.name} has no {family}+{activation}"
        fused = any(layer in group for group in self.groups)
        return self.engine.refuses(values, activation, shape, fused=fused, device=self.device_type)

    def _has_rounding(self, values: str, activation: str) -> bool:
        """Check whether the engine rounds activations so, or the format is not known to it."""
        schemes = self.engine.target.holds.get(Values.parse(values).family)
        return schemes is None or activation == A16 or activation in schemes

    def reasons(self, others: Mapping[str, str]) -> dict[str, str]:
        """Return what constrains each layer: other constraints first, then the engine."""
        name = self.engine.name
        own = {
            layer: f"left unquantized for {name}: {why}" for layer, why in self.left_alone.items()
        }
        for group in self.groups:
            for layer in group:
                fellows = ", ".join(each.rpartition(".")[2] for each in group if each != layer)
                own.setdefault(layer, f"same scheme as {fellows} (--for {name})")
        both = {layer: f"{others[layer]}; {why}" for layer, why in own.items() if layer in others}
        return {**others, **own, **both}


def is_exportable(parameters: Sequence[str]) -> bool:
    """Check whether a weight with these names can be exported quantized."""
    return len(parameters) == 1 and parameters[0].endswith(".weight")


def refusal_lines(refusals: Mapping[str, str]) -> list[str]:
    """Return what an engine refuses, a line for each reason: names, the reason, and the nearest.

    Args:
        refusals: By name, e.g. of values, the line of `Engine.refuses`.
    """
    names: dict[str, list[str]] = {}
    nearest: dict[str, dict[str, None]] = {}
    for name, line in refusals.items():
        reason, _, near = line.partition(NEAREST)
        names.setdefault(reason, []).append(name)
        nearest.setdefault(reason, {}).update(dict.fromkeys(filter(None, [near])))
    return [
        f"{', '.join(found)}: {reason}"
        + (f"{NEAREST}{', '.join(nearest[reason])}" if nearest[reason] else "")
        for reason, found in names.items()
    ]
