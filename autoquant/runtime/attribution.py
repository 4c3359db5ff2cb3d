"""The time of each kernel of a step, attributed to a layer or to another kind of work.

On the CPU the operators' times count (see `autoquant.runtime.operators`), in a step whose kernels
Python calls one by one: the gaps between them are wider than in a step that is replayed. A replayed
CUDA graph starts nothing on the host. Its kernels are matched, by name and order, with those of a
run in which the same compiled code launches each kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import profile, record_function

from autoquant.devices import Backend, backend
from autoquant.errors import DeviceError
from autoquant.runtime.operators import Operator, Weights, named_kernels, operators
from autoquant.runtime.parts import visible_kernels
from autoquant.runtime.phases import Phases
from autoquant.runtime.steps import LINEAR, UNKNOWN, KernelTime, StepProfile, glue_kind, median_step

_STEP = "autoquant step"
_STEPS, _FEWEST_STEPS = 10, 4
_ENOUGH_S = 5.0


def attribute(
    phases: Phases, module: nn.Module, layers: Mapping[str, str], device: str
) -> dict[str, StepProfile]:
    """Profile one step of every phase; each kernel gets its median time over several.

    Timings taken after this in the same process are slower: the profiler leaves its hooks behind.

    Args:
        phases: Runs `module`; already warm.
        layers: See `Weights`.

    Raises:
        DeviceError: The profiler does not see what the device does.
    """
    own = backend(device)
    if not own.profiler_activities:
        raise DeviceError(f"PyTorch's profiler does not see the kernels of {device}")
    weights = Weights(module, layers)
    names = [phase.name for phase in phases.workload.phases]
    with visible_kernels():
        for name in names:
            phases.reset(name)
            phases.run_launched(name)  # compiles
        with weights.ranges(), named_kernels():
            return {name: _profile(phases, name, weights, own) for name in names}


@dataclass(frozen=True, slots=True)
class _Launch:
    """A kernel of a run that launched it from the host: its name, and the operator that did."""

    name: str
    operator: Operator | None


def _profile(phases: Phases, phase: str, weights: Weights, device: Backend) -> StepProfile:
    launched = _runs(phases, phase, phases.run_launched, device)
    if not device.graphs:
        return median_step([_host_step(phase, run, weights) for run in launched])
    launches = _launches(launched[-1], weights)
    replayed = _runs(phases, phase, phases.run, device)
    return median_step([_device_step(phase, run, launches, weights) for run in replayed])


def _runs(phases: Phases, phase: str, run: Callable[[str], Any], device: Backend) -> list[Any]:
    """Return what the profiler saw of several steps, each alone, after one that warms it up."""
    results: list[Any] = []
    left = 0
    started = time.monotonic()
    while len(results) < _STEPS and (
        len(results) < _FEWEST_STEPS or time.monotonic() - started < _ENOUGH_S
    ):
        if left == 0:
            phases.reset(phase)
            left = phases.limit(phase)
        left -= 1
        device.synchronize()
        with profile(
            activities=device.profiler_activities, record_shapes=True, acc_events=True
        ) as profiler:
            with record_function(_STEP):
                run(phase)
            device.synchronize()
        assert profiler.profiler is not None
        results.append(profiler.profiler.kineto_results)
    return results[1:]  # the first warms up the profiler


def _host_step(phase: str, results: Any, weights: Weights) -> StepProfile:
    step = _step_event(results)
    kernels = [
        KernelTime(
            name=operator.name,
            kind=LINEAR if operator.layers else glue_kind(operator.name),
            layers=operator.layers,
            start_us=(operator.start_ns - step.start_time_ns) / 1e3,
            duration_us=(operator.end_ns - operator.start_ns) / 1e3,
        )
        for operator in operators(step, weights)
    ]
    return StepProfile(phase=phase, step_us=step.duration_time_ns / 1e3, kernels=tuple(kernels))


def _step_event(results: Any) -> Any:
    """Return the event of the whole step on the host."""
    return next(event for event in results.experimental_event_tree() if event.name == _STEP)


def _launches(results: Any, weights: Weights) -> list[_Launch]:
    """Return the kernels of a run that launched each of them, in the order in which they ran."""
    started = _started(results, weights)
    return [
        _Launch(event.name(), started.get(event.linked_correlation_id()))
        for event in _device_events(results)
    ]


def _started(results: Any, weights: Weights) -> dict[int, Operator]:
    """Return operators by the ids with which the profiler links their kernels."""
    return {
        identity: operator
        for operator in operators(_step_event(results), weights)
        for identity in operator.ids
    }


def _device_events(results: Any) -> list[Any]:
    """Return kernels, copies and fills on the GPU, in the order in which they ran."""
    events = [
        event
        for event in results.events()
        if event.device_type() != DeviceType.CPU
        and not event.is_user_annotation()
        and event.name() != _STEP
    ]
    if not events:
        raise DeviceError(
            "PyTorch's profiler saw no kernel on the GPU: its counters may be kept to the"
            " administrator here"
        )
    return sorted(events, key=lambda event: event.start_ns())


def _device_step(
    phase: str, results: Any, launches: Sequence[_Launch], weights: Weights
) -> StepProfile:
    """Return a replayed step. An earlier run's `launches` identify its graph's kernels."""
    started = _started(results, weights)
    events = _device_events(results)
    found = match_launches([launch.name for launch in launches], [event.name() for event in events])
    first = end_ns = events[0].start_ns()
    kernels = []
    # Kernels may overlap: each counts from where the ones before it have ended.
    for event, position in zip(events, found, strict=True):
        operator = started.get(event.linked_correlation_id())
        if operator is None and position is not None:
            operator = launches[position].operator
        start_ns, end_ns = max(event.start_ns(), end_ns), max(event.end_ns(), end_ns)
        kernels.append(
            _device_kernel(
                event.name(), operator, (start_ns - first) / 1e3, (end_ns - start_ns) / 1e3
            )
        )
    return StepProfile(phase=phase, step_us=(end_ns - first) / 1e3, kernels=tuple(kernels))


def _device_kernel(
    name: str, operator: Operator | None, start_us: float, duration_us: float
) -> KernelTime:
    layers = operator.layers if operator else ()
    if operator is None:
        kind = UNKNOWN
    else:
        kind = LINEAR if layers else glue_kind(f"{operator.name} {name}")
    return KernelTime(
        name=name, kind=kind, layers=layers, start_us=start_us, duration_us=duration_us
    )


def match_launches(launched: Sequence[str], replayed: Sequence[str]) -> list[int | None]:
    """Return for each replayed kernel the position of the same launched one.

    It has the same name, in the same order. None marks where the two runs differ.
    """
    found: list[int | None] = [None] * len(replayed)
    for block in SequenceMatcher(None, launched, replayed, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            found[block.b + offset] = block.a + offset
    return found
