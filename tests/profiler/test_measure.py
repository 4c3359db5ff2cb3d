"""The campaign: what is measured, kept, and never measured again."""

from dataclasses import replace

import pytest
import torch.nn.functional as F
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from autoquant.candidates import A16, Candidate, Format, Kernel
from autoquant.events import Notice, StageFinished, StageProgress, StageStarted
from autoquant.profiler import measure
from autoquant.profiler.measure import cells_of, profile, subjects_of, working_set_bytes
from autoquant.records import Device, LinearShape, Site, SiteUse
from autoquant.store import open_store
from autoquant.store.schema import TimingRow

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


RIGHT, WRONG = Kernel(id="right", numerics=A16, linear=F.linear), Kernel(id="wrong", numerics=A16, linear=wrong)
FORMAT = Format(
    id="own/plain", quantize=lambda w: w.clone(), dequantize=lambda stored: stored.float(), kernels=(RIGHT, WRONG)
)
BOTH = (Candidate(FORMAT, RIGHT), Candidate(FORMAT, WRONG))


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "plan.db")
    yield opened
    opened.close()


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


def rows(store):
    with Session(store.engine) as session:
        return session.scalar(select(func.count()).select_from(TimingRow))


def campaign(store, *, sites=SITES, candidates=BOTH, device=DEVICE, working_set=WORKING_SET, events=None):
    store.put_device(device)
    return profile(
        subjects_of(cells_of(sites), candidates, working_set),
        candidates,
        device=device,
        device_name="cpu",
        store=store,
        listener=(events if events is not None else []).append,
    )


def test_every_shape_and_rows_is_measured_by_every_candidate(store, compared):
    result = campaign(store, sites=(site(), site("gate"), site("head", rows=(5,))))
    assert compared == [(SHAPE, 2, ["right", "wrong"]), (SHAPE, 5, ["right", "wrong"])]
    outcomes = {(s.m, s.kernel): measurement.outcome for s, measurement in result.items()}
    assert outcomes == {(2, "right"): "ok", (2, "wrong"): "incorrect", (5, "right"): "ok", (5, "wrong"): "incorrect"}
    assert all(s.working_set_bytes == WORKING_SET for s in result) and rows(store) == 4


def test_a_second_campaign_measures_nothing_and_adds_nothing(store, compared, monkeypatch):
    first = campaign(store)
    made = len(compared)
    monkeypatch.setattr(measure, "Arena", None)  # not even the arena is made
    assert campaign(store) == first
    assert (len(compared), rows(store)) == (made, 4)


def test_only_what_is_missing_is_measured(store, compared):
    campaign(store, candidates=BOTH[:1])
    compared.clear()
    result = campaign(store, sites=(site(), site("head", rows=(7,))))
    assert compared == [(SHAPE, 2, ["wrong"]), (SHAPE, 5, ["wrong"]), (SHAPE, 7, ["right", "wrong"])]
    assert (len(result), rows(store)) == (6, 6)


def test_a_campaign_returns_only_what_was_asked(store):
    campaign(store)
    result = campaign(store, sites=(site(rows=(5,)),), candidates=BOTH[:1])
    assert [(subject.m, subject.kernel) for subject in result] == [(5, "right")]


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 1},
        {"name": "Another CPU"},
        {"capability": "AVX512"},
        {"cache_bytes": 1 << 23},
        {"versions": {"torch": "2.14", "compiler": "none"}},
        {"versions": {"torch": "2.13", "compiler": "none", "torchao": "0.18"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_device_measures_again(store, compared, change):
    first = campaign(store, candidates=BOTH[:1])
    compared.clear()
    second = campaign(store, candidates=BOTH[:1], device=replace(DEVICE, **change))
    assert len(compared) == 2 and rows(store) == 4
    assert set(first) == set(second)
    compared.clear()
    assert campaign(store, candidates=BOTH[:1]) == first and not compared


def test_colder_or_warmer_weights_are_measured_again(store, compared):
    campaign(store, candidates=BOTH[:1])
    campaign(store, candidates=BOTH[:1], working_set=2 * WORKING_SET)
    assert len(compared) == 4 and rows(store) == 4


def test_what_is_finished_is_kept_when_the_campaign_is_stopped(store, monkeypatch):
    original = measure.compare

    def stopped(shape, m, candidates, **rest):
        if m == 5:
            raise KeyboardInterrupt
        return original(shape, m, candidates, **rest)

    monkeypatch.setattr(measure, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        campaign(store)
    assert rows(store) == 2


def test_a_campaign_tells_its_progress_and_what_went_wrong(store):
    events = []
    campaign(store, events=events)
    assert events[0] == StageStarted("profile", 4)
    progress = [event for event in events if isinstance(event, StageProgress)]
    assert [event.done for event in progress] == [0, 0, 2, 2]
    assert progress[0].what == f"{SHAPE} m=2 own/plain/right"
    notices = [event.text for event in events if isinstance(event, Notice)]
    (notice,) = notices
    assert notice.startswith("own/plain/wrong is incorrect in 2 cases (m=2, m=5): relative error")
    assert events[-1] == StageFinished("profile", "4 timings (2 ok, 2 incorrect), 4 measured now, 0 from the store")
    events.clear()
    campaign(store, events=events)
    assert events == [
        StageStarted("profile", 0),
        Notice(notice),
        StageFinished("profile", "4 timings (2 ok, 2 incorrect), 0 measured now, 4 from the store"),
    ]


def test_a_busy_machine_is_noticed(store, other_load, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    other_load[:] = [0.5]
    events = []
    campaign(store, sites=(site(rows=(2,)),), candidates=BOTH[:1], events=events)
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
def test_the_working_set_is_the_model_rounded_down_or_twice_the_cache_rounded_up(model_elements, cache, expected):
    half = LinearShape(n=model_elements // 2048, k=1024, bias=False, dtype="bfloat16")
    assert working_set_bytes((half, half), replace(DEVICE, cache_bytes=cache), 2) == expected
