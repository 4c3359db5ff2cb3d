"""The timing of one linear by each of several candidates, compared in turn.

Protocol 3:

- A candidate is traced and compiled as the whole model will be. On a CPU the compiled code holds
  `unroll` independent linears, each with its own input, so that many share the cost of a call from
  Python. On CUDA calls are captured in a CUDA graph. What only calls a library's kernels is not
  compiled there, since that would change nothing.
- As in a model, activations are `[1, m, k]`. On a CPU elementwise operations of the same code make
  and consume them. So a kernel gets the memory layouts that it will get in a model, and the
  compiler fuses into its neighbours what it will fuse there. (With m = 1 that decides whether a
  result is right: PyTorch 2.13's `_int_mm` for CPUs returns garbage for the strides that compiled
  code gives a single row.) On CUDA each neighbour would be a launch as long as a small linear.
- Weights are cold: they rotate through one arena of `working_set_bytes`, which all candidates
  share. A model reads all its other weights between two uses of one, so the working set is the
  model's size, or twice the last-level cache if the model is larger.
- The arena holds random bytes that are ordinary numbers in every dtype used here (no zeros, NaN or
  subnormals).
- Results are checked against a float32 reference with real quantized weights: every output,
  compiled and eager, before the timing. After it the same compiled code is checked with other
  numbers in the same memory, and called again and again: its results must stay the same, bit for
  bit where the device and the kernel promise that. The others are timed once more without a kernel
  that is found wrong.
- A comparison is repeated if something disturbed it (see `autoquant.devices.watch`), and marked if
  that goes on.
- Candidates are timed in turn, round after round. Those far behind are dropped after the first
  rounds and keep their samples; close ones get more rounds. Compilation and warm-up are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autoquant.candidates import Candidate, Format, Kernel, multiplied_numbers
from autoquant.candidates.check import MAX_RELATIVE_ERROR, reference
from autoquant.candidates.flat import flatten_tensor, stored_bytes, unflatten_tensor
from autoquant.devices import backend
from autoquant.devices.clocks import Clock
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.devices.watch import Watch
from autoquant.errors import first_line
from autoquant.files import raise_if_full
from autoquant.profiler.checks import ResultCheck
from autoquant.records import LinearShape, Measurement, TimingSubject
from autoquant.runtime.parts import as_if_compiled

__all__ = ["MAX_RELATIVE_ERROR", "PROTOCOL", "Arena", "LinearToTime", "compare", "try_out"]

PROTOCOL = "3"
_FIRST_ROUNDS = 4
_DROP_BEYOND = 1.6
_TIE_WITHIN = 1.15
_ALIGNMENT = 64
_BENIGN_BYTES = (0x3A, 0x3B, 0x3C, 0x3D, 0xBA, 0xBB, 0xBC, 0xBD)


class Arena:
    """Memory that weights are rotated through.

    Args:
        size_bytes: How much is read between two uses of the same byte.
        device: The torch device that it lies on.
    """

    def __init__(self, size_bytes: int, device: str) -> None:
        palette = torch.tensor(_BENIGN_BYTES, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        block = palette[
            torch.randint(0, len(palette), (min(size_bytes, 1 << 20),), generator=generator)
        ]
        self.bytes = block.repeat(-(-size_bytes // block.numel()))[:size_bytes].to(device)

    def views(self, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Return as many disjoint copies of `tensors` as fit, at least one.

        A copy has the same shapes and dtypes, not the same numbers.
        """
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        if sum(sizes) > self.bytes.numel():
            return [list(tensors)]
        starts = range(0, self.bytes.numel() - sum(sizes) + 1, sum(sizes))
        return [self._copy(tensors, sizes, start) for start in starts]

    def _copy(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], start: int
    ) -> list[torch.Tensor]:
        copies = []
        for tensor, size in zip(tensors, sizes, strict=True):
            copies.append(
                self.bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            )
            start += size
        return copies


@dataclass(slots=True)
class _Entrant:
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
        self.weight = (normal(shape.n, shape.k) / shape.k**0.5).to(dtype)
        self.bias = (normal(shape.n) * 0.1).to(dtype) if shape.bias else None
        x = normal(1, m, shape.k).to(dtype)
        self.inputs = [x.clone() for _ in range(1 if self.backend.graphs else _unroll(m))]

    def change_inputs(self) -> None:
        """Put other numbers into the same memory: the negative ones, in another order."""
        changed = -self.inputs[0].roll(1, dims=-1)
        for x in self.inputs:
            x.copy_(changed)


def compare(
    shape: LinearShape,
    m: int,
    candidates: Sequence[Candidate],
    *,
    arena: Arena,
    device: str,
    compiled: bool,
    decided: Mapping[TimingSubject, Measurement] | None = None,
    on_candidate: Callable[[TimingSubject | None], None] = lambda _subject: None,
    effort: TimingEffort | None = None,
) -> list[Measurement]:
    """Time `candidates` on one shape and m, each against the others.

    Args:
        compiled: Compile with Inductor; otherwise run as traced.
        decided: Outcomes that are known already: these candidates are not prepared.
        on_candidate: Takes each candidate when its preparation starts, and None when that of the
            last has ended.
        effort: None for that of the process.

    Returns:
        One measurement per candidate, in order. One that is unsupported, wrong or fails says why.
    """
    effort = effort or timing_effort()
    linear = LinearToTime(shape, m, device)
    results = dict(decided or {})
    entrants: list[_Entrant] = []
    subjects = []
    for candidate in candidates:
        fmt, kernel = candidate.format, candidate.kernel
        subject = TimingSubject(
            shape=shape, m=m, format=fmt.id, kernel=kernel.id, working_set_bytes=arena.bytes.numel()
        )
        subjects.append(subject)
        if subject in results:
            continue
        on_candidate(subject)
        entered = _enter(subject, fmt, kernel, linear, arena, compiled, effort)
        if isinstance(entered, Measurement):
            results[subject] = entered
        else:
            entrants.append(entered)
    on_candidate(None)
    results |= _timed(entrants, linear, effort)
    return [results[subject] for subject in subjects]


def _timed(
    entrants: Sequence[_Entrant], linear: LinearToTime, effort: TimingEffort
) -> dict[TimingSubject, Measurement]:
    """Race, check the results once more, and race again without those that are wrong."""
    results: dict[TimingSubject, Measurement] = {}
    racing = list(entrants)
    while racing:
        disturbance = _race_undisturbed(racing, linear.device, effort)
        linear.change_inputs()
        unusable = {
            entrant.subject: found
            for entrant in racing
            if (found := _checked_again(entrant, effort)) is not None
        }
        results |= unusable
        racing = [entrant for entrant in racing if entrant.subject not in unusable]
        if not unusable:
            break
    for entrant in racing:
        results[entrant.subject] = Measurement(
            subject=entrant.subject,
            outcome="ok",
            reason=f"measured while {disturbance}" if disturbance else "",
            samples_us=tuple(round(sample, 3) for sample in entrant.samples_us),
            relative_error=entrant.relative_error,
        )
    return results


def _checked_again(entrant: _Entrant, effort: TimingEffort) -> Measurement | None:
    """Return the outcome of a candidate that failed while it was timed or is wrong now, or None."""
    if entrant.failure:
        return Measurement(
            subject=entrant.subject, outcome="failed", reason=f"while timed: {entrant.failure}"
        )
    try:
        wrong = entrant.check.after(effort.repeat_s)
    except Exception as error:  # noqa: BLE001 - any error of a kernel is an outcome
        reason = f"after it was timed: {first_line(error, with_type=True)}"
        return Measurement(subject=entrant.subject, outcome="failed", reason=reason)
    if not wrong:
        return None
    return Measurement(
        subject=entrant.subject,
        outcome="incorrect",
        reason=wrong,
        relative_error=entrant.relative_error,
    )


def try_out(
    subject: TimingSubject, fmt: Format, kernel: Kernel, linear: LinearToTime, *, compiled: bool
) -> tuple[Measurement, int]:
    """Prepare one candidate and run it a few times, alone.

    Returns:
        The measurement, and the bytes of the stored weight (0 if it is not ok).
    """
    entered = _enter(
        subject, fmt, kernel, linear, Arena(1, linear.device), compiled, timing_effort()
    )
    if isinstance(entered, Measurement):
        return entered, 0
    entered.samples_us += [entered.clock.sample() for _ in range(_FIRST_ROUNDS)]
    linear.change_inputs()
    if (unusable := _checked_again(entered, timing_effort())) is not None:
        return unusable, 0
    measurement = Measurement(
        subject=subject,
        outcome="ok",
        samples_us=tuple(entered.samples_us),
        relative_error=entered.relative_error,
    )
    return measurement, stored_bytes(fmt.store(linear.weight))


def _unroll(m: int) -> int:
    return 8 if m <= 64 else 2


def _enter(
    subject: TimingSubject,
    fmt: Format,
    kernel: Kernel,
    linear: LinearToTime,
    arena: Arena,
    compiled: bool,
    effort: TimingEffort,
) -> _Entrant | Measurement:
    """Return a candidate ready to be timed, or the outcome that prevents it."""
    reason = fmt.unsupported_reason(kernel, subject.shape, subject.m, linear.backend.type)
    if reason:
        return Measurement(subject=subject, outcome="unsupported", reason=reason)
    try:
        entrant = _prepare(subject, fmt, kernel, linear, arena, compiled, effort)
        error, wrong = entrant.check.before()
        if not wrong:
            entrant.relative_error = error
            entrant.clock.start()
            return entrant
    except Exception as failure:  # noqa: BLE001 - any error of a kernel or compiler is an outcome
        raise_if_full(failure)
        return Measurement(
            subject=subject, outcome="failed", reason=first_line(failure, with_type=True)
        )
    return Measurement(subject=subject, outcome="incorrect", reason=wrong, relative_error=error)


def _prepare(
    subject: TimingSubject,
    fmt: Format,
    kernel: Kernel,
    linear: LinearToTime,
    arena: Arena,
    compiled: bool,
    effort: TimingEffort,
) -> _Entrant:
    """Trace and compile one candidate."""
    stored = fmt.store(linear.weight)
    parts, rebuild = flatten_tensor(stored)
    copies = arena.views(parts)
    unroll = min(len(linear.inputs), len(copies))
    inputs, bias = linear.inputs[:unroll], linear.bias
    biases = [] if bias is None else [bias]
    graphs = linear.backend.graphs

    def compute(args: list[torch.Tensor]) -> list[torch.Tensor]:
        xs, rest = args[:unroll], args[unroll + len(biases) :]
        bias_arg = args[unroll] if biases else None
        weights = [
            unflatten_tensor(rebuild, rest[i * len(parts) : (i + 1) * len(parts)])
            for i in range(unroll)
        ]
        if graphs:
            return [kernel.linear(x, w, bias_arg) for x, w in zip(xs, weights, strict=True)]
        return [-kernel.linear(-x, w, bias_arg) for x, w in zip(xs, weights, strict=True)]

    # Each call reads the next `unroll` copies of the weight, so that none is still in the cache.
    groups: list[list[torch.Tensor]] = []
    for start in range(0, len(copies), unroll):
        taken = [copies[(start + i) % len(copies)] for i in range(unroll)]
        groups.append([*inputs, *biases, *chain.from_iterable(taken)])
    with torch.no_grad():
        # Traced on distinct tensors: one that came twice would be read once.
        run: Callable[[list[torch.Tensor]], Any] = compute
        if not (graphs and kernel.opaque):
            # The compiler needs no real tensors: they would be computed, and held to the end.
            fake = compiled and not graphs
            with as_if_compiled(compiled):
                run = make_fx(compute, tracing_mode="fake" if fake else "real")(groups[0])
                run = _compile(run, groups[0]) if compiled else run
    sign = 1 if graphs else -1
    real = [*inputs, *biases, *(parts * unroll)]

    def expected() -> torch.Tensor:
        numbers = multiplied_numbers(fmt, stored, kernel.numerics)
        return sign * reference(kernel, numbers, sign * inputs[0], bias)

    check = ResultCheck(
        run=lambda: run(list(real)),
        eager=None if run is compute else lambda: compute(list(real)),
        expected=expected,
        dtype=getattr(torch, subject.shape.dtype),
        repeats=kernel.repeats and linear.backend.repeats,
    )

    def call(position: int) -> object:
        with torch.no_grad():
            return run(groups[position])

    return _Entrant(subject, linear.backend.clock(call, len(groups), unroll, effort), check)


def _compile(traced: Any, example: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], Any]:
    import torch._inductor

    arguments: list[Any] = [example]
    compiled: Callable[[list[torch.Tensor]], Any] = torch._inductor.compile(traced, arguments)
    return compiled


def _race_undisturbed(entrants: list[_Entrant], device: str, effort: TimingEffort) -> str:
    """Race, again while something disturbs it.

    Return what disturbed the race that counts, or an empty string.
    """
    disturbance = ""
    for attempt in range(effort.attempts):
        for entrant in entrants:
            entrant.samples_us.clear()
        watch = Watch(backend(device).watch_load())
        _race(entrants, effort)
        disturbance = watch.disturbance(effort.highest_other_load)
        if not disturbance:
            break
        time.sleep(attempt if attempt + 1 < effort.attempts else 0)
    return disturbance


def _race(entrants: list[_Entrant], effort: TimingEffort) -> None:
    """Time the entrants in turn until only close ones are left and rounds or time run out."""
    racing = [entrant for entrant in entrants if not entrant.failure]
    started = time.perf_counter()
    for round_number in range(effort.linear_rounds):
        for entrant in racing:
            _sample(entrant)
        racing = [entrant for entrant in racing if not entrant.failure]
        if not racing:
            break
        if round_number + 1 >= _FIRST_ROUNDS:
            limit = min(entrant.best_us for entrant in racing) * (
                _DROP_BEYOND if round_number + 1 < 2 * _FIRST_ROUNDS else _TIE_WITHIN
            )
            racing = [entrant for entrant in racing if entrant.best_us <= limit]
        if (
            time.perf_counter() - started > effort.linear_budget_s
            and round_number + 1 >= _FIRST_ROUNDS
        ):
            break


def _sample(entrant: _Entrant) -> None:
    try:
        entrant.samples_us.append(entrant.clock.sample())
    except Exception as error:  # noqa: BLE001 - any error of a kernel is an outcome
        entrant.failure = first_line(error, with_type=True)
