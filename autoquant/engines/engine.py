"""Inference engines: the target that each reads, and limits that the files do not have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from autoquant.engines.programs import PROGRAMS
from autoquant.engines.targets import (
    COMPRESSED_TENSORS,
    EXECUTORCH,
    GGUF,
    MODELOPT,
    PLAIN,
    TARGETS,
    TRANSFORMERS,
    Refusal,
    Scheme,
    Target,
)
from autoquant.engines.values import A8_TOKEN, Values
from autoquant.errors import ConstraintError, PlanError
from autoquant.hints import did_you_mean
from autoquant.records import LinearShape

Limit = Callable[[str, Scheme, LinearShape], Refusal | None]
"""Maps a family, its scheme and the shape of a layer to why an engine has no kernel for it."""

_PACKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One program that models are served with.

    Attributes:
        name: As `--for` takes it.
        target: What plans for it are exported to. It takes every quantized linear of it, a head
            included. No engine here is given a quantized embedding: one that is tied to a quantized
            head stays as it is, beside the head.
        also: Other targets that it reads.
        packed: Last parts of the names of layers of one module that it computes as one.
        packs_experts: It computes all experts of a layer as one.
        one_tensor_scale: Families with a scale for the whole tensor, of which it takes one for all
            layers that it computes as one.
        limits: By kind of device, what it lacks there.
    """

    name: str
    target: Target
    also: tuple[Target, ...] = ()
    packed: tuple[tuple[str, ...], ...] = ()
    packs_experts: bool = False
    one_tensor_scale: tuple[str, ...] = ()
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def refuses(
        self,
        values: str,
        numerics: str,
        shape: LinearShape,
        *,
        fused: bool = False,
        device: str | None = None,
    ) -> str | None:
        """Return why the engine cannot compute a layer with exactly these numbers, or None.

        The line ends with the nearest values that it can, where there are any.

        Args:
            values: First part of the format's id, e.g. `int8-row`.
            numerics: How the layer rounds the activation, e.g. `a8-row`. If kernels of a route
                differ, that of `rounded_activation`.
            fused: The layer is computed as one with others (see `fused`).
            device: Kind of device that it is served on (`cpu`, `cuda`), or None for any.
        """
        found = self.target.scheme(values, numerics, shape)
        if isinstance(found, Refusal):
            return str(found)
        if found.name == PLAIN:
            return None
        family = Values.parse(values).family
        if fused and family in self.one_tensor_scale:
            reason = f"it takes one {family} tensor scale for all layers that it computes as one"
            return str(Refusal(reason, "mxfp4"))
        limit = self.limits.get(device or "")
        lacking = limit(family, found, shape) if limit else None
        return None if lacking is None else str(lacking)

    def reading(self, target: Target) -> Engine | None:
        """Return the engine as a reader of a target, or None if it reads none such."""
        if target is self.target or target in self.also:
            return replace(self, target=target)
        return None

    def fused(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the groups of layers that it computes as one, in order.

        All layers of a group need one scheme.

        Args:
            names: Names of a model's linears.
        """
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            if key := self._group(name):
                groups.setdefault(key, []).append(name)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def _group(self, name: str) -> tuple[str, ...]:
        """Return a key of the layers that are computed as one with this one, or ()."""
        expert = _EXPERT.fullmatch(name)
        if expert and self.packs_experts:
            return (expert[1],)
        holder, _, leaf = name.rpartition(".")
        return next(((holder, *leaves) for leaves in self.packed if leaf in leaves), ())


def _vllm_on_cpus(family: str, scheme: Scheme, shape: LinearShape) -> Refusal | None:
    """Say what vLLM 0.32 computes on CPUs (`kernels/linear` and its compressed-tensors schemes)."""
    if family == "int4s":
        if shape.n % 32 == 0:
            return None
        return Refusal(f"its int4 on CPUs needs n divisible by 32, not {shape.n}", "int8-row")
    if scheme.activation in ("a8-row", "a8-float8-row"):
        return None
    computed = f"{family} whose activations are not rounded"
    if family.startswith(("mx", "nv")) or family in ("int3", "int2"):
        computed = family
    return Refusal(f"it has no kernel for {computed} on CPUs", "int8-row+a8-row")


def _executorch(family: str, scheme: Scheme, _shape: LinearShape) -> Refusal | None:
    """Say which layers XNNPACK rounds otherwise than a kernel of the search that there is."""
    if family == "int8-row" and scheme.activation == A8_TOKEN:
        return Refusal("it always rounds the activation of int8-row", "int8-row+a8-row")
    return None


ENGINES: Mapping[str, Engine] = {
    each.name: each
    for each in (
        Engine(
            name="vllm",
            target=COMPRESSED_TENSORS,
            also=(MODELOPT,),
            packed=_PACKED,
            packs_experts=True,
            one_tensor_scale=("nvfp4",),
            limits={"cpu": _vllm_on_cpus},
        ),
        Engine(
            name="sglang",
            target=COMPRESSED_TENSORS,
            packed=_PACKED,
            packs_experts=True,
            one_tensor_scale=("nvfp4",),
        ),
        Engine(name="llama.cpp", target=GGUF),
        Engine(name="transformers", target=TRANSFORMERS),
        Engine(
            name="executorch",
            target=EXECUTORCH,
            limits={"cpu": _executorch, "cuda": _executorch},
        ),
    )
}
"""All engines by name."""


def engine(name: str) -> Engine:
    """Return the engine with a name.

    Raises:
        ConstraintError: There is no such engine.
    """
    if name not in ENGINES:
        raise ConstraintError(
            f"no engine {name!r}{did_you_mean(name, ENGINES)}; choose one of {', '.join(ENGINES)}"
        )
    return ENGINES[name]


def target(name: str) -> Target:
    """Return the target with a name.

    Raises:
        PlanError: There is no such target.
    """
    if name in ENGINES and name not in TARGETS:
        raise PlanError(f"{name} is no target, it reads {ENGINES[name].target.name}: choose that")
    if name not in TARGETS:
        known = [*TARGETS, *PROGRAMS]
        raise PlanError(
            f"no target {name!r}{did_you_mean(name, known)}; choose one of {', '.join(known)}"
        )
    return TARGETS[name]
