"""The recorder: one run of the model per phase, noting every linear, who shares its input, and what is not covered."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from autoquant.candidates.calls import LINEAR_FUNCTIONS, linear_arguments
from autoquant.errors import WorkloadError
from autoquant.events import Listener, Notice, StageFinished, StageStarted
from autoquant.models import LoadedModel
from autoquant.records import LinearShape, Recording, Site, SiteUse, Skipped, Workload
from autoquant.runtime.phases import Phases, make_phases

_READING_ATTRIBUTES = ("T", "mT", "H", "mH", "data")
_MIN_LISTED_SHARE = 1e-4
_KEPT = "shares a linear's weight; stays unquantized beside it when the linear is quantized"


def _attention_flops(query: Any, key: Any, value: Any, *_args: Any, out_val: Any = None, **_kwargs: Any) -> int:
    """Two matrix products, as PyTorch's own counter has it for other devices' attention."""
    batch, heads, rows, width = query.shape
    return int(2 * batch * heads * rows * key.shape[-2] * (width + value.shape[-1]))


_attention_flops._get_raw = True  # type: ignore[attr-defined]
# PyTorch's counter knows no CPU attention, and on GPUs takes it that queries and keys have as many heads.
_ATTENTION = {
    operator: _attention_flops
    for operator in (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
    )
}


@dataclass(slots=True)
class _Seen:
    """What was seen of one parameter that is multiplied as a linear."""

    shape: LinearShape
    first: int
    owners: set[str] = field(default_factory=set)
    uses: dict[tuple[str, int], int] = field(default_factory=dict)
    group: int = -1


class _LinearWatcher(TorchFunctionMode):
    """Notes each call of a linear, and every other use of a parameter."""

    def __init__(self, parameters: dict[int, list[str]], owner: list[str]) -> None:
        super().__init__()
        self.parameters = parameters
        self.phase = ""
        self.seen: dict[int, _Seen] = {}
        self.others: dict[int, dict[str, set[str]]] = {}
        self.computed_weights: dict[str, int] = {}
        self._owner = owner
        self._inputs: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LINEAR_FUNCTIONS:
            self._linear(*linear_arguments(args, kwargs))
        elif (name := _use(func)) is not None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and id(value) in self.parameters:
                    self.others.setdefault(id(value), {}).setdefault(name, set()).add(self._owner[-1])
        return func(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        n, k = weight.shape if weight.ndim == 2 else (1, weight.shape[-1])
        m = x.numel() // x.shape[-1]
        if id(weight) not in self.parameters or weight.ndim != 2:
            self.computed_weights[self._owner[-1] or "(the model itself)"] = n * k
            return
        shape = LinearShape(n=n, k=k, bias=bias is not None, dtype=str(weight.dtype).removeprefix("torch."))
        seen = self.seen.setdefault(id(weight), _Seen(shape, len(self.seen)))
        seen.owners.add(self._owner[-1])
        seen.uses[(self.phase, m)] = seen.uses.get((self.phase, m), 0) + 1
        seen.group = self._group(x, seen.first)

    def _group(self, x: torch.Tensor, first: int) -> int:
        known = self._inputs.get(id(x))
        if known is not None and known[0]() is x:
            return known[1]
        self._inputs[id(x)] = (weakref.ref(x), first)
        return first


@contextmanager
def _module_stack(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, innermost last."""
    stack = [""]
    handles = []
    for name, child in module.named_modules():

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            stack.pop()

        handles.append(child.register_forward_pre_hook(enter))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def record_model(loaded: LoadedModel, workload: Workload, listener: Listener) -> Recording:
    """Record a loaded model at work, and tell what is covered and what is left alone.

    Raises:
        WorkloadError: The workload does not fit the model, or runs no linear of it.
    """
    listener(StageStarted("record", len(workload.phases)))
    recording = record(loaded.module, make_phases(loaded, workload))
    if not recording.sites:
        raise WorkloadError("the model has no linear layer that this workload runs: nothing to search")
    flops = ", ".join(f"{share:.1%} of {phase}" for phase, share in recording.flops_share.items())
    shapes = len({site.shape for site in recording.sites})
    covered = f"{recording.weights_share:.1%} of weights; FLOPs: {flops}"
    listener(StageFinished("record", f"{len(recording.sites)} linears of {shapes} shapes: {covered}"))
    for skipped in recording.skipped:
        listener(Notice(f"left alone: {skipped.name} ({skipped.share:.1%} of weights): {skipped.reason}"))
    for note in loaded.notes:
        listener(Notice(note))
    return recording


def mean_element_bytes(module: nn.Module, recording: Recording) -> int:
    """Bytes of one of the module's parameters, on average, at least 1."""
    elements = sum(parameter.numel() for parameter in module.parameters())
    return max(1, recording.parameter_bytes // max(1, elements))


def record(module: nn.Module, phases: Phases) -> Recording:
    """Run `module` once per phase and note its linears.

    A site is a parameter of two dimensions that reaches `F.linear` as it is. Parameters that share one tensor are one site;
    names of the tensor that are used in another way (an embedding) keep the unquantized weight.
    """
    parameters: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    by_id = {id(parameter): parameter for parameter in module.parameters()}
    flops: dict[str, int] = {}
    with _module_stack(module) as stack:
        watcher = _LinearWatcher(parameters, stack)
        for phase in phases.workload.phases:
            phases.reset(phase.name)
            watcher.phase = phase.name
            counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
            with watcher, counter:
                phases.run(phase.name)
            flops[phase.name] = counter.get_total_flops()
    sites = _sites(watcher)
    total = sum(parameter.numel() for parameter in by_id.values())
    skipped = _skipped(watcher, by_id, sites, total)
    return Recording(
        sites=sites,
        skipped=skipped,
        weights_share=sum(site.shape.n * site.shape.k for site in sites) / max(total, 1),
        flops_share={
            phase: min(1.0, _linear_flops(sites, phase) / count) if count else 0.0 for phase, count in flops.items()
        },
        parameter_bytes=sum(parameter.nbytes for parameter in by_id.values()),
    )


def _sites(watcher: _LinearWatcher) -> tuple[Site, ...]:
    sites: list[tuple[int, Site]] = []
    for identity, seen in watcher.seen.items():
        names = watcher.parameters[identity]
        others = watcher.others.get(identity, {})
        elsewhere = set().union(*others.values())
        replaced = [name for name in names if not others or _owner(name) in seen.owners - elsewhere]
        if not replaced:
            continue
        uses = tuple(SiteUse(phase=phase, m=m, calls=calls) for (phase, m), calls in seen.uses.items())
        name = replaced[0].removesuffix(".weight")
        kept = tuple(name for name in names if name not in replaced)
        sites.append((seen.group, Site(name=name, parameters=tuple(replaced), shape=seen.shape, uses=uses, kept=kept)))
    groups: dict[int, list[str]] = {}
    for group, site in sites:
        groups.setdefault(group, []).append(site.name)
    return tuple(
        Site(
            name=site.name,
            parameters=site.parameters,
            shape=site.shape,
            uses=site.uses,
            kept=site.kept,
            siblings=tuple(groups[group]),
        )
        for group, site in sites
    )


def _use(func: Any) -> str | None:
    """What a function does with a parameter, or None for looking at its shape and the like."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in _READING_ATTRIBUTES else None
    return name


def _linear_flops(sites: tuple[Site, ...], phase: str) -> int:
    return sum(
        2 * use.m * use.calls * site.shape.n * site.shape.k for site in sites for use in site.uses if use.phase == phase
    )


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _skipped(
    watcher: _LinearWatcher, by_id: dict[int, nn.Parameter], sites: tuple[Site, ...], total: int
) -> tuple[Skipped, ...]:
    skipped: list[Skipped] = []
    kept = {name for site in sites for name in site.kept}
    covered = {name for site in sites for name in site.parameters}
    for identity, parameter in by_id.items():
        names = watcher.parameters[identity]
        if covered & set(names) or parameter.ndim < 2:
            skipped += [Skipped(name=name, numel=0, share=0.0, reason=_KEPT) for name in names if name in kept]
            continue
        share = parameter.numel() / total
        if share < _MIN_LISTED_SHARE:
            continue
        skipped.append(Skipped(name=names[0], numel=parameter.numel(), share=share, reason=_reason(watcher, identity)))
    skipped.sort(key=lambda item: -item.share)
    for owner, numel in watcher.computed_weights.items():
        reason = "a linear on a computed weight, not on a parameter"
        skipped.append(Skipped(name=owner, numel=numel, share=numel / total, reason=reason))
    small = sum(p.numel() for p in by_id.values() if p.ndim < 2)
    if small:
        reason = "vectors (norms, biases): too small to quantize"
        skipped.append(Skipped(name="(vectors)", numel=small, share=small / total, reason=reason))
    return tuple(skipped)


def _reason(watcher: _LinearWatcher, identity: int) -> str:
    others = sorted(watcher.others.get(identity, ()))
    if identity in watcher.seen:
        return f"is a linear's weight and also used by {', '.join(others)} under the same name"
    if others:
        return f"not used as a linear: {', '.join(others)}"
    return "not used in this workload"
