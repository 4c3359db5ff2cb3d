"""Kernels that lie at some calls only: none keeps a time, and each has its reason."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from autoquant.candidates import A16, Candidate, Format, Kernel
from autoquant.devices.cpu import CpuBackend
from autoquant.devices.effort import TimingEffort
from autoquant.profiler import checks
from autoquant.profiler.arena import Arena
from autoquant.profiler.timing import compare
from autoquant.records import LinearShape

SHAPE = LinearShape(n=32, k=64, bias=False, dtype="bfloat16")
EFFORT = TimingEffort(linear_rounds=4, sample_s=2e-4, repeat_s=2.0)

pytestmark = pytest.mark.usefixtures("other_load")


class Liar:
    """Passes products through `lie`, out of the sight of PyTorch; knows how often it was called."""

    def __init__(self, lie):
        self.calls = 0
        self.lie = lie

    def linear(self, x, weight, bias):
        return _tell(F.linear(x, weight, bias))


@torch.library.custom_op("autoquant_tests::tell", mutates_args=())
def _tell(y: torch.Tensor) -> torch.Tensor:
    LIAR[0].calls += 1
    return LIAR[0].lie(LIAR[0].calls, y).clone()


@_tell.register_fake
def _(y):
    return torch.empty_like(y)


LIAR = [None]


def compared(linear, *, compiled=False, effort=EFFORT, **about):
    kernel = Kernel(id="own", numerics=A16, linear=linear, **about)
    right = Kernel(id="right", numerics=A16, linear=F.linear)
    fmt = Format(
        id="own/plain",
        quantize=lambda w: w.clone(),
        dequantize=lambda stored: stored.float(),
        kernels=(kernel, right),
    )
    candidates = [Candidate(fmt, kernel), Candidate(fmt, right)]
    own, honest = compare(
        SHAPE,
        3,
        candidates,
        arena=Arena(1 << 16, "cpu"),
        compiled=compiled,
        effort=effort,
    )
    assert honest.outcome == "ok" and len(honest.samples_us) >= 4
    return own


def lying(lie, **about):
    LIAR[0] = Liar(lie)
    return compared(LIAR[0].linear, **about)


def test_a_kernel_that_stays_right_is_called_many_times_after_it_was_timed():
    assert lying(lambda _call, y: y).outcome == "ok"
    assert LIAR[0].calls > 200


@pytest.mark.parametrize(
    ("computes_s", "waits_s", "count"),
    [(1e-4, 1e-3, 201), (1e-9, 0.05, 11), (1.0, 1.0, 5)],
    ids=["busy machine", "waiting kernel", "slow kernel"],
)
def test_results_are_compared_for_a_time_that_others_do_not_shorten(
    monkeypatch, computes_s, waits_s, count
):
    calls = []
    clock = SimpleNamespace(
        thread_time=lambda: len(calls) * computes_s,
        perf_counter=lambda: len(calls) * (computes_s + waits_s),
    )
    monkeypatch.setattr(checks, "time", clock)
    y = torch.ones(2, 2)
    check = checks.ResultCheck(
        run=lambda: calls.append(1) or [y],
        eager=None,
        expected=lambda: y,
        dtype=torch.float32,
        repeats=True,
    )
    assert check.after(0.05) == ""
    assert len(calls) == count


def test_a_kernel_that_is_right_only_at_first_is_incorrect():
    own = lying(lambda call, y: y if call < 40 else y * 1.1)
    assert (own.outcome, own.samples_us) == ("incorrect", ())
    assert own.reason.startswith("right before it was timed, wrong after: relative error 0.")


def test_a_kernel_that_is_rarely_wrong_is_incorrect():
    own = lying(lambda call, y: y * 1.1 if call % 97 == 96 else y)
    # The wrong call is the first after the timing, or a later one: that depends on the time.
    assert own.outcome == "incorrect" and "relative error 0." in own.reason
    assert "after it was timed" in own.reason or "wrong after" in own.reason


def test_the_call_that_was_wrong_is_named():
    outputs = [torch.ones(2, 2), torch.ones(2, 2), torch.full((2, 2), 1.1)]
    check = checks.ResultCheck(
        run=lambda: [outputs.pop(0)],
        eager=None,
        expected=lambda: torch.ones(2, 2),
        dtype=torch.float32,
        repeats=True,
    )
    assert check.after(0.05).startswith("call 3 after it was timed: relative error 0.")


def noisy(_call, y):
    return y * (1 + 0.01 * torch.randn_like(y))


def test_a_kernel_that_gives_other_bits_each_time_is_incorrect():
    own = lying(noisy)
    assert own.outcome == "incorrect" and "the same input gave other bits" in own.reason


def test_other_bits_are_allowed_where_the_kernel_or_the_device_does_not_promise_them(monkeypatch):
    assert lying(noisy, repeats=False).outcome == "ok"
    monkeypatch.setattr(CpuBackend, "repeats", False)
    assert lying(noisy).outcome == "ok"


def test_a_kernel_without_the_promise_must_still_be_right_each_time():
    own = lying(lambda call, y: y * 1.1 if call % 97 == 96 else y, repeats=False)
    assert own.outcome == "incorrect" and "relative error 0." in own.reason


def test_a_kernel_that_fills_its_result_in_later_is_incorrect():
    def late(_call, y):
        out = torch.zeros_like(y)
        threading.Thread(target=lambda: (time.sleep(5e-3), out.copy_(y))).start()
        return out

    assert lying(late, effort=TimingEffort(linear_rounds=4, sample_s=1e-5)).outcome == "incorrect"


def test_a_kernel_that_answers_by_what_lay_in_the_memory_before_is_incorrect():
    known = {}

    def remember(_call, y):
        return known.setdefault(tuple(y.shape), y.clone())

    assert lying(remember).outcome == "incorrect"


def test_a_kernel_that_raises_while_it_is_timed_has_failed():
    def tired(call, y):
        if call > 40:
            raise RuntimeError("tired")
        return y

    own = lying(tired)
    assert own.outcome == "failed" and own.reason == "while timed: RuntimeError: tired"


def test_a_wrong_result_at_the_end_of_a_call_is_seen():
    own = lying(lambda call, y: y * 1.1 if call == 16 else y)  # the last of the first call
    assert own.outcome == "incorrect"


@pytest.mark.slow
@pytest.mark.parametrize("lies", [True, False], ids=["when compiled", "when eager"])
def test_a_kernel_that_lies_only_one_way_of_running_is_incorrect(lies):
    def linear(x, weight, bias):
        y = F.linear(x, weight, bias)
        return y * 1.04 if torch.compiler.is_compiling() == lies else y

    own = compared(linear, compiled=True)
    assert own.outcome == "incorrect" and "relative error 0.04" in own.reason
    assert own.reason.startswith("run eagerly") != lies
