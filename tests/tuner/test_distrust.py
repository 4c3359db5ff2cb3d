"""A kernel that a proof finds wrong: the search goes on without it, and says why."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from builders.records import DEVICE, STUDY
from builders.runner import FakeRunner
from builders.search import WORKING_SET, make_plan, timings
from builders.space import make_ledger

from autoquant.errors import HungError, KernelError, ProcessDiedError
from autoquant.profiler.timing import PROTOCOL
from autoquant.profiler.timing_table import TimingTable
from autoquant.records import RouteStep
from autoquant.tuner.distrust import distrust
from autoquant.tuner.workers.jobs import Checking

pytestmark = pytest.mark.usefixtures("quick_collector")

REASON = "at m=1 in layer: relative error 0.3"


def the_kernel_of(plan):
    layer = plan.layers[0]
    return layer.format, layer.route[0].kernel


def lie_of(plan):
    fmt, kernel = the_kernel_of(plan)
    text = f"kernel {fmt}/{kernel} is wrong"
    return KernelError(text, format_id=fmt, kernel=kernel, reason=REASON)


def test_a_wrong_kernel_is_raised_after_its_plan_has_failed(store):
    def found_out(plan):
        raise lie_of(plan)

    ledger = make_ledger(store, FakeRunner(prove=found_out))
    with pytest.raises(KernelError):
        ledger.prove(make_plan("a"))
    assert "is wrong" in store.failed_proofs(STUDY)["a"]


@pytest.mark.parametrize(
    "death", [ProcessDiedError("it died"), HungError("it hung")], ids=["crash", "hang"]
)
def test_a_kernel_that_is_checked_when_the_process_dies_is_to_blame(store, death):
    class Dying(FakeRunner):
        def run(self, job, on_message):
            on_message(Checking("layer.7", "int4/x", "fast"))
            raise death

    with pytest.raises(KernelError, match=r"kernel int4/x/fast in layer\.7: it") as caught:
        make_ledger(store, Dying()).prove(make_plan("a"))
    assert (caught.value.format, caught.value.kernel) == ("int4/x", "fast")


def test_no_kernel_is_to_blame_when_a_process_dies_after_the_checks(store):
    class Dying(FakeRunner):
        def run(self, job, on_message):
            on_message(Checking("layer.7", "int4/x", "fast"))
            on_message(Checking())
            raise ProcessDiedError("it died")

    assert make_ledger(store, Dying()).prove(make_plan("a")) is None
    assert store.failed_proofs(STUDY) == {"a": "ProcessDiedError: it died"}


def hanging(_plan):
    raise HungError("it did not end within 600 s")


def with_kernels(plan, *kernels):
    """The plan with a layer for each (format, kernel)."""
    layer = plan.layers[0]
    layers = [
        replace(
            layer,
            name=f"layer.{number}",
            format=fmt,
            route=(RouteStep(upper_m=None, kernel=kernel),),
        )
        for number, (fmt, kernel) in enumerate(kernels)
    ]
    return replace(plan, layers=tuple(layers))


KNOWN, NEW, NEWER = ("bfloat16/plain", "matmul"), ("int8/plain", "fast"), ("int4/plain", "fast")


def test_a_hang_after_the_checks_is_blamed_on_the_only_kernel_that_no_proven_plan_has(store):
    make_ledger(store).prove(with_kernels(make_plan("o", kind="original"), KNOWN))
    ledger = make_ledger(store, FakeRunner(prove=hanging))
    with pytest.raises(KernelError, match=r"kernel int8/plain/fast in layer\.1: it did not end"):
        ledger.prove(with_kernels(make_plan("a"), KNOWN, NEW))
    assert set(store.failed_proofs(STUDY)) == {"a"}


@pytest.mark.parametrize("kernels", [(KNOWN,), (NEW, NEWER)], ids=["no new one", "two new ones"])
def test_a_hang_that_several_kernels_may_have_caused_fails_its_plan_alone(store, kernels):
    make_ledger(store).prove(with_kernels(make_plan("o", kind="original"), KNOWN))
    ledger = make_ledger(store, FakeRunner(prove=hanging))
    assert ledger.prove(with_kernels(make_plan("a"), *kernels)) is None
    assert store.failed_proofs(STUDY) == {"a": "HungError: it did not end within 600 s"}


def test_only_the_unquantized_model_may_be_silent_for_as_long_as_it_likes(store):
    runner = FakeRunner()
    ledger = make_ledger(store, runner)
    ledger.prove(make_plan("a"))
    ledger.prove(make_plan("o", kind="original"))
    ledger.prove(make_plan("b"))
    first, original, second = (job.silence_s for job in runner.jobs)
    assert original is None and first == 3600 and second == 600


def test_its_timings_are_incorrect_and_its_plans_failed_from_then_on(store):
    events = []
    ledger = make_ledger(store, events=events)
    plan = make_plan("a")
    layers = (replace(plan.layers[0], format="another/plain"),)
    other = replace(make_plan("b"), layers=layers)
    for each in (plan, other):
        ledger.prove(each)
    fmt, kernel = the_kernel_of(plan)
    made = timings({(fmt, kernel, 1): 5.0, (fmt, kernel, 8): "failed: no", (fmt, "right", 1): 9.0})
    store.put_timings(DEVICE, PROTOCOL, made.values())
    told = []
    setup = SimpleNamespace(store=store, settled=SimpleNamespace(hardware=DEVICE), tell=told.append)
    table = TimingTable(WORKING_SET, made)
    distrust(lie_of(plan), table, ledger, setup)
    kept = {(s.kernel, s.m): found for s, found in store.timings(DEVICE, PROTOCOL).items()}
    assert len(kept) == 3
    assert kept[kernel, 1].outcome == "incorrect" and kept[kernel, 1].samples_us == ()
    assert kept[kernel, 1].reason == f"found wrong when a plan was proven, {REASON}"
    assert (kept[kernel, 8].outcome, kept["right", 1].outcome) == ("failed", "ok")
    assert set(store.failed_proofs(STUDY)) == {"a"} and set(store.proofs(STUDY)) == {"b"}
    assert set(ledger.proofs) == {"b"}
    assert told == [f"{fmt}/{kernel} is no longer used: {REASON}"]


def test_a_kernel_that_was_never_timed_as_right_ends_the_search(store):
    ledger = make_ledger(store)
    setup = SimpleNamespace(
        store=store, settled=SimpleNamespace(hardware=DEVICE), tell=lambda _text: None
    )
    with pytest.raises(KernelError):
        distrust(lie_of(make_plan("a")), TimingTable(WORKING_SET, {}), ledger, setup)
