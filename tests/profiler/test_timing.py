"""The clock, run eagerly on kernels that are right, wrong, slow or broken."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F

from autoquant.candidates import A8_ROW, A16, Candidate, Format, Kernel, select
from autoquant.devices.clocks import HostClock
from autoquant.devices.effort import TimingEffort
from autoquant.profiler import timing
from autoquant.profiler.arena import Arena
from autoquant.profiler.timing import compare
from autoquant.records import LinearShape

SHAPE = LinearShape(n=32, k=64, bias=True, dtype="float32")

pytestmark = pytest.mark.usefixtures("other_load")


@torch.library.custom_op("autoquant_tests::sleepy_linear", mutates_args=())
def sleepy_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    time.sleep(1e-3)
    return F.linear(x, weight, bias)


def with_kernel(linear, *, numerics=A16, name="own", unsupported=None):
    rest = {} if unsupported is None else {"unsupported": unsupported}
    kernel = Kernel(id=name, numerics=numerics, linear=linear, **rest)
    fmt = Format(
        id="own/plain",
        quantize=lambda w: w.clone(),
        dequantize=lambda stored: stored.float(),
        kernels=(kernel,),
    )
    return Candidate(fmt, kernel)


def raising(_x, _weight, _bias):
    raise RuntimeError("out of luck\nand more")


def measured(*candidates, shape=SHAPE, m=3, arena_bytes=1 << 17):
    return compare(shape, m, candidates, arena=Arena(arena_bytes, "cpu"), compiled=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("m", [1, 65])
def test_a_right_kernel_is_timed(bias, m):
    shape = LinearShape(n=32, k=64, bias=bias, dtype="bfloat16")
    (result,) = measured(with_kernel(F.linear), shape=shape, m=m)
    assert (result.outcome, result.reason) == ("ok", "")
    assert len(result.samples_us) >= 4 and all(sample > 0 for sample in result.samples_us)
    assert result.relative_error < 0.01
    subject = result.subject
    assert (subject.shape, subject.m, subject.candidate) == (shape, m, "own/plain/own")
    assert subject.working_set_bytes == 1 << 17


@pytest.mark.parametrize(
    ("linear", "error"),
    [
        (lambda x, w, b: F.linear(x, w * 1.05, b), 0.05),
        (lambda x, w, b: F.linear(x, w), 0.1),
        (lambda x, w, b: F.linear(x, w, b) * float("nan"), float("nan")),
        (lambda x, w, b: F.linear(x, w, b) * 0, 1.0),
    ],
    ids=["scaled", "without its bias", "NaN", "zeros"],
)
def test_a_kernel_with_wrong_numbers_is_incorrect_and_not_timed(linear, error):
    (result,) = measured(with_kernel(linear))
    assert (result.outcome, result.samples_us) == ("incorrect", ())
    assert result.relative_error == pytest.approx(error, rel=0.1, nan_ok=True)
    assert (
        result.reason == f"relative error {result.relative_error:.3g} against the float32 reference"
    )


def test_a_kernel_is_judged_by_its_own_numerics():
    def halved(x, w, b):
        scale = x.abs().amax(-1, keepdim=True) / 3
        return F.linear((x / scale).round() * scale, w, b)

    (result,) = measured(with_kernel(halved))
    assert result.outcome == "incorrect" and 0.02 < result.relative_error < 0.5
    (result,) = measured(with_kernel(F.linear, numerics=A8_ROW))
    assert result.outcome == "ok" and 1e-3 < result.relative_error < 0.02


def test_a_kernel_that_raises_has_failed_with_the_first_line_of_its_reason():
    (result,) = measured(with_kernel(raising))
    assert (result.outcome, result.reason) == ("failed", "RuntimeError: out of luck")


def test_a_format_that_does_not_quantize_has_failed():
    kernel = Kernel(id="own", numerics=A16, linear=F.linear)
    fmt = Format(
        id="own/plain", quantize=lambda w: w.t(), dequantize=lambda s: s, kernels=(kernel,)
    )
    (result,) = measured(Candidate(fmt, kernel))
    assert result.outcome == "failed" and "the weight was not quantized" in result.reason


def test_an_unsupported_kernel_is_not_run():
    seen = []

    def unsupported(shape, m, device_type):
        seen.append((shape, m, device_type))
        return "no such instruction"

    (result,) = measured(with_kernel(raising, unsupported=unsupported))
    assert (result.outcome, result.reason, result.samples_us) == (
        "unsupported",
        "no such instruction",
        (),
    )
    assert seen == [(SHAPE, 3, "cpu")]


def test_a_candidate_that_fails_does_not_spoil_the_others():
    seen = []
    candidates = [
        with_kernel(raising, name="broken"),
        with_kernel(F.linear, name="right"),
        with_kernel(lambda x, w, b: F.linear(x, w, b) + 1, name="wrong"),
        with_kernel(F.linear, name="absent", unsupported=lambda *_: "no"),
        with_kernel(lambda x, w, b: F.linear(x, w, b), name="right too"),
    ]
    results = compare(
        SHAPE,
        3,
        candidates,
        arena=Arena(1 << 17, "cpu"),
        compiled=False,
        on_candidate=seen.append,
    )
    assert [result.outcome for result in results] == [
        "failed",
        "ok",
        "incorrect",
        "unsupported",
        "ok",
    ]
    assert [result.subject.kernel for result in results] == [
        "broken",
        "right",
        "wrong",
        "absent",
        "right too",
    ]
    assert seen == [*(result.subject for result in results), None]


@pytest.fixture
def one_thread():
    """Two threads wait for one another when others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_candidate_far_behind_is_dropped_early_and_keeps_its_samples(one_thread):
    fast, slow = measured(
        with_kernel(F.linear, name="fast"), with_kernel(sleepy_linear, name="slow")
    )
    assert (fast.outcome, slow.outcome) == ("ok", "ok")
    assert slow.latency_us > 1000 > fast.latency_us
    assert 4 <= len(slow.samples_us) < len(fast.samples_us)


def test_the_built_in_candidates_are_right_on_this_machine():
    shape = LinearShape(n=64, k=64, bias=True, dtype="bfloat16")
    globs = ["bfloat16", "int8-row/plain/int*", "float8*"]
    results = measured(*select(globs), shape=shape, arena_bytes=1 << 16)
    outcomes = {result.subject.candidate: result.outcome for result in results}
    assert outcomes == {
        candidate.id: "unsupported" if candidate.unsupported_reason(shape, 3, "cpu") else "ok"
        for candidate in select(globs)
    }
    assert list(outcomes.values()).count("ok") >= 5


def test_a_comparison_is_repeated_while_the_machine_is_busy(other_load):
    other_load[:] = [0.9, 0.05]
    (result,) = measured(with_kernel(F.linear))
    assert (result.outcome, result.reason, other_load) == ("ok", "", [0.05])
    assert len(result.samples_us) <= 16


def test_a_comparison_on_a_machine_that_stays_busy_says_so(other_load, monkeypatch):
    monkeypatch.setattr(timing.time, "sleep", lambda _seconds: None)
    other_load[:] = [0.4]
    (result,) = measured(with_kernel(F.linear))
    assert result.outcome == "ok" and "others used 40% of the machine" in result.reason


FLOATS = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_arena_numbers_are_ordinary_in_every_float(dtype):
    ((numbers,),) = Arena(1 << 16, "cpu").views(
        [torch.empty((1 << 16) // dtype.itemsize, dtype=dtype)]
    )
    magnitudes = numbers.double().abs()
    assert torch.isfinite(magnitudes).all()
    assert magnitudes.min() >= torch.finfo(dtype).tiny and magnitudes.max() < 2.0
    assert numbers.double().min() < 0 < numbers.double().max()
    assert numbers.double().unique().numel() > 4


def test_arena_views_are_disjoint_aligned_and_of_the_same_kind():
    tensors = [
        torch.empty(5, 7, dtype=torch.int8),
        torch.empty(5, 1, dtype=torch.bfloat16),
        torch.empty(33),
    ]
    arena = Arena(4096, "cpu")
    copies = arena.views(tensors)
    assert len(copies) == 4096 // (64 + 64 + 192)
    used = torch.zeros(4096, dtype=torch.int)
    base = arena.bytes.data_ptr()
    for copy in copies:
        for part, tensor in zip(copy, tensors, strict=True):
            assert (part.shape, part.dtype) == (tensor.shape, tensor.dtype)
            start = part.data_ptr() - base
            assert start % 64 == 0 and part.data_ptr() % tensor.element_size() == 0
            used[start : start + part.nbytes] += 1
    assert used.max() == 1 and used.sum() == len(copies) * (35 + 10 + 132)


def test_a_limited_number_of_copies_is_spread_over_the_whole_arena():
    arena = Arena(4096, "cpu")
    tensors = [torch.empty(16, dtype=torch.int8)]
    starts = [part.data_ptr() - arena.bytes.data_ptr() for (part,) in arena.views(tensors, 10)]
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] == 57 * 64  # of 64 that fit
    assert {after - before for before, after in itertools.pairwise(starts)} == {384, 448}
    assert len(arena.views(tensors, 100)) == 64


def test_an_arena_has_exactly_the_bytes_asked_for():
    for size in (1000, 1 << 20, (1 << 21) + 64):
        assert Arena(size, "cpu").bytes.numel() == size


def test_tensors_larger_than_the_arena_are_used_as_they_are():
    tensors = [torch.empty(1000), torch.empty(3)]
    ((first, second),) = Arena(1024, "cpu").views(tensors)
    assert first is tensors[0] and second is tensors[1]


def test_every_linear_of_a_call_reads_a_weight_of_its_own_and_all_of_the_arena_is_read():
    used = set()

    @torch.library.custom_op("autoquant_tests::watched_linear", mutates_args=())
    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        used.add(weight.data_ptr())
        return F.linear(x, weight)

    weight_bytes = 32 * 64 * 4
    arena = Arena(16 * weight_bytes, "cpu")
    shape = LinearShape(n=32, k=64, bias=False, dtype="float32")
    candidate = with_kernel(lambda x, w, b: watched(x, w))
    (result,) = compare(shape, 3, [candidate], arena=arena, compiled=False)
    assert result.outcome == "ok"
    start = arena.bytes.data_ptr()
    assert {start + i * weight_bytes for i in range(16)} <= used


class RecordingClock:
    """Notes where each sample stands in the rotation; the first samples are slow."""

    def __init__(self, stands, name, time_us):
        self._stands, self._name, self._time_us, self._share = stands, name, time_us, 0.0

    def start(self): ...

    def go_to(self, share):
        self._share = share

    def sample(self):
        self._stands.append((self._name, self._share))
        time.sleep(1e-3)
        return 1e6 if len(self._stands) <= 3 else self._time_us


def test_candidates_stand_apart_in_the_arena_and_what_warms_the_machine_up_does_not_count():
    stands = []
    times_us = {"one": 10.0, "two": 10.0, "far behind": 100.0}
    entrants = [
        timing.Entrant(None, RecordingClock(stands, name, time_us), None)
        for name, time_us in times_us.items()
    ]
    timing._race(entrants, TimingEffort(linear_warm_up_s=0.02))
    assert [sorted(set(entrant.samples_us)) for entrant in entrants] == [[10.0], [10.0], [100.0]]
    assert set(stands[:9]) == {("one", 0.0), ("two", 1 / 3), ("far behind", 2 / 3)}
    assert set(stands[-4:]) == {("one", 0.0), ("two", 1 / 2)}


def test_the_clock_of_the_host_goes_to_a_share_of_the_rotation():
    called = []
    clock = HostClock(called.append, 8, linears=1, synchronize=lambda: None, sample_s=1e-9)
    clock.go_to(0.75)
    for _ in range(3):
        clock.sample()
    assert called == [6, 7, 0]


def test_a_comparison_in_which_nothing_can_be_timed_has_its_outcomes():
    results = measured(
        with_kernel(raising, name="broken"), with_kernel(F.linear, unsupported=lambda *_: "no")
    )
    assert [result.outcome for result in results] == ["failed", "unsupported"]
    assert measured() == []
