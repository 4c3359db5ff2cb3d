"""The campaign: what is measured, and what is said of it."""

from dataclasses import replace

import pytest
import torch.nn.functional as F

from autoquant.candidates import A16, Candidate, Format, Kernel
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted
from autoquant.profiler import measure, timing
from autoquant.profiler.measure import (
    TimingDevice,
    cells_of,
    subjects_of,
    summarize,
    working_set_bytes,
)
from autoquant.records import Device, LinearShape, Measurement, Site, SiteUse

DEVICE = Device(
    type="cpu",
    name="Test CPU",
    capability="AVX2",
    threads=2,
    cache_bytes=1 << 22,
    versions={"torch": "2.13", "compiler": "none"},
)
SHAPE = LinearShape(n=16, k=32, bias=False, dtype="float32")
WORKING_SET = 1 << 14

pytestmark = pytest.mark.usefixtures("other_load")


def site(name="up", shape=SHAPE, rows=(2, 5)):
    uses = tuple(SiteUse(phase=f"phase{i}", m=m, calls=1) for i, m in enumerate(rows))
    return Site(name=name, parameters=(f"{name}.weight",), shape=shape, uses=uses)


SITES = (site(),)


def wrong(x, weight, bias):
    return F.linear(x, weight, bias) + 100


RIGHT, WRONG = (
    Kernel(id="right", numerics=A16, linear=F.linear),
    Kernel(id="wrong", numerics=A16, linear=wrong),
)
FORMAT = Format(
    id="own/plain",
    quantize=lambda w: w.clone(),
    dequantize=lambda stored: stored.float(),
    kernels=(RIGHT, WRONG),
)
BOTH = (Candidate(FORMAT, RIGHT), Candidate(FORMAT, WRONG))


@pytest.fixture
def compared(monkeypatch):
    """The comparisons that are really made: (shape, m, kernels)."""
    made = []
    original = measure.compare

    def watched(shape, m, candidates, **rest):
        made.append((shape, m, [candidate.kernel.id for candidate in candidates]))
        return original(shape, m, candidates, **rest)

    monkeypatch.setattr(measure, "compare", watched)
    return made


def campaign(
    *,
    sites=SITES,
    candidates=BOTH,
    working_set=WORKING_SET,
    events=None,
    kept=None,
    hopeless=None,
):
    """Measure; return the measurements by subject."""
    made = [] if kept is None else kept
    measure.measure(
        subjects_of(cells_of(sites), candidates, working_set),
        candidates,
        TimingDevice(
            device="cpu",
            hardware=DEVICE,
            roofline=lambda: pytest.fail("nothing is prepared on a CPU"),
        ),
        on_measured=made.extend,
        listener=(events if events is not None else []).append,
        hopeless=hopeless,
    )
    return {measurement.subject: measurement for measurement in made}


def test_every_shape_and_rows_is_measured_by_every_candidate(compared):
    result = campaign(sites=(site(), site("gate"), site("head", rows=(5,))))
    assert compared == [(SHAPE, 2, ["right", "wrong"]), (SHAPE, 5, ["right", "wrong"])]
    outcomes = {(s.m, s.kernel): measurement.outcome for s, measurement in result.items()}
    assert outcomes == {
        (2, "right"): "ok",
        (2, "wrong"): "incorrect",
        (5, "right"): "ok",
        (5, "wrong"): "incorrect",
    }
    assert all(s.working_set_bytes == WORKING_SET for s in result)


def test_what_earlier_shapes_rule_out_is_not_prepared(monkeypatch):
    class Hopeless:
        learnt = 0

        def learn(self, measured):
            self.learnt += len(measured)

        def among(self, subjects, device_type):
            assert device_type == "cpu"
            return {
                s: Measurement(subject=s, outcome="beaten", reason="behind")
                for s in subjects
                if self.learnt and s.kernel == "right"
            }

    prepared = []
    enter = timing.enter

    def watched(subject, *arguments):
        prepared.append((subject.m, subject.kernel))
        return enter(subject, *arguments)

    monkeypatch.setattr(timing, "enter", watched)
    sites = (site(), site("head", rows=(5,)))
    result = campaign(sites=sites, hopeless=Hopeless())
    assert prepared == [(2, "right"), (2, "wrong"), (5, "wrong")]
    outcomes = [measurement.outcome for measurement in result.values()]
    assert outcomes == ["ok", "incorrect", "beaten", "incorrect"]


def test_nothing_to_measure_needs_no_arena(monkeypatch):
    monkeypatch.setattr(measure, "Arena", None)
    events = []
    assert campaign(sites=(), events=events) == {}
    assert events == [StageStarted("profile", 0)]


def test_what_is_finished_was_given_when_the_campaign_is_stopped(monkeypatch):
    original = measure.compare

    def stopped(shape, m, candidates, **rest):
        if m == 5:
            raise KeyboardInterrupt
        return original(shape, m, candidates, **rest)

    monkeypatch.setattr(measure, "compare", stopped)
    kept = []
    with pytest.raises(KeyboardInterrupt):
        campaign(kept=kept)
    assert [(m.subject.m, m.subject.kernel) for m in kept] == [(2, "right"), (2, "wrong")]


def test_a_campaign_tells_its_progress():
    events = []
    campaign(events=events)
    assert events[0] == StageStarted("profile", 4)
    progress = [event for event in events if isinstance(event, StageProgress)]
    assert [event.done for event in progress] == [0, 0, 2, 2]
    assert progress[0].what == f"{SHAPE} m=2 own/plain/right"


def test_the_summary_names_what_cannot_be_used():
    events = []
    summarize(campaign(), 3, events.append)
    notice, finished = events
    assert notice.text.startswith(
        "own/plain/wrong is incorrect in 2 cases (m=2, m=5): relative error"
    )
    assert finished == StageFinished(
        "profile", "4 timings (2 ok, 2 incorrect), 3 measured now, 1 from the store"
    )


def test_a_busy_machine_is_noticed(other_load, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    other_load[:] = [0.5]
    events = []
    campaign(sites=(site(rows=(2,)),), candidates=BOTH[:1], events=events)
    assert any(isinstance(event, Notice) and "50% of the machine" in event.text for event in events)


def test_cells_are_the_distinct_shapes_and_rows_in_order():
    other = replace(SHAPE, n=64)
    sites = (site(rows=(2, 5)), site("b", other, (5, 2)), site("c", rows=(5, 9)))
    assert cells_of(sites) == [(SHAPE, 2), (SHAPE, 5), (other, 5), (other, 2), (SHAPE, 9)]


@pytest.mark.parametrize(
    ("model_elements", "cache", "expected"),
    [
        (3 << 20, 1 << 30, 4 << 20),  # 6 MiB of weights, rounded down
        ((4 << 20) - 1024, 1 << 30, 4 << 20),
        (4 << 20, 1 << 30, 8 << 20),  # a power of two stays
        (1 << 30, 20 << 20, 64 << 20),  # twice the cache, rounded up
        (1 << 30, 32 << 20, 64 << 20),
        (1024, 1 << 30, 1 << 20),  # never less than 1 MiB
        (1 << 30, 1024, 1 << 20),
    ],
)
def test_the_working_set_is_the_model_rounded_down_or_twice_the_cache_rounded_up(
    model_elements, cache, expected
):
    half = LinearShape(n=model_elements // 2048, k=1024, bias=False, dtype="bfloat16")
    assert working_set_bytes((half, half), replace(DEVICE, cache_bytes=cache), 2) == expected
