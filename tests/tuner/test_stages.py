"""Recording, profiling and scoring, and the flow of all stages; a fake runner does the work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from builders.gated import CANDIDATES, WORKLOAD
from builders.records import DEVICE, STUDY, put_study
from builders.runner import FakeRunner
from builders.search import make_plan
from builders.space import make_ledger

from autoquant.devices.cpu import CpuBackend
from autoquant.errors import ConstraintError
from autoquant.events import Notice
from autoquant.profiler.timing import PROTOCOL
from autoquant.records import Delivery, Interval, RunTimes
from autoquant.solver.constraints import UNBOUND, Constraints
from autoquant.tuner import flow
from autoquant.tuner.budget import Budget
from autoquant.tuner.setup import SearchSetup
from autoquant.tuner.stages.crossovers import measure_crossovers
from autoquant.tuner.stages.profile import profile_linears, searchable
from autoquant.tuner.stages.record import bind_constraints, record_linears
from autoquant.tuner.stages.score import score_choices
from autoquant.tuner.workers.jobs import ProveJob, ScoreJob

pytestmark = pytest.mark.usefixtures("quick_solver", "quick_collector")


def constrained(setup, **constraints):
    """The setup of a search with these constraints, for the same study."""
    settled = setup.settled
    request = replace(settled.request, constraints=Constraints.parse(**constraints))
    other = replace(settled, request=request)
    put_study(setup.store, other.study_id, model=settled.loaded.content_hash, workload=WORKLOAD)
    return replace(setup, settled=other)


def faster_in_int8(subject):
    return {"matmul": 100.0, "int8pack-mm": 40.0, "int-mm": 30.0}[subject.kernel]


def space_of(setup, runner, bound=UNBOUND):
    recording = record_linears(setup)
    timings = profile_linears(setup, recording, setup.measurer(runner))
    return score_choices(setup, recording, bound, timings, runner)


def test_linears_are_recorded_once(setup, monkeypatch):
    recording = record_linears(setup)
    assert [site.name for site in recording.sites] == ["gate", "up", "down"]
    monkeypatch.setattr("autoquant.tuner.request.record_model", None)
    assert record_linears(setup) == recording


def test_a_constraint_about_no_layer_is_refused(setup):
    sites = record_linears(setup).sites
    wrong = constrained(setup, keep=["lm_head"])
    with pytest.raises(ConstraintError, match="no searched layer matches 'lm_head'"):
        bind_constraints(wrong, sites)


def test_constraints_are_reported(setup, events):
    sites = record_linears(setup).sites
    kept = constrained(setup, keep=["down"])
    assert set(bind_constraints(kept, sites).reasons) == {"down"}
    assert events[-1] == Notice("1 of 3 layers kept unquantized by --keep down")


def test_every_candidate_is_timed_once_at_each_shape_and_m(setup):
    runner = FakeRunner()
    recording = record_linears(setup)
    timings = profile_linears(setup, recording, setup.measurer(runner))
    found = {(s.candidate, s.shape.n, s.m) for s in timings.measurements}
    assert found == {(candidate.id, 64, 4) for candidate in CANDIDATES}
    assert {s.working_set_bytes for s in timings.measurements} == {timings.working_set_bytes}


@pytest.mark.parametrize("broken", ["down", "gate"])
def test_a_linear_that_cannot_be_timed_stays_as_it_is(setup, events, broken):
    """One whose unquantized kernel is wrong here, and one of another dtype than the model."""
    if broken == "gate":
        setup.settled.loaded.module.gate.float()
        setup.settled.loaded.module.gate.register_forward_pre_hook(lambda _m, args: args[0].float())
        hook = lambda _m, _args, y: y.bfloat16()  # noqa: E731
        setup.settled.loaded.module.gate.register_forward_hook(hook)
    recording = record_linears(setup)
    timings = profile_linears(setup, recording, setup.measurer(FakeRunner(faster_in_int8)))
    if broken == "down":
        down = next(site for site in recording.sites if site.name == "down")
        other = replace(down, shape=replace(down.shape, n=32))
        sites = tuple(other if site is down else site for site in recording.sites)
        recording = replace(recording, sites=sites)
    left = searchable(setup, recording, UNBOUND, timings)
    assert [s.name for s in left.sites] == [s.name for s in recording.sites if s.name != broken]
    assert all(broken not in site.siblings for site in left.sites)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any(f"left unquantized: {broken}" in text for text in notices)


def test_timings_are_kept_in_the_store(setup):
    recording = record_linears(setup)
    timings = profile_linears(setup, recording, setup.measurer(FakeRunner()))
    assert setup.store.timings(DEVICE, PROTOCOL) == timings.measurements


def test_with_fusion_linears_of_one_input_are_timed_as_one_too(setup):
    fused = replace(setup, fuse=True)
    timings = profile_linears(fused, record_linears(fused), fused.measurer(FakeRunner()))
    assert {s.shape.n for s in timings.measurements} == {64, 128}


def test_the_space_has_the_scored_choices_of_every_layer(setup):
    losses = {"bfloat16+a16": 0.0, "int8-row+a16": 0.1, "int8-row+a8-row": 0.3}
    runner = FakeRunner(latency_us=faster_in_int8, loss=lambda _layer, numerics: losses[numerics])
    space = space_of(setup, runner)
    assert [layer[0].name for layer in space.options] == ["gate", "up", "down"]
    for layer, original in zip(space.options, space.unquantized, strict=True):
        assert {(c.numerics, c.loss) for c in layer} == set(losses.items())
        assert original.format == "bfloat16/plain" and original in layer
    searched = sum(choice.memory_bytes for choice in space.unquantized)
    assert space.context.other_bytes == record_linears(setup).parameter_bytes - searched == 0


def test_what_is_scored_already_is_not_scored_again(setup):
    space = space_of(setup, FakeRunner())
    again = FakeRunner()
    assert space_of(setup, again).options == space.options
    assert not any(isinstance(job, ScoreJob) for job in again.jobs)


def test_a_kept_layer_has_the_unquantized_choice_only(setup):
    kept = constrained(setup, keep=["down"])
    bound = bind_constraints(kept, record_linears(kept).sites)
    space = space_of(kept, FakeRunner(latency_us=faster_in_int8), bound)
    formats = [{choice.format for choice in layer} for layer in space.options]
    assert formats[2] == {"bfloat16/plain"} and formats[0] == {"bfloat16/plain", "int8-row/plain"}


def test_a_layer_that_is_pinned_to_what_cannot_be_used_is_refused_with_the_reason(setup):
    def unusable(subject):
        return 10.0 if subject.kernel == "matmul" else "not here"

    pinned = constrained(setup, pin=["gate=int8-row"])
    bound = bind_constraints(pinned, record_linears(pinned).sites)
    with pytest.raises(ConstraintError, match=r"gate is pinned by .*not here"):
        space_of(pinned, FakeRunner(latency_us=unusable), bound)


def test_with_fusion_layers_can_be_computed_as_one(setup):
    def faster_together(subject):
        return faster_in_int8(subject) / (4 if subject.shape.n == 128 else 1)

    space = space_of(replace(setup, fuse=True), FakeRunner(latency_us=faster_together))
    joined = [{choice.joined for choice in layer} - {()} for layer in space.options]
    assert joined == [{("gate", "up")}, {("gate", "up")}, set()]


def test_routes_stay_as_they_are_where_kernels_need_no_second_look(store):
    ledger = make_ledger(store)
    phases = {"prefill": 1.0, "decode": 1.0}
    plan = make_plan("a")
    plan = replace(plan, layers=tuple(replace(each, latency_us=phases) for each in plan.layers))
    ledger.put_plan(plan)
    measure_crossovers(ledger, None, None, "cpu")
    assert store.plans(STUDY) == [plan]


def test_without_a_compiler_nothing_is_computed_as_one_and_both_are_said(
    setup, events, monkeypatch
):
    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: "no C++ compiler")
    assert not replace(setup, fuse=True).for_this_machine().fuse
    assert [event.text for event in events] == [
        "running eagerly, since torch.compile does not work here: no C++ compiler",
        "layers are not computed as one, since torch.compile does that",
    ]


@pytest.fixture
def run(setup, monkeypatch):
    """Run the flow with a fake runner; every plan that is delivered works and is faster."""
    runners = []

    def start_runner(_self):
        runners.append(FakeRunner(latency_us=faster_in_int8))
        return runners[-1]

    @dataclass(frozen=True)
    class Deliverer:
        calibration: object = None
        calls: list[str] = field(default_factory=list)

        def make_ready(self):
            self.calls.append("ready")

        def close(self):
            self.calls.append("closed")

        def __call__(self, plan):
            self.calls.append("delivered")
            return Delivery(
                plan_id=plan.plan_id,
                loop="forward",
                where="in memory",
                times=RunTimes(request_ms=5.0),
                original_times=RunTimes(request_ms=10.0),
                ratio=Interval(value=0.5, low=0.49, high=0.51),
            )

    monkeypatch.setattr(CpuBackend, "compile_failure", lambda _backend: None)
    monkeypatch.setattr(SearchSetup, "start_runner", start_runner)
    deliverer = Deliverer()
    monkeypatch.setattr(SearchSetup, "deliverer", lambda _self: deliverer)

    def go(limit_s):
        flow.run_stages(setup, Budget.of(setup.store, setup.settled.study_id, limit_s, 0.0))
        return runners

    go.deliverer = deliverer
    return go


def test_a_search_goes_through_all_stages_and_recommends_a_plan_that_was_delivered(run, setup):
    (runner,) = run(limit_s=0.1)
    facts = setup.store.study(setup.settled.study_id)
    assert runner.closed and facts.complete
    kinds = [type(job).__name__ for job in runner.jobs]
    assert list(dict.fromkeys(kinds)) == ["ProfileJob", "ScoreJob", "ProveJob"]
    recommended = flow.Study(setup.store, setup.settled.study_id).recommended()
    assert recommended is not None and recommended.plan_id in setup.store.deliveries(
        setup.settled.study_id
    )


def test_the_process_that_delivers_is_made_ready_before_and_ended(run, setup, monkeypatch):
    run(limit_s=0.1)
    assert run.deliverer.calls == ["ready", "delivered", "closed"]
    setup.store.update_study(setup.settled.study_id, complete=False)
    monkeypatch.setattr(flow, "prove_front", lambda *_arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(limit_s=0.1)
    assert run.deliverer.calls[3:] == ["ready", "closed"]


def test_a_complete_search_with_no_more_time_only_delivers(run, setup, events):
    run(limit_s=0.1)
    assert len(run(limit_s=0.1)) == 1, "no second runner was started"
    assert any(isinstance(e, Notice) and "is complete" in e.text for e in events)


def test_the_same_search_proves_nothing_twice(run, setup):
    run(limit_s=0.1)
    setup.store.update_study(setup.settled.study_id, complete=False)
    _, second = run(limit_s=0.1)
    assert not any(isinstance(job, ProveJob) for job in second.jobs)
    assert second.closed


def test_the_runner_is_closed_when_a_stage_fails(run, setup, monkeypatch):
    def fails(*_arguments):
        raise RuntimeError("no")

    monkeypatch.setattr(flow, "score_choices", fails)
    with pytest.raises(RuntimeError):
        run(limit_s=0.1)
    assert not setup.store.study(setup.settled.study_id).complete
