"""Record a model at work: its linears, which of them share an input, and what is not covered."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoquant.candidates.calls import LinearCall, LinearHook, LookupCall, expert_rows
from autoquant.devices.memory import lacks_memory
from autoquant.errors import WorkloadError
from autoquant.events import Listener, Notice, StageFinished, StageStarted
from autoquant.models import LoadedModel
from autoquant.models.copies import adapter_parameters, shallow_copy
from autoquant.models.loaded import UNFIT
from autoquant.models.streaming import on_meta
from autoquant.profiler.tables import ASK, LEAST_SHARE, Looked, table_site
from autoquant.records import LinearShape, Recording, Site, SiteUse, Skipped, Workload
from autoquant.runtime.phases import Phases, make_phases, no_room

_READING_ATTRIBUTES = ("T", "mT", "H", "mH", "data")
_SINGLE_EXPERT = (
    "a single expert is not quantized: a linear of its own, with two dimensions, would be"
)
_MIN_LISTED_SHARE = 1e-4
_KEPT = "shares a linear's weight; stays unquantized beside it when the linear is quantized"


def _attention_flops(
    query: Any,
    key: Any,
    value: Any,
    *_args: Any,
    out_val: Any = None,
    **_kwargs: Any,
) -> int:
    """Count the operations of two matrix products, as PyTorch does for other attention."""
    batch, heads, rows, width = query.shape
    tokens, value_width = key.shape[-2], value.shape[-1]
    return int(2 * batch * heads * rows * tokens * (width + value_width))


_attention_flops._get_raw = True  # type: ignore[attr-defined]
# PyTorch's counter knows no CPU attention. On GPUs it assumes as many key heads as query heads.
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
    """The observed uses of one parameter that is a linear's weight.

    Attributes:
        first: How many such parameters were seen before it.
        owners: Modules that multiplied with it.
        uses: Calls, by phase and number of rows.
        group: The `first` of the parameter that read the same input first.
        experts: The matrices in the parameter.
        turned: They are kept the other way round.
    """

    shape: LinearShape
    first: int
    owners: set[str] = field(default_factory=set)
    uses: dict[tuple[str, int], int] = field(default_factory=dict)
    group: int = -1
    experts: int = 1
    turned: bool = False


class _LinearWatcher(LinearHook):
    """Notes each call of a linear, and every other use of a parameter.

    Args:
        parameters: Names by the parameter's identity.
        owner: Names of the modules whose forward is running, innermost last.
        device: What the model is to run on.

    Attributes:
        experts: Why weights of experts are left alone, by their identity.
        seen: What was seen of each weight, by its identity.
        others: Modules that used a parameter otherwise, by its identity and the use.
        looked: Lookups of rows of parameters, by identity.
        idle: Identities of parameters that a linear without rows was computed with.
        computed_weights: Elements of weights that are no parameters, by module.
        adapters: Identities of parameters that stay as they are.
    """

    def __init__(self, parameters: dict[int, list[str]], owner: list[str]) -> None:
        super().__init__()
        self.parameters = parameters
        self.phase = ""
        self.seen: dict[int, _Seen] = {}
        self.others: dict[int, dict[str, set[str]]] = {}
        self.looked: dict[int, Looked] = {}
        self.idle: set[int] = set()
        self.experts: dict[int, str] = {}
        self.computed_weights: dict[str, int] = {}
        self.adapters: set[int] = set()
        self._owner = owner
        self._inputs: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def on_lookup(self, call: LookupCall) -> None:
        if id(call.table) in self.parameters:
            looked = self.looked.setdefault(id(call.table), Looked())
            looked.note(call, self.phase, self._owner[-1])

    def on_other(self, function: Any, arguments: Sequence[Any]) -> None:
        if (name := _use(function)) is None:
            return
        for value in arguments:
            if isinstance(value, torch.Tensor) and id(value) in self.parameters:
                uses = self.others.setdefault(id(value), {})
                uses.setdefault(name, set()).add(self._owner[-1])

    def on_linear(self, call: LinearCall) -> None:
        if call.ends is not None and id(call.weight) in self.parameters:
            if len(call.weight) == 1:
                self.experts[id(call.weight)] = _SINGLE_EXPERT
            else:
                self._note_experts(call, call.ends)
            return
        x, weight = call.x, call.weight
        n, k = weight.shape if weight.ndim == 2 else (1, weight.shape[-1])
        m = x.shape[:-1].numel()
        if m == 0 and id(weight) in self.parameters:
            self.idle.add(id(weight))
            return
        if id(weight) not in self.parameters or weight.ndim != 2:
            self.computed_weights[self._owner[-1] or "(the model itself)"] = n * k
            return
        dtype = str(weight.dtype).removeprefix("torch.")
        shape = LinearShape(n=n, k=k, bias=call.bias is not None, dtype=dtype)
        seen = self.seen.setdefault(id(weight), _Seen(shape, len(self.seen)))
        self._note(seen, m, calls=1)
        seen.group = self._group(x, seen.first)

    def _note(self, seen: _Seen, m: int, calls: int) -> None:
        seen.owners.add(self._owner[-1])
        seen.uses[(self.phase, m)] = seen.uses.get((self.phase, m), 0) + calls

    def _note_experts(self, call: LinearCall, ends: torch.Tensor) -> None:
        """Note the experts that got rows as so many calls of a linear, with as many rows each."""
        experts, n, k = call.straight().shape
        dtype = str(call.weight.dtype).removeprefix("torch.")
        shape = LinearShape(n=n, k=k, bias=False, dtype=dtype)
        first = len(self.seen)
        seen = _Seen(shape, first, group=first, experts=experts, turned=call.turned)
        seen = self.seen.setdefault(id(call.weight), seen)
        # Without values, the rows may have gone to any experts.
        told = ends.device.type != "meta"
        active = sum(1 for _ in expert_rows(ends)) if told else min(experts, len(call.x))
        if active:
            self._note(seen, max(1, round(len(call.x) / active)), calls=active)

    def _group(self, x: torch.Tensor, first: int) -> int:
        known = self._inputs.get(id(x))
        if known is not None and known[0]() is x:
            return known[1]
        self._inputs[id(x)] = (weakref.ref(x), first)
        return first


@contextmanager
def _module_stack(module: nn.Module) -> Iterator[list[str]]:
    """Keep the names of the modules whose forward is running, innermost last."""
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


def record_model(
    loaded: LoadedModel, workload: Workload, listener: Listener, *, tables: bool = False
) -> Recording:
    """Record a loaded model at work, and report what is covered and what is left alone.

    Args:
        tables: Embeddings are searched, too. Those of a streamed model are not.

    Raises:
        WorkloadError: The workload does not fit the model or the memory, or runs no linear of it.
    """
    listener(StageStarted("record", len(workload.phases)))
    try:
        recording = _recorded(loaded, workload, tables and loaded.stream is None)
    except RuntimeError as error:
        if lacks_memory(error):
            raise no_room(workload, loaded.device) from error
        raise
    if not recording.sites:
        left = [f"{part.name}: {part.reason}" for part in recording.skipped if part.name[0] != "("]
        why = f" ({left[0]})" if left else ""
        nothing = f"the model has no linear layer that this workload runs{why}: nothing to search"
        raise WorkloadError(nothing)
    flops = ", ".join(f"{share:.1%} of {phase}" for phase, share in recording.flops_share.items())
    shapes = len({site.shape for site in recording.sites})
    covered = f"{recording.weights_share:.1%} of weights; FLOPs: {flops}"
    found = f"{len(recording.sites)} linears of {shapes} shapes"
    if recording.tables:
        found += f" and tables ({', '.join(table.name for table in recording.tables)})"
    listener(StageFinished("record", f"{found}: {covered}"))
    for skipped in recording.skipped:
        share = f"{skipped.share:.1%} of weights"
        listener(Notice(f"left alone: {skipped.name} ({share}): {skipped.reason}"))
    for note in loaded.notes:
        listener(Notice(note))
    return recording


def _recorded(loaded: LoadedModel, workload: Workload, tables: bool) -> Recording:
    """Record a model; a streamed one by shapes alone, if its code asks for no values."""
    if loaded.stream is not None:
        shapes = replace(loaded, module=on_meta(shallow_copy(loaded.module)))
        with suppress(*UNFIT):
            return record(shapes.module, make_phases(shapes, workload), loaded.device)
    return record(loaded.module, make_phases(loaded, workload), loaded.device, tables=tables)


def mean_element_bytes(module: nn.Module, recording: Recording) -> int:
    """Return the mean bytes of an element of the module's parameters, at least 1."""
    elements = sum(parameter.numel() for parameter in module.parameters())
    return max(1, recording.parameter_bytes // max(1, elements))


def record(
    module: nn.Module, phases: Phases, device: str = "cpu", *, tables: bool = False
) -> Recording:
    """Run `module` once per phase and note its linears.

    A site is a parameter with two dimensions that is passed to `F.linear` itself. Parameters that
    share one tensor are one site. If one of their names is also used otherwise (an embedding), it
    keeps the unquantized weight. A parameter with three dimensions is one site if `grouped_mm`
    multiplies rows of each expert with it.

    Args:
        device: What the model is to run on.
        tables: Embeddings are searched, too.
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
    watcher.adapters = adapter_parameters(module)
    sites = _sites(watcher)
    total = sum(parameter.numel() for parameter in by_id.values())
    looked = _looked(watcher, by_id, sites, total)
    searched = tuple(each for each in looked.values() if isinstance(each, Site)) if tables else ()
    own = {name for table in searched for name in table.parameters}
    sites = tuple(
        replace(site, kept=tuple(name for name in site.kept if name not in own)) for site in sites
    )
    skipped = _skipped(watcher, by_id, sites + searched, total, looked)
    shares: dict[str, float] = {}
    for name, count in flops.items():
        shares[name] = min(1.0, _linear_flops(sites, name) / count) if count else 0.0
    return Recording(
        sites=sites,
        skipped=skipped,
        weights_share=sum(site.weights for site in sites) / max(total, 1),
        flops_share=shares,
        parameter_bytes=sum(parameter.nbytes for parameter in by_id.values()),
        tables=searched,
    )


def _sites(watcher: _LinearWatcher) -> tuple[Site, ...]:
    sites: list[tuple[int, Site]] = []
    for identity, seen in watcher.seen.items():
        if identity in watcher.adapters:
            continue
        names = watcher.parameters[identity]
        others = dict(watcher.others.get(identity, {}))
        if seen.experts > 1:
            others.pop(torch.Tensor.transpose.__name__, None)  # a part of the product
        elsewhere = set().union(*others.values())
        # If it has another use, it is replaced only in modules that do nothing but multiply.
        replaced = [name for name in names if not others or _owner(name) in seen.owners - elsewhere]
        if not replaced:
            continue
        uses = tuple(SiteUse(phase=phase, m=m, calls=n) for (phase, m), n in seen.uses.items())
        site = Site(
            name=replaced[0].removesuffix(".weight"),
            parameters=tuple(replaced),
            shape=seen.shape,
            uses=uses,
            kept=tuple(name for name in names if name not in replaced),
            experts=seen.experts,
            turned=seen.turned,
        )
        sites.append((seen.group, site))
    groups: dict[int, list[str]] = {}
    for group, site in sites:
        groups.setdefault(group, []).append(site.name)
    return tuple(replace(site, siblings=tuple(groups[group])) for group, site in sites)


def _looked(
    watcher: _LinearWatcher, by_id: dict[int, nn.Parameter], sites: tuple[Site, ...], total: int
) -> dict[int, Site | str]:
    """Return each large table as a site, or why it is left alone, by its identity."""
    found: dict[int, Site | str] = {}
    for identity, looked in watcher.looked.items():
        parameter, names = by_id[identity], watcher.parameters[identity]
        if parameter.numel() < LEAST_SHARE * total or not looked.uses:
            continue
        linear = next((site for site in sites if set(names) & set(site.parameters)), None)
        if identity in watcher.adapters or (linear is None and identity in watcher.seen):
            continue
        others = watcher.others.get(identity, {})
        found[identity] = table_site(parameter, names, looked, others, linear)
    return found


def _use(func: Any) -> str | None:
    """Return what a function does with a parameter, or None if it reads the shape or the like."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        return attribute if attribute in _READING_ATTRIBUTES else None
    return name


def _linear_flops(sites: tuple[Site, ...], phase: str) -> int:
    flops = 0
    for site in sites:
        rows = sum(use.m * use.calls for use in site.uses if use.phase == phase)
        flops += 2 * rows * site.shape.n * site.shape.k
    return flops


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _skipped(
    watcher: _LinearWatcher,
    by_id: dict[int, nn.Parameter],
    sites: tuple[Site, ...],
    total: int,
    looked: dict[int, Site | str],
) -> tuple[Skipped, ...]:
    skipped: list[Skipped] = []
    kept = {name for site in sites for name in site.kept}
    covered = {name for site in sites for name in site.parameters}
    for identity, parameter in by_id.items():
        names = watcher.parameters[identity]
        if covered & set(names) or parameter.ndim < 2:
            beside = [name for name in names if name in kept]
            reason = _KEPT + _table_words(looked.get(identity))
            skipped += [Skipped(name=name, numel=0, share=0.0, reason=reason) for name in beside]
            continue
        share = parameter.numel() / total
        if share < _MIN_LISTED_SHARE:
            continue
        reason = _reason(watcher, identity) + _table_words(looked.get(identity))
        skipped.append(Skipped(name=names[0], numel=parameter.numel(), share=share, reason=reason))
    skipped.sort(key=lambda item: -item.share)
    for owner, numel in watcher.computed_weights.items():
        reason = "a linear on a computed weight, not on a parameter"
        skipped.append(Skipped(name=owner, numel=numel, share=numel / total, reason=reason))
    small = sum(p.numel() for p in by_id.values() if p.ndim < 2)
    if small:
        reason = "vectors (norms, biases): too small to quantize"
        skipped.append(Skipped(name="(vectors)", numel=small, share=small / total, reason=reason))
    return tuple(skipped)


def _table_words(looked: Site | str | None) -> str:
    """Return what a reason to leave a parameter alone ends with, if its rows are looked up."""
    if isinstance(looked, Site):
        return ASK
    return f"; {looked}" if looked else ""


def _reason(watcher: _LinearWatcher, identity: int) -> str:
    if identity in watcher.adapters:
        return "an adapter's: it stays as it is, to be trained or exchanged"
    others = sorted(watcher.others.get(identity, ()))
    if identity in watcher.seen:
        return f"is a linear's weight and also used by {', '.join(others)} under the same name"
    if identity in watcher.experts:
        return watcher.experts[identity]
    if others:
        return f"not used as a linear: {', '.join(others)}"
    if identity in watcher.idle:
        return "got no rows in this workload, so stays as it is"
    return "not used in this workload"
