"""A step profiled, with every kernel's time attributed to the layer whose weight it reads.

PyTorch's profiler records which tensors an operator, or a kernel of the compiler's, is given. Weights stay where they are, so
the memory that a kernel reads tells its layer, whatever the compiler fused it with and however often it reuses a block's code.
A replayed CUDA graph launches nothing from the host: its kernels are matched, by name and order, with those of a run in which
the same compiled code launches every kernel itself. Where nothing is compiled, a layer's operators are those that run while it
is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType, _RecordFunctionFast
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from autoquant.candidates.flat import flatten_tensor
from autoquant.profiler.device import synchronize
from autoquant.profiler.phases import Phases
from autoquant.profiler.steps import LINEAR, UNKNOWN, KernelTime, StepProfile, glue_kind

_STEP = "autoquant step"
_LAYER = "autoquant layer "
_WARM_UP_STEPS = 1
_STEPS = 5


def attribute(phases: Phases, module: nn.Module, layers: Mapping[str, str], device: str) -> dict[str, StepProfile]:
    """Profile one step of every phase, the one of median time of several.

    Timings taken after this in the same process are slower: the profiler leaves its hooks behind.

    Args:
        phases: Runs `module`; already warm.
        layers: Name of a linear's weight, by the linear's name. Linears of the module that are not among them count, too.
    """
    weights = _Weights(module, layers)
    with weights.ranges(), _named_kernels():
        return {phase.name: _profile(phases, phase.name, weights, device) for phase in phases.workload.phases}


class _Weights:
    """Which linears' weights lie where.

    Weights that lie behind one another (see `autoquant.candidates.joined`) have their memory in common, and so their kernels.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, str]) -> None:
        self._module = module
        self._names: dict[int, dict[str, None]] = {}
        self._owners: dict[str, str] = {}
        for name, parameter in layers.items():
            self._add(name, parameter)
        for owner, child in module.named_modules():
            if isinstance(child, nn.Linear) and not self._names.keys() & set(_places(child.weight)):
                self._add(owner, f"{owner}.weight")
        embeddings = [child.weight for child in module.modules() if isinstance(child, nn.Embedding)]
        self._embeddings = {place for weight in embeddings for place in _places(weight)}

    def _add(self, name: str, parameter: str) -> None:
        self._owners[name] = parameter.rpartition(".")[0]
        for place in _places(self._module.get_parameter(parameter)):
            self._names.setdefault(place, {})[name] = None

    def read_by(self, event: Any) -> tuple[str, ...]:
        """The linears whose weights an operator, or what it calls, is given."""
        embeds = "embedding" in event.name
        places = set(_inputs(event)) - (self._embeddings if embeds else set())
        return tuple(dict.fromkeys(name for place in self._names if place in places for name in self._names[place]))

    @contextmanager
    def ranges(self) -> Iterator[None]:
        """While this lasts, calls of linears that are not compiled are ranges of the profiler."""
        open_ranges: list[Any] = []
        handles = []
        for name, owner in self._owners.items():
            child = self._module.get_submodule(owner)

            def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
                open_ranges.append(record_function(_LAYER + name))
                open_ranges[-1].__enter__()

            def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
                open_ranges.pop().__exit__(None, None, None)

            if not isinstance(child, nn.Embedding):
                handles.append(child.register_forward_pre_hook(enter))
                handles.append(child.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _places(weight: torch.Tensor) -> list[int]:
    """Where the memory of the plain tensors inside a weight begins."""
    return [part.untyped_storage().data_ptr() for part in flatten_tensor(weight)[0]]


def _inputs(event: Any) -> Iterator[int]:
    """Where the memory of all tensors begins that an event and those inside it are given."""
    for value in getattr(event.extra_fields, "inputs", ()):
        for tensor in value if isinstance(value, list) else [value]:
            if place := getattr(tensor, "storage_data_ptr", None):
                yield place
    for child in event.children:
        yield from _inputs(child)


@contextmanager
def _named_kernels() -> Iterator[None]:
    """While this lasts, the compiler's C++ kernels tell the profiler their names and inputs, as its Triton kernels always do."""
    compiler = sys.modules.get("torch._inductor.codecache")
    modules = compiler.PyCodeCache.modules if compiler else []
    kernels = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if name.startswith("cpp_") and isinstance(kernel, BuiltinFunctionType)
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _named(kernel, name))
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def _named(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _RecordFunctionFast(name, args):
            return kernel(*args)

    return run


@dataclass(frozen=True, slots=True)
class _Operator:
    """What the host started: an outermost operator, with all the operators inside it.

    Attributes:
        ids: By which the profiler links kernels to it.
    """

    name: str
    layers: tuple[str, ...]
    start_ns: int
    end_ns: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Launch:
    """A kernel of a run that launched it from the host: its name, and the operator that did."""

    name: str
    operator: _Operator | None


def _profile(phases: Phases, phase: str, weights: _Weights, device: str) -> StepProfile:
    launched = _runs(phases, phase, phases.run_launched, device, 1 if device == "cuda" else _STEPS)
    if device != "cuda":
        return _median([_host_step(phase, run, weights) for run in launched])
    launches = _launches(launched[-1], weights)
    replayed = _runs(phases, phase, phases.run, device, _STEPS)
    return _median([_device_step(phase, run, launches) for run in replayed])


def _median(steps: Sequence[StepProfile]) -> StepProfile:
    return sorted(steps, key=lambda step: step.step_us)[len(steps) // 2]


def _runs(phases: Phases, phase: str, run: Callable[[str], Any], device: str, count: int) -> list[Any]:
    """What the profiler saw of `count` steps, each by itself, after some that warm it up."""
    results = []
    left = 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    for _ in range(_WARM_UP_STEPS + count):
        if left == 0:
            phases.reset(phase)
            left = phases.limit(phase)
        left -= 1
        synchronize(device)
        with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
            with record_function(_STEP):
                run(phase)
            synchronize(device)
        assert profiler.profiler is not None
        results.append(profiler.profiler.kineto_results)
    return results[_WARM_UP_STEPS:]


def _host_step(phase: str, results: Any, weights: _Weights) -> StepProfile:
    step = _step_event(results)
    kernels = [
        KernelTime(
            name=operator.name,
            kind=LINEAR if operator.layers else glue_kind(operator.name),
            layers=operator.layers,
            start_us=(operator.start_ns - step.start_time_ns) / 1e3,
            duration_us=(operator.end_ns - operator.start_ns) / 1e3,
        )
        for operator in _operators(step, weights)
    ]
    return StepProfile(phase=phase, step_us=step.duration_time_ns / 1e3, kernels=tuple(kernels))


def _step_event(results: Any) -> Any:
    """The event of the whole step on the host."""
    return next(event for event in results.experimental_event_tree() if event.name == _STEP)


def _operators(event: Any, weights: _Weights, called: tuple[str, ...] = ()) -> Iterator[_Operator]:
    """The outermost operators inside an event; ranges and the compiler's own bookkeeping around them are looked into.

    Args:
        called: The linear that is being called.
    """
    if event.tag != _EventType.TorchOp:
        return
    if event.name.startswith(_LAYER):
        called = (event.name.removeprefix(_LAYER),)
    if not event.name.startswith(_LAYER) and _computes(event):
        layers = called or weights.read_by(event)
        yield _Operator(event.name, layers, event.start_time_ns, event.end_time_ns, tuple(_ids(event)))
        return
    for child in event.children:
        yield from _operators(child, weights, called)


def _computes(event: Any) -> bool:
    return "::" in event.name or any(hasattr(value, "storage_data_ptr") for value in event.extra_fields.inputs)


def _ids(event: Any) -> Iterator[int]:
    yield event.correlation_id
    for child in event.children:
        yield from _ids(child)


def _launches(results: Any, weights: _Weights) -> list[_Launch]:
    """The kernels of a run that launched each of them, in the order in which they ran."""
    operators = {identity: op for op in _operators(_step_event(results), weights) for identity in op.ids}
    return [_Launch(event.name(), operators.get(event.linked_correlation_id())) for event in _device_events(results)]


def _device_events(results: Any) -> list[Any]:
    """Kernels, copies and fills on the GPU, in the order in which they ran."""
    events = [
        event
        for event in results.events()
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation() and event.name() != _STEP
    ]
    return sorted(events, key=lambda event: event.start_ns())


def _device_step(phase: str, results: Any, launches: Sequence[_Launch]) -> StepProfile:
    events = _device_events(results)
    found = match_launches([launch.name for launch in launches], [event.name() for event in events])
    start = end = events[0].start_ns()
    kernels = []
    for event, position in zip(events, found, strict=True):
        begin = max(event.start_ns(), end)
        end = max(event.end_ns(), end)
        kernels.append(
            _device_kernel(
                event.name(),
                None if position is None else launches[position],
                (begin - start) / 1e3,
                (end - begin) / 1e3 if end > begin else 0.0,
            )
        )
    return StepProfile(phase=phase, step_us=(end - start) / 1e3, kernels=tuple(kernels))


def _device_kernel(name: str, launch: _Launch | None, start_us: float, duration_us: float) -> KernelTime:
    operator = launch.operator if launch else None
    layers = operator.layers if operator else ()
    kind = UNKNOWN if launch is None else glue_kind(f"{operator.name if operator else ''} {name}")
    return KernelTime(
        name=name,
        kind=LINEAR if layers else kind,
        layers=layers,
        start_us=start_us,
        duration_us=duration_us,
    )


def match_launches(launched: Sequence[str], replayed: Sequence[str]) -> list[int | None]:
    """For each replayed kernel the position of the launched one that it is: the same name, in the same order.

    None where the two runs differ.
    """
    found: list[int | None] = [None] * len(replayed)
    for block in SequenceMatcher(None, launched, replayed, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            found[block.b + offset] = block.a + offset
    return found
