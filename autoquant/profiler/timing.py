"""The clock: how long one linear takes by each of several candidates, compared in turn.

Protocol 2:

- A candidate is traced to a graph of `unroll` independent linears with inputs of their own and compiled as the whole
  model will be, so that the cost of a call from Python is shared by many.
- As in a model, activations are `[1, m, k]`, made and consumed by elementwise operations of the same graph: a kernel gets
  the memory layouts that it will get there, and what the compiler fuses into its neighbours is fused here too. (With m = 1
  that decides whether a result is right: PyTorch 2.13's `_int_mm` for CPUs returns garbage for the strides that compiled
  code gives a single row.)
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from autoquant.candidates import ACTIVATION_ROUNDING, Format, Kernel
from autoquant.candidates.flat import flatten_tensor, unflatten_tensor
from autoquant.profiler.device import synchronize
from autoquant.profiler.load import HIGHEST_OTHER_LOAD, OtherLoad
from autoquant.records import LinearShape, Measurement, TimingSubject

PROTOCOL = "2"
MAX_RELATIVE_ERROR = 0.02
_FIRST_ROUNDS = 4
_MAX_ROUNDS = 16
_DROP_BEYOND = 1.6
_TIE_WITHIN = 1.15
_SAMPLE_S = 2e-3
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
    call: Callable[[int], object]
    calls_in_rotation: int
    unroll: int
    relative_error: float
    position: int = 0
    calls_per_sample: int = 1
    samples_us: list[float] = field(default_factory=list)

    def sample(self, device: str) -> None:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(self.calls_per_sample):
            self.call(self.position)
            self.position = (self.position + 1) % self.calls_in_rotation
        synchronize(device)
        elapsed = time.perf_counter() - start
        self.samples_us.append(elapsed / (self.calls_per_sample * self.unroll) * 1e6)

    @property
    def best_us(self) -> float:
        return min(self.samples_us)


def compare(
    shape: LinearShape,
    m: int,
    candidates: Sequence[tuple[Format, Kernel]],
    *,
    arena: Arena,
    device: str,
    compiled: bool,
    on_candidate: Callable[[str], None] = lambda _name: None,
) -> list[Measurement]:
    """Time `candidates` on one shape and m, each against the others.

    Args:
        compiled: Compile each graph with inductor; otherwise run it as traced.
        on_candidate: Told the name of each candidate when its preparation starts.

    Returns:
        One measurement per candidate, in order. One that is unsupported, wrong or fails says why.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    weight = (torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5).to(dtype).to(device)
    bias = (torch.randn(shape.n, generator=generator) * 0.1).to(dtype).to(device) if shape.bias else None
    inputs = [torch.randn(1, m, shape.k, generator=generator).to(dtype).to(device) for _ in range(_unroll(m))]
    entrants: list[_Entrant] = []
    results: dict[TimingSubject, Measurement] = {}
    subjects = []
    for fmt, kernel in candidates:
        subject = TimingSubject(
            shape=shape, m=m, format=fmt.id, kernel=kernel.id, working_set_bytes=arena.bytes.numel()
        )
        subjects.append(subject)
        on_candidate(subject.candidate)
        reason = fmt.unsupported_reason(kernel, shape, m, torch.device(device).type)
        if reason:
            results[subject] = Measurement(subject=subject, outcome="unsupported", reason=reason)
            continue
        try:
            entrant = _prepare(subject, fmt, kernel, weight, bias, inputs, arena, compiled)
        except Exception as error:  # noqa: BLE001 - whatever a kernel or compiler raises is an outcome with its reason
            results[subject] = Measurement(subject=subject, outcome="failed", reason=first_line(error))
            continue
        if not entrant.relative_error <= MAX_RELATIVE_ERROR:  # NaN counts as incorrect
            reason = f"relative error {entrant.relative_error:.3g} against the float32 reference"
            results[subject] = Measurement(
                subject=subject, outcome="incorrect", reason=reason, relative_error=entrant.relative_error
            )
            continue
        entrants.append(entrant)
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _unroll(m: int) -> int:
    return 8 if m <= 64 else 2


def _prepare(
    subject: TimingSubject,
    fmt: Format,
    kernel: Kernel,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inputs: list[torch.Tensor],
    arena: Arena,
    compiled: bool,
) -> _Entrant:
    """Trace, compile, check and warm up one candidate."""
    stored = fmt.store(weight)
    parts, rebuild = flatten_tensor(stored)
    copies = arena.views(parts)
    unroll = min(len(inputs), len(copies))
    inputs = inputs[:unroll]
    biases = [] if bias is None else [bias]

    def graph(args: list[torch.Tensor]) -> list[torch.Tensor]:
        xs, rest = args[:unroll], args[unroll + len(biases) :]
        bias_arg = args[unroll] if biases else None
        weights = [unflatten_tensor(rebuild, rest[i * len(parts) : (i + 1) * len(parts)]) for i in range(unroll)]
        return [-kernel.linear(-x, w, bias_arg) for x, w in zip(xs, weights, strict=True)]

    groups = [
        [*inputs, *biases, *(part for i in range(unroll) for part in copies[(start + i) % len(copies)])]
        for start in range(0, len(copies), unroll)
    ]
    with torch.no_grad():
        # Traced on distinct tensors: one that came twice would be read once.
        traced: Any = make_fx(graph)(groups[0])
        run: Callable[[list[torch.Tensor]], Any] = _compile(traced, groups[0]) if compiled else traced
        outputs = run([*inputs, *biases, *(parts * unroll)])
        reference = -F.linear(
            ACTIVATION_ROUNDING[kernel.numerics](-inputs[0].float()),
            fmt.dequantize(stored).float(),
            None if bias is None else bias.float(),
        )
        error = ((outputs[0].float() - reference).norm() / reference.norm()).item()

    def call(position: int) -> object:
        with torch.no_grad():
            return run(groups[position])

    return _Entrant(subject, call, len(groups), unroll, error)


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
        watch = OtherLoad()
        _race(entrants, device)
        share = watch.share()
        if share <= HIGHEST_OTHER_LOAD:
            break
        time.sleep(attempt if attempt + 1 < _ATTEMPTS else 0)
    return share


def _race(entrants: list[_Entrant], device: str) -> None:
    """Time the entrants in turn until the leaders are told apart or rounds run out."""
    if not entrants:
        return
    for entrant in entrants:
        entrant.sample(device)  # warm-up, and an estimate of how many calls make a sample
        seconds = entrant.samples_us.pop() * entrant.unroll / 1e6
        entrant.calls_per_sample = max(1, round(_SAMPLE_S / max(seconds, 1e-7)))
    racing = list(entrants)
    started = time.perf_counter()
    for round_number in range(_MAX_ROUNDS):
        for entrant in racing:
            entrant.sample(device)
        if round_number + 1 >= _FIRST_ROUNDS:
            limit = min(entrant.best_us for entrant in racing) * (
                _DROP_BEYOND if round_number + 1 < 2 * _FIRST_ROUNDS else _TIE_WITHIN
            )
            racing = [entrant for entrant in racing if entrant.best_us <= limit]
        if time.perf_counter() - started > _SAMPLE_BUDGET_S and round_number + 1 >= _FIRST_ROUNDS:
            break
