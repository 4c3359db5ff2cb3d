"""One candidate of a comparison: traced, compiled, checked once, and ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autoquant.candidates import Candidate, multiplied_numbers
from autoquant.candidates.check import reference
from autoquant.candidates.flat import flatten_tensor, unflatten_tensor
from autoquant.devices import backend
from autoquant.devices.clocks import Clock
from autoquant.devices.effort import TimingEffort
from autoquant.errors import first_line
from autoquant.files import raise_if_full
from autoquant.profiler.arena import Arena
from autoquant.profiler.checks import ResultCheck
from autoquant.records import LinearShape, Measurement, TimingSubject
from autoquant.runtime.parts import as_if_compiled

_Compute = Callable[[list[torch.Tensor]], Any]
"""Takes inputs, the bias if there is one, and the tensors of as many weights as inputs."""


@dataclass(slots=True)
class Entrant:
    """One candidate in a comparison.

    Attributes:
        failure: Why it could not be timed to the end, or an empty string.
    """

    subject: TimingSubject
    clock: Clock
    check: ResultCheck
    relative_error: float = 0.0
    failure: str = ""
    samples_us: list[float] = field(default_factory=list)

    @property
    def best_us(self) -> float:
        """The least sample: what disturbs a call only makes it longer."""
        return min(self.samples_us)


class LinearToTime:
    """One linear to time: weight `[n, k]`, bias, and inputs `[1, m, k]`.

    A timed call computes several linears, and has an input for each, all with the same numbers.
    """

    def __init__(self, shape: LinearShape, m: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.shape, self.m, self.device = shape, m, device
        self.backend = backend(device)
        # Outputs are about 1, whatever k is.
        self.weight = (normal(shape.n, shape.k) / shape.k**0.5).to(dtype)
        self.bias = (normal(shape.n) * 0.1).to(dtype) if shape.bias else None
        x = normal(1, m, shape.k).to(dtype)
        self.inputs = [x.clone() for _ in range(1 if self.backend.graphs else linears_a_call(m))]

    def change_inputs(self) -> None:
        """Put other numbers into the same memory: the negative ones, in another order."""
        changed = -self.inputs[0].roll(1, dims=-1)
        for x in self.inputs:
            x.copy_(changed)


def linears_a_call(m: int) -> int:
    """Return how many linears share the cost of a call, which counts most where m is small."""
    return 8 if m <= 64 else 2


def enter(
    subject: TimingSubject,
    candidate: Candidate,
    linear: LinearToTime,
    arena: Arena,
    compiled: bool,
    effort: TimingEffort,
) -> Entrant | Measurement:
    """Return a candidate ready to be timed, or the outcome that prevents it."""
    reason = candidate.unsupported_reason(subject.shape, subject.m, linear.backend.type)
    if reason:
        return Measurement(subject=subject, outcome="unsupported", reason=reason)
    try:
        clock, check = _prepare(candidate, linear, arena, compiled, effort)
        error, wrong = check.before()
        if not wrong:
            clock.start()
            return Entrant(subject, clock, check, relative_error=error)
    except Exception as failure:  # noqa: BLE001 - any error of a kernel or compiler is an outcome
        raise_if_full(failure)
        return Measurement(
            subject=subject, outcome="failed", reason=first_line(failure, with_type=True)
        )
    return Measurement(subject=subject, outcome="incorrect", reason=wrong, relative_error=error)


def _prepare(
    candidate: Candidate, linear: LinearToTime, arena: Arena, compiled: bool, effort: TimingEffort
) -> tuple[Clock, ResultCheck]:
    """Trace and compile one candidate; return what times it, and what checks its results."""
    fmt, kernel = candidate.format, candidate.kernel
    stored = fmt.sample(linear.weight)
    parts, rebuild = flatten_tensor(stored)
    copies = arena.views(parts, linear.backend.most_copies)
    unroll = min(len(linear.inputs), len(copies))
    bias = linear.bias
    biases = [] if bias is None else [bias]
    shared = [*linear.inputs[:unroll], *biases]
    graphs = linear.backend.graphs

    def compute(args: list[torch.Tensor]) -> list[torch.Tensor]:
        xs, rest = args[:unroll], args[len(shared) :]
        bias_arg = args[unroll] if biases else None
        starts = range(0, unroll * len(parts), len(parts))
        weights = [unflatten_tensor(rebuild, rest[i : i + len(parts)]) for i in starts]
        results = []
        for x, weight in zip(xs, weights, strict=True):
            if graphs:
                results.append(kernel.linear(x, weight, bias_arg))
                continue
            # The signs stand for the elementwise operations around a linear in a model.
            y = kernel.linear(-x, weight, bias_arg)
            results.append(-y)
        return results

    groups = [[*shared, *weights] for weights in _rotation(copies, unroll)]
    run: _Compute = compute
    if not (graphs and kernel.opaque):
        # The compiler needs no real tensors: they would be computed, and held to the end.
        fake = compiled and not graphs
        with torch.no_grad(), as_if_compiled(compiled):
            # Traced on distinct tensors: one that came twice would be read once.
            run = make_fx(compute, tracing_mode="fake" if fake else "real")(groups[0])
            run = _compile(run, groups[0]) if compiled else run
    sign = 1 if graphs else -1
    real = [*shared, *(parts * unroll)]

    def expected() -> torch.Tensor:
        numbers = multiplied_numbers(fmt, stored, kernel.numerics)
        rounding = fmt.activation_rounding(kernel.numerics, stored)
        return sign * reference(rounding, numbers, sign * linear.inputs[0], bias)

    check = ResultCheck(
        run=lambda: run(list(real)),
        eager=None if run is compute else lambda: compute(list(real)),
        expected=expected,
        dtype=getattr(torch, linear.shape.dtype),
        repeats=kernel.repeats and linear.backend.repeats,
    )

    def call(position: int) -> object:
        with torch.no_grad():
            return run(groups[position])

    return linear.backend.clock(call, len(groups), unroll, effort), check


def _rotation(
    copies: Sequence[Sequence[torch.Tensor]], unroll: int
) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors of the weights that each call reads, for one round through all copies.

    A call reads the next `unroll` copies, so that none is still in the cache.
    """
    for start in range(0, len(copies), unroll):
        weights = [copies[(start + i) % len(copies)] for i in range(unroll)]
        yield list(chain.from_iterable(weights))


def _compile(traced: Any, example: list[torch.Tensor]) -> _Compute:
    import torch._inductor

    arguments: list[Any] = [example]
    compiled: _Compute = torch._inductor.compile(traced, arguments)
    return compiled
