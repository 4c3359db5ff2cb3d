"""The profile stage: what is measured, kept, and never measured again."""

from dataclasses import replace

import pytest
from builders.records import make_device, make_subject
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from autoquant.errors import HungError, ProcessDiedError
from autoquant.events import Notice, StageFinished, StageStarted
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import LinearShape, Measurement, Roofline
from autoquant.store import open_store
from autoquant.store.schema import TimingRow
from autoquant.tuner.profiling import measure_all
from autoquant.tuner.workers.jobs import AtWork, Limited, Timed

DEVICE = make_device(versions={"torch": "2.13", "compiler": "none"})
SHAPE = LinearShape(n=16, k=32, bias=False, dtype="float32")
ROOFLINE = Roofline(bandwidth_bytes_per_s=1e9, flops_per_s={})


def subject(m=2, kernel="right", working_set=1 << 14):
    return make_subject(
        shape=SHAPE, m=m, format="own/plain", kernel=kernel, working_set_bytes=working_set
    )


def replace_subjects(job, subjects):
    return replace(job, subjects=subjects)


FOUR = [subject(m, kernel) for m in (2, 5) for kernel in ("right", "wrong")]


class Runner:
    """Answers profile jobs as a job does: cell by cell. The process dies at subjects in `deadly`.

    With `tells`, it says which subject is at work alone.
    """

    def __init__(self, deadly=(), *, tells=False, death=None):
        self.jobs = []
        self.limits = []
        self.deadly = deadly
        self.tells = tells
        self.death = death or ProcessDiedError("SIGSEGV")
        self.stops_before = None

    def run(self, job, on_message):
        self.jobs.append(list(job.subjects))
        self.limits.append(job.roofline)
        on_message(Limited(ROOFLINE))
        for m in dict.fromkeys(subject.m for subject in job.subjects):
            cell = [subject for subject in job.subjects if subject.m == m]
            if self.stops_before == m:
                raise KeyboardInterrupt
            for subject in cell:
                if self.tells:
                    on_message(AtWork(subject))
                if subject in self.deadly:
                    raise self.death
            if self.tells:
                on_message(AtWork(None))
            on_message(Timed(tuple(map(measurement, cell))))


def measurement(of):
    if of.kernel == "wrong":
        return Measurement(
            subject=of, outcome="incorrect", reason="relative error 3", relative_error=3.0
        )
    return Measurement(subject=of, outcome="ok", samples_us=(1.0, 2.0), relative_error=0.0)


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "plan.db")
    yield opened
    opened.close()


def rows(store):
    with Session(store.engine) as session:
        return session.scalar(select(func.count()).select_from(TimingRow))


def stage(store, subjects=FOUR, *, runner=None, device=DEVICE, events=None):
    store.put_device(device)
    listener = (events if events is not None else []).append
    return measure_all(
        subjects, runner=runner or Runner(), hardware=device, store=store, listener=listener
    )


def test_only_what_is_missing_is_measured(store):
    stage(store, FOUR[:1])
    runner = Runner()
    result = stage(store, FOUR, runner=runner)
    assert runner.jobs == [FOUR[1:]] and list(result) == FOUR and rows(store) == 4


def test_a_second_run_measures_nothing_and_adds_nothing(store):
    first = stage(store)
    runner = Runner()
    assert stage(store, runner=runner) == first
    assert (runner.jobs, rows(store)) == ([], 4)


def test_only_what_was_asked_is_returned(store):
    stage(store)
    assert list(stage(store, FOUR[2:3])) == FOUR[2:3]


def test_a_roofline_that_was_measured_is_kept_and_given_to_the_next_job(store):
    stage(store, FOUR[:1])
    assert store.roofline(DEVICE) == ROOFLINE
    runner = Runner()
    stage(store, runner=runner)
    assert runner.limits == [ROOFLINE]


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
def test_another_device_measures_again(store, change):
    stage(store)
    runner = Runner()
    stage(store, runner=runner, device=replace(DEVICE, **change))
    assert runner.jobs == [FOUR] and rows(store) == 8


def test_colder_or_warmer_weights_are_measured_again(store):
    stage(store)
    runner = Runner()
    colder = [subject(working_set=1 << 15)]
    stage(store, colder, runner=runner)
    assert runner.jobs == [colder]


def test_what_is_finished_is_kept_when_the_stage_is_stopped(store):
    runner = Runner()
    runner.stops_before = 5
    with pytest.raises(KeyboardInterrupt):
        stage(store, runner=runner)
    assert rows(store) == 2


def test_a_candidate_that_ends_its_process_has_failed_and_the_rest_goes_on(store):
    deadly = subject(5, "right")
    result = stage(store, runner=Runner([deadly]))
    assert {s.kernel: m.outcome for s, m in result.items() if s.m == 5} == {
        "right": "failed",
        "wrong": "incorrect",
    }
    assert result[deadly].reason == "SIGSEGV" and rows(store) == 4


def test_what_was_at_work_alone_is_tried_once_more_since_others_may_have_ended_its_process(store):
    deadly = subject(5, "right")
    runner = Runner([deadly], tells=True)
    result = stage(store, runner=runner)
    assert result[deadly].reason == "SIGSEGV"
    assert runner.jobs == [FOUR, [deadly], [subject(5, "wrong")]]


def test_a_candidate_that_hung_is_not_tried_any_more_and_the_rest_goes_on(store):
    hung = HungError("it did not end within 3 s")
    runner = Runner([subject(2, "right"), subject(5, "right")], tells=True, death=hung)
    result = stage(store, runner=runner)
    assert runner.jobs == [FOUR, [subject(2, "wrong"), subject(5, "wrong")]]
    assert result[subject(2, "right")].reason == "it did not end within 3 s"
    assert result[subject(5, "right")].reason == (
        "not tried: at 16x32:float32 m=2 it did not end within 3 s"
    )
    assert {result[subject(m, "wrong")].outcome for m in (2, 5)} == {"incorrect"}


def test_a_candidate_that_ended_two_processes_is_not_tried_any_more(store):
    deadly = [subject(m, "right") for m in (2, 5, 6)]
    more = [*FOUR, subject(6, "right"), subject(6, "wrong")]
    died = ProcessDiedError("its process was ended by SIGSEGV")
    runner = Runner(deadly, tells=True, death=died)
    result = stage(store, more, runner=runner)
    assert len(runner.jobs) == 5 and deadly[2] not in runner.jobs[4]
    assert result[deadly[2]].reason.startswith("not tried: at 16x32:float32 m=5 its process")


def test_a_process_that_no_candidate_ends_alone_is_not_tried_forever(store):
    class Tired(Runner):
        def run(self, job, on_message):
            if len(job.subjects) > 1:
                raise ProcessDiedError("out of memory")

    with pytest.raises(ProcessDiedError, match="out of memory"):
        stage(store, runner=Tired())


def test_a_process_that_was_killed_from_outside_once_loses_nothing(store):
    class Killed(Runner):
        def run(self, job, on_message):
            super().run(replace_subjects(job, job.subjects[:2]), on_message)
            if len(self.jobs) == 1:
                raise ProcessDiedError("the worker process was ended from outside")
            if len(job.subjects) > 2:
                super().run(replace_subjects(job, job.subjects[2:]), on_message)

    runner = Killed()
    result = stage(store, runner=runner)
    assert {subject: m.outcome for subject, m in result.items()} == {
        subject: measurement(subject).outcome for subject in FOUR
    }
    assert rows(store) == 4


def test_a_timing_that_another_process_saved_meanwhile_counts(store):
    class Late(Runner):
        def run(self, job, on_message):
            stage(store, FOUR[:1])  # the other process
            with_other_times = Measurement(subject=FOUR[0], outcome="ok", samples_us=(9.0,))
            on_message(Timed((with_other_times,)))

    result = stage(store, FOUR[:1], runner=Late())
    assert result == {FOUR[0]: measurement(FOUR[0])} and rows(store) == 1


def test_the_stage_ends_with_what_came_from_the_store(store):
    events = []
    stage(store, events=events)
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text.startswith("own/plain/wrong is incorrect in 2 cases (m=2, m=5)")
    assert events[-1] == StageFinished(
        "profile", "4 timings (2 ok, 2 incorrect), 4 measured now, 0 from the store"
    )
    events.clear()
    stage(store, events=events)
    assert events == [
        StageStarted("profile", 0),
        notice,
        StageFinished("profile", "4 timings (2 ok, 2 incorrect), 0 measured now, 4 from the store"),
    ]


def test_the_protocol_of_the_timings_is_noted(store):
    stage(store, FOUR[:1])
    assert (
        list(store.timings(DEVICE, PROTOCOL)) == FOUR[:1] and store.timings(DEVICE, "another") == {}
    )
