"""The timing of one linear by each of several candidates, compared in turn.

Protocol 4:

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
  model's size, or twice the last-level cache if the model is larger. Candidates stand at even
  distances in the arena, so that none reads what the one before has just brought into the cache.
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
  A machine that only compiled for a while reads memory at half its speed for a tenth of a second,
  so what is read before that does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from autoquant.candidates import Candidate
from autoquant.candidates.flat import stored_bytes
from autoquant.devices import backend
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.devices.watch import Watch
from autoquant.errors import first_line
from autoquant.profiler.arena import Arena
from autoquant.profiler.entrant import Entrant, LinearToTime, enter
from autoquant.records import LinearShape, Measurement, TimingSubject

PROTOCOL = "4"
# After these rounds those that take this many times as long as the fastest are dropped. After
# twice as many rounds all are that are not nearly as fast.
_FIRST_ROUNDS = 4
_DROP_BEYOND = 1.6
_TIE_WITHIN = 1.15


def compare(
    shape: LinearShape,
    m: int,
    candidates: Sequence[Candidate],
    *,
    arena: Arena,
    compiled: bool,
    decided: Mapping[TimingSubject, Measurement] | None = None,
    on_candidate: Callable[[TimingSubject | None], None] = lambda _subject: None,
    effort: TimingEffort | None = None,
) -> list[Measurement]:
    """Time `candidates` on one shape and m, each against the others.

    Args:
        arena: What their weights rotate through, on the device to time.
        compiled: Compile with Inductor; otherwise run as traced.
        decided: Outcomes that are known already: these candidates are not prepared.
        on_candidate: Takes each candidate when its preparation starts, and None when that of the
            last has ended.
        effort: None for the process's own, `timing_effort()`.

    Returns:
        One measurement per candidate, in order. One that is unsupported, wrong or fails says why.
    """
    effort = effort or timing_effort()
    linear = LinearToTime(shape, m, arena.device)
    results = dict(decided or {})
    entrants: list[Entrant] = []
    subjects = []
    for candidate in candidates:
        subject = TimingSubject(
            shape=shape,
            m=m,
            format=candidate.format.id,
            kernel=candidate.kernel.id,
            working_set_bytes=arena.bytes.numel(),
        )
        subjects.append(subject)
        if subject in results:
            continue
        on_candidate(subject)
        entered = enter(subject, candidate, linear, arena, compiled, effort)
        if isinstance(entered, Measurement):
            results[subject] = entered
        else:
            entrants.append(entered)
    on_candidate(None)
    results |= _timed(entrants, linear, effort)
    return [results[subject] for subject in subjects]


def _timed(
    entrants: Sequence[Entrant], linear: LinearToTime, effort: TimingEffort
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


def _checked_again(entrant: Entrant, effort: TimingEffort) -> Measurement | None:
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
    subject: TimingSubject, candidate: Candidate, linear: LinearToTime, *, compiled: bool
) -> tuple[Measurement, int]:
    """Prepare one candidate and run it a few times, alone.

    Returns:
        The measurement, and the bytes of the stored weight (0 if it is not ok).
    """
    arena, effort = Arena(1, linear.device), timing_effort()
    entered = enter(subject, candidate, linear, arena, compiled, effort)
    if isinstance(entered, Measurement):
        return entered, 0
    entered.samples_us += [entered.clock.sample() for _ in range(_FIRST_ROUNDS)]
    linear.change_inputs()
    if (unusable := _checked_again(entered, effort)) is not None:
        return unusable, 0
    measurement = Measurement(
        subject=subject,
        outcome="ok",
        samples_us=tuple(entered.samples_us),
        relative_error=entered.relative_error,
    )
    return measurement, stored_bytes(candidate.format.store(linear.weight))


def _race_undisturbed(entrants: list[Entrant], device: str, effort: TimingEffort) -> str:
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
        # What disturbs is often over soon: wait longer each time, but not after the last.
        time.sleep(attempt if attempt + 1 < effort.attempts else 0)
    return disturbance


def _race(entrants: list[Entrant], effort: TimingEffort) -> None:
    """Time the entrants in turn until only close ones are left and rounds or time run out."""
    racing = [entrant for entrant in entrants if not entrant.failure]
    _warm_up(racing, effort)
    started = time.perf_counter()
    for round_number in range(effort.linear_rounds):
        for entrant in racing:
            _sample(entrant)
        racing = [entrant for entrant in racing if not entrant.failure]
        if not racing:
            break
        done = round_number + 1
        if done < _FIRST_ROUNDS:
            continue
        fastest_us = min(entrant.best_us for entrant in racing)
        within = _DROP_BEYOND if done < 2 * _FIRST_ROUNDS else _TIE_WITHIN
        left = [entrant for entrant in racing if entrant.best_us <= fastest_us * within]
        if len(left) < len(racing):
            _spread(left)
        racing = left
        if time.perf_counter() - started > effort.linear_budget_s:
            break


def _warm_up(entrants: Sequence[Entrant], effort: TimingEffort) -> None:
    """Sample in turn until the machine runs at its speed, and forget the samples."""
    _spread(entrants)
    started = time.perf_counter()
    while entrants and time.perf_counter() - started < effort.linear_warm_up_s:
        for entrant in entrants:
            _sample(entrant)
    for entrant in entrants:
        entrant.samples_us.clear()


def _spread(entrants: Sequence[Entrant]) -> None:
    """Let each read the weights that were read longest ago."""
    for number, entrant in enumerate(entrants):
        entrant.clock.go_to(number / len(entrants))


def _sample(entrant: Entrant) -> None:
    try:
        entrant.samples_us.append(entrant.clock.sample())
    except Exception as error:  # noqa: BLE001 - any error of a kernel is an outcome
        entrant.failure = first_line(error, with_type=True)
