"""The clock: how long one linear takes by each of several candidates, compared in turn.

Protocol 3:

- A candidate is traced and compiled as the whole model will be. On a CPU the graph holds `unroll` independent linears with
  inputs of their own, so that the cost of a call from Python is shared by many; on CUDA calls are captured in a CUDA graph,
  and what only calls a library's kernels is not compiled, since that would change nothing.
- As in a model, activations are `[1, m, k]`. On a CPU they are made and consumed by elementwise operations of the same graph:
  a kernel gets the memory layouts that it will get there, and what the compiler fuses into its neighbours is fused here too.
  (With m = 1 that decides whether a result is right: PyTorch 2.13's `_int_mm` for CPUs returns garbage for the strides that
  compiled code gives a single row.) On CUDA such neighbours would be launches of their own, as long as a small linear.
- Weights are cold: the graphs' weights rotate through one arena of `working_set_bytes`, which all candidates share. In a
  model every weight is read once between two uses of the same one, so the working set is the model's own size, or twice
  the last-level cache where the model is larger.
- The arena holds random bytes that are ordinary numbers in every dtype used here (no zeros, NaN or subnormals).
- A result is checked against a float32 reference with real quantized weights before its time counts.
- Comparisons during which the machine was busy with something else are repeated, and marked where that does not help.
- Candidates are timed in turn, round after round. Those far behind are dropped after the first rounds and keep what was
  measured of them; close ones get more rounds. Compilation and warm-up are off the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from autoquant.candidates import ACTIVATION_ROUNDING, Candidate, Format, Kernel, multiplied_numbers
from autoquant.candidates.flat import flatten_tensor, stored_bytes, unflatten_tensor
from autoquant.devices.load import HIGHEST_OTHER_LOAD, watch_load
from autoquant.errors import first_line
from autoquant.profiler.clocks import Clock, GraphClock, HostClock
from autoquant.records import LinearShape, Measurement, TimingSubject

PROTOCOL = "3"
MAX_RELATIVE_ERROR = 0.02
_FIRST_ROUNDS = 4
_MAX_ROUNDS = 16
_DROP_BEYOND = 1.6
_TIE_WITHIN = 1.15
_SAMPLE_BUDGET_S = 1.5
_ATTEMPTS = 3
_ALIGNMENT = 64
_BENIGN_BYTES = (0x3A, 0x3B, 0x3C, 0x3D, 0xBA, 0xBB, 0xBC, 0xBD)


class Arena:
    """Memory that weights are rotated through.

    Args:
        size_bytes: How much is swept between two uses of the same byte.
        device: Where it lies.
    """

    def __init__(self, size_bytes: int, device: str) -> None:
        palette = torch.tensor(_BENIGN_BYTES, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        block = palette[torch.randint(0, len(palette), (min(size_bytes, 1 << 20),), generator=generator)]
        self.bytes = block.repeat(-(-size_bytes // block.numel()))[:size_bytes].to(device)

    def views(self, tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """As many disjoint copies of `tensors` (same shapes and dtypes, other values) as fit, at least one."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        if sum(sizes) > self.bytes.numel():
            return [list(tensors)]
        starts = range(0, self.bytes.numel() - sum(sizes) + 1, sum(sizes))
        return [self._copy(tensors, sizes, start) for start in starts]

    def _copy(self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], start: int) -> list[torch.Tensor]:
        copies = []
        for tensor, size in zip(tensors, sizes, strict=True):
            copies.append(self.bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
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


class Problem:
    """One linear to compute: weight `[n, k]`, bias and as many inputs `[1, m, k]` as a graph has linears."""

    def __init__(self, shape: LinearShape, m: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.shape, self.m, self.device = shape, m, device
        self.on_cuda = torch.device(device).type == "cuda"
        self.weight = (normal(shape.n, shape.k) / shape.k**0.5).to(dtype)
        self.bias = (normal(shape.n) * 0.1).to(dtype) if shape.bias else None
        self.inputs = [normal(1, m, shape.k).to(dtype) for _ in range(1 if self.on_cuda else _unroll(m))]


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
) -> list[Measurement]:
    """Time `candidates` on one shape and m, each against the others.

    Args:
        compiled: Compile each graph with inductor; otherwise run it as traced.
        decided: Outcomes that are known already: these candidates are not prepared.
        on_candidate: Told the name of each candidate when its preparation starts.

    Returns:
        One measurement per candidate, in order. One that is unsupported, wrong or fails says why.
    """
    problem = Problem(shape, m, device)
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
        entered = _enter(subject, fmt, kernel, problem, arena, compiled)
        if isinstance(entered, Measurement):
            results[subject] = entered
        else:
            entrants.append(entered)
    others = _race_undisturbed(entrants, device)
    reason = f"measured while others used {others:.0%} of the machine" if others > HIGHEST_OTHER_LOAD else ""
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
    subject: TimingSubject, fmt: Format, kernel: Kernel, problem: Problem, *, compiled: bool
) -> tuple[Measurement, int]:
    """Prepare one candidate and run it a few times: what would be its outcome, with latencies that nobody compares.

    Returns:
        The measurement, and the bytes of the stored weight (0 where there is none).
    """
    entered = _enter(subject, fmt, kernel, problem, Arena(1, problem.device), compiled)
    if isinstance(entered, Measurement):
        return entered, 0
    samples = tuple(entered.clock.sample() for _ in range(_FIRST_ROUNDS))
    measurement = Measurement(subject=subject, outcome="ok", samples_us=samples, relative_error=entered.relative_error)
    return measurement, stored_bytes(fmt.store(problem.weight))


def _unroll(m: int) -> int:
    return 8 if m <= 64 else 2


def _enter(
    subject: TimingSubject, fmt: Format, kernel: Kernel, problem: Problem, arena: Arena, compiled: bool
) -> _Entrant | Measurement:
    """A candidate ready to be timed, or the outcome that keeps it from that."""
    reason = fmt.unsupported_reason(kernel, subject.shape, subject.m, torch.device(problem.device).type)
    if reason:
        return Measurement(subject=subject, outcome="unsupported", reason=reason)
    try:
        entrant = _prepare(subject, fmt, kernel, problem, arena, compiled)
        error = entrant.relative_error
        if error <= MAX_RELATIVE_ERROR:  # NaN counts as incorrect
            entrant.clock.start()
            return entrant
    except Exception as failure:  # noqa: BLE001 - whatever a kernel or compiler raises is an outcome with its reason
        return Measurement(subject=subject, outcome="failed", reason=first_line(failure, with_type=True))
    reason = f"relative error {error:.3g} against the float32 reference"
    return Measurement(subject=subject, outcome="incorrect", reason=reason, relative_error=error)


def _prepare(
    subject: TimingSubject, fmt: Format, kernel: Kernel, problem: Problem, arena: Arena, compiled: bool
) -> _Entrant:
    """Trace, compile and check one candidate."""
    stored = fmt.store(problem.weight)
    parts, rebuild = flatten_tensor(stored)
    copies = arena.views(parts)
    unroll = min(len(problem.inputs), len(copies))
    inputs, bias = problem.inputs[:unroll], problem.bias
    biases = [] if bias is None else [bias]
    on_cuda = problem.on_cuda

    def graph(args: list[torch.Tensor]) -> list[torch.Tensor]:
        xs, rest = args[:unroll], args[unroll + len(biases) :]
        bias_arg = args[unroll] if biases else None
        weights = [unflatten_tensor(rebuild, rest[i * len(parts) : (i + 1) * len(parts)]) for i in range(unroll)]
        if on_cuda:
            return [kernel.linear(x, w, bias_arg) for x, w in zip(xs, weights, strict=True)]
        return [-kernel.linear(-x, w, bias_arg) for x, w in zip(xs, weights, strict=True)]

    groups = [
        [*inputs, *biases, *(part for i in range(unroll) for part in copies[(start + i) % len(copies)])]
        for start in range(0, len(copies), unroll)
    ]
    with torch.no_grad():
        # Traced on distinct tensors: one that came twice would be read once.
        run: Callable[[list[torch.Tensor]], Any] = graph
        if not (on_cuda and kernel.opaque):
            # For the compiler fake tensors are enough; real ones would all be computed, and held until the end.
            fake = compiled and not on_cuda
            run = make_fx(graph, tracing_mode="fake" if fake else "real")(groups[0])
            run = _compile(run, groups[0]) if compiled else run
        outputs = run([*inputs, *biases, *(parts * unroll)])
        sign = 1 if on_cuda else -1
        reference = sign * F.linear(
            ACTIVATION_ROUNDING[kernel.numerics](sign * inputs[0].float()),
            multiplied_numbers(fmt, stored, kernel.numerics),
            None if bias is None else bias.float(),
        )
        error = ((outputs[0].float() - reference).norm() / reference.norm()).item()

    def call(position: int) -> object:
        with torch.no_grad():
            return run(groups[position])

    clock: Clock = (
        GraphClock(call, len(groups), problem.device)
        if on_cuda
        else HostClock(call, len(groups), unroll, problem.device)
    )
    return _Entrant(subject, clock, error)


def _compile(traced: Any, example: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], Any]:
    import torch._inductor

    arguments: list[Any] = [example]
    compiled: Callable[[list[torch.Tensor]], Any] = torch._inductor.compile(traced, arguments)
    return compiled


def _race_undisturbed(entrants: list[_Entrant], device: str) -> float:
    """Race, again while the machine is busy with something else; returns the others' share of it in the race that counts."""
    share = 0.0
    if not entrants:
        return share
    for attempt in range(_ATTEMPTS):
        for entrant in entrants:
            entrant.samples_us.clear()
        watch = watch_load(device)
        _race(entrants)
        share = watch.share()
        if share <= HIGHEST_OTHER_LOAD:
            break
        time.sleep(attempt if attempt + 1 < _ATTEMPTS else 0)
    return share


def _race(entrants: list[_Entrant]) -> None:
    """Time the entrants in turn until the leaders are told apart or rounds run out."""
    racing = list(entrants)
    started = time.perf_counter()
    for round_number in range(_MAX_ROUNDS):
        for entrant in racing:
            entrant.samples_us.append(entrant.clock.sample())
        if round_number + 1 >= _FIRST_ROUNDS:
            limit = min(entrant.best_us for entrant in racing) * (
                _DROP_BEYOND if round_number + 1 < 2 * _FIRST_ROUNDS else _TIE_WITHIN
            )
            racing = [entrant for entrant in racing if entrant.best_us <= limit]
        if time.perf_counter() - started > _SAMPLE_BUDGET_S and round_number + 1 >= _FIRST_ROUNDS:
            break
