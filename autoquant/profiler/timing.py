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
- A result is checked against a float32 reference with real quantized weights before its time
  counts.
- A comparison is repeated if the machine was busy with something else, and marked if it stays busy.
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
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from autoquant.candidates import ACTIVATION_ROUNDING, Candidate, Format, Kernel, multiplied_numbers
from autoquant.candidates.flat import flatten_tensor, stored_bytes, unflatten_tensor
from autoquant.devices import backend
from autoquant.devices.clocks import Clock
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.errors import first_line
from autoquant.files import raise_if_full
from autoquant.records import LinearShape, Measurement, TimingSubject

PROTOCOL = "3"
MAX_RELATIVE_ERROR = 0.02
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
    """One candidate in a comparison."""

    subject: TimingSubject
    clock: Clock
    relative_error: float
    samples_us: list[float] = field(default_factory=list)

    @property
    def best_us(self) -> float:
        return min(self.samples_us)


class LinearToTime:
    """One linear to time: weight `[n, k]`, bias, and inputs `[1, m, k]`.

    A timed call computes several linears, and has an input for each.
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
        self.inputs = [
            normal(1, m, shape.k).to(dtype) for _ in range(1 if self.backend.graphs else _unroll(m))
        ]


def compare(
    shape: LinearShape,
    m: int,
    candidates: Sequence[Candidate],
    *,
    arena: Arena,
    device: str,
    compiled: bool,
    decided: Mapping[TimingSubject, Measurement] | None = None,
    on_candidate: Callable[[str], None] = lambda _name: None,
    effort: TimingEffort | None = None,
) -> list[Measurement]:
    """Time `candidates` on one shape and m, each against the others.

    Args:
        compiled: Compile with Inductor; otherwise run as traced.
        decided: Outcomes that are known already: these candidates are not prepared.
        on_candidate: Takes the name of each candidate when its preparation starts.
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
        on_candidate(subject.candidate)
        entered = _enter(subject, fmt, kernel, linear, arena, compiled, effort)
        if isinstance(entered, Measurement):
            results[subject] = entered
        else:
            entrants.append(entered)
    others = _race_undisturbed(entrants, device, effort)
    reason = (
        f"measured while others used {others:.0%} of the machine"
        if others > effort.highest_other_load
        else ""
    )
    for entrant in entrants:
        results[entrant.subject] = Measurement(
            subject=entrant.subject,
            outcome="ok",
            reason=reason,
            samples_us=tuple(round(sample, 3) for sample in entrant.samples_us),
            relative_error=entrant.relative_error,
        )
    return [results[subject] for subject in subjects]


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
    samples = tuple(entered.clock.sample() for _ in range(_FIRST_ROUNDS))
    measurement = Measurement(
        subject=subject, outcome="ok", samples_us=samples, relative_error=entered.relative_error
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
        error = entrant.relative_error
        if error <= MAX_RELATIVE_ERROR:  # NaN counts as incorrect
            entrant.clock.start()
            return entrant
    except Exception as failure:  # noqa: BLE001 - any error of a kernel or compiler is an outcome
        raise_if_full(failure)
        return Measurement(
            subject=subject, outcome="failed", reason=first_line(failure, with_type=True)
        )
    reason = f"relative error {error:.3g} against the float32 reference"
    return Measurement(subject=subject, outcome="incorrect", reason=reason, relative_error=error)


def _prepare(
    subject: TimingSubject,
    fmt: Format,
    kernel: Kernel,
    linear: LinearToTime,
    arena: Arena,
    compiled: bool,
    effort: TimingEffort,
) -> _Entrant:
    """Trace, compile and check one candidate."""
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
            run = make_fx(compute, tracing_mode="fake" if fake else "real")(groups[0])
            run = _compile(run, groups[0]) if compiled else run
        outputs = run([*inputs, *biases, *(parts * unroll)])
        sign = 1 if graphs else -1
        reference = sign * F.linear(
            ACTIVATION_ROUNDING[kernel.numerics](sign * inputs[0].float()),
            multiplied_numbers(fmt, stored, kernel.numerics),
            None if bias is None else bias.float(),
        )
        error = ((outputs[0].float() - reference).norm() / reference.norm()).item()

    def call(position: int) -> object:
        with torch.no_grad():
            return run(groups[position])

    return _Entrant(subject, linear.backend.clock(call, len(groups), unroll, effort), error)


def _compile(traced: Any, example: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], Any]:
    import torch._inductor

    arguments: list[Any] = [example]
    compiled: Callable[[list[torch.Tensor]], Any] = torch._inductor.compile(traced, arguments)
    return compiled


def _race_undisturbed(entrants: list[_Entrant], device: str, effort: TimingEffort) -> float:
    """Race, again while others disturb it.

    Return the fraction of the machine that they used in the race that counts.
    """
    share = 0.0
    if not entrants:
        return share
    for attempt in range(effort.attempts):
        for entrant in entrants:
            entrant.samples_us.clear()
        watch = backend(device).watch_load()
        _race(entrants, effort)
        share = watch.share()
        if share <= effort.highest_other_load:
            break
        time.sleep(attempt if attempt + 1 < effort.attempts else 0)
    return share


def _race(entrants: list[_Entrant], effort: TimingEffort) -> None:
    """Time the entrants in turn until only close ones are left and rounds or time run out."""
    racing = list(entrants)
    started = time.perf_counter()
    for round_number in range(effort.linear_rounds):
        for entrant in racing:
            entrant.samples_us.append(entrant.clock.sample())
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
