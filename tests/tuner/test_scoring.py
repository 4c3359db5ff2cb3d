"""The score stage: which changes are asked for, what is kept under which method, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders.records import make_choice
from models.tiny_models import tiny_llama

from autoquant.candidates import get_format
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change, fisher
from autoquant.evaluators.text import TextParts
from autoquant.events import StageFinished, StageProgress, StageStarted
from autoquant.models import from_module
from autoquant.profiler.record import record
from autoquant.records import RouteStep, Workload
from autoquant.runtime.phases import make_phases
from autoquant.store import open_store
from autoquant.tuner.choices import SiteChoices
from autoquant.tuner.scoring import score
from autoquant.tuner.workers import jobs
from autoquant.tuner.workers.in_process import InProcessRunner
from autoquant.tuner.workers.jobs import Bench

WORKLOAD = Workload.parse("prefill=4")
WINDOWS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(5))
INT8, ORIGINAL = "int8-row/plain", "bfloat16/plain"
A16, A8 = "int8-row+a16", "int8-row+a8-row"


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 60)


@pytest.fixture(scope="module")
def bench():
    generator = torch.Generator().manual_seed(5)
    windows = {
        part: torch.randint(0, 64, (2, 20), generator=generator)
        for part in ("calibration", "selection", "report")
    }
    loaded = from_module(tiny_llama().requires_grad_(False))
    return Bench(
        load=lambda: loaded,
        quality=TextQuality(TextParts(windows), "cpu"),
        workload=WORKLOAD,
        device="cpu",
        execution="eager",
    )


def choice(site, format_id, kernel):
    route = (RouteStep(upper_m=None, kernel=kernel),)
    return make_choice(site.name, format_id, shape=site.shape, route=route, numerics="")


@pytest.fixture(scope="module")
def choices(bench):
    """int8 by two numerics everywhere, but for the first site, which timings have left one."""
    phases = make_phases(bench.loaded, WORKLOAD)
    sites = record(bench.loaded.module, phases).sites
    made = []
    for number, site in enumerate(sites):
        all_three = [
            choice(site, ORIGINAL, "matmul"),
            choice(site, INT8, "int-mm"),
            choice(site, INT8, "int8pack-mm"),
        ]
        made.append(SiteChoices(site, tuple(all_three if number else all_three[:2]), {}))
    return made


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "plan.db")
    opened.put_model("m0del", {})
    yield opened
    opened.close()


@pytest.fixture
def run(bench, choices, store):
    def go(method, some=choices):
        events = []
        runner = InProcessRunner(bench)
        scores = score(
            some,
            method=SENSITIVITIES[method],
            model_hash="m0del",
            quality_key="text",
            device_type="cpu",
            runner=runner,
            store=store,
            listener=events.append,
        )
        return scores, events

    return go


def test_isolated_losses_are_measured_for_what_choices_use(run, choices):
    scores, events = run("isolated")
    names = [of_site.site.name for of_site in choices]
    assert (names[0], A16) not in scores.losses and (names[0], A8) in scores.losses
    assert all((name, A16) in scores.losses for name in names[1:])
    assert scores.loss_map.curvature == 0
    assert events[0] == StageStarted("score", len(choices))


@pytest.mark.parametrize("method", ["fisher", "path"])
def test_the_others_score_a_numerics_in_every_layer_whatever_timings_left_over(
    run, choices, method
):
    scores, events = run(method)
    assert set(scores.losses) == {
        (of.site.name, key) for of in choices for key in (A16, A8, "bfloat16+a16")
    }
    assert scores.loss_map.curvature != 0
    assert events[0] == StageStarted("score", 2)  # the unquantized numerics need no scoring
    assert [event.done for event in events if isinstance(event, StageProgress)] == [1, 2]


@pytest.mark.parametrize("method", list(SENSITIVITIES))
def test_what_is_known_is_not_scored_again_and_predicts_the_same(run, method, monkeypatch):
    first, events = run(method)
    assert f"sensitivity {method}: " in events[-1].summary
    assert isinstance(events[-1], StageFinished) and "scored now" in events[-1].summary
    monkeypatch.setattr(InProcessRunner, "run", None)
    again, events = run(method)
    assert again == first
    assert f"sensitivity {method}: 0 changes of 0 layers scored now" in events[-1].summary


def test_losses_of_different_methods_never_mix(run, store):
    found = {method: run(method)[0].losses for method in SENSITIVITIES}
    kept = {
        method.version: store.losses("m0del", "text", method.version)
        for method in SENSITIVITIES.values()
    }
    assert len(kept) == 3 and all(kept.values())
    for method, losses in found.items():
        version = SENSITIVITIES[method].version
        assert all(kept[version][key] == loss for key, loss in losses.items())
    key = max(found["path"], key=found["path"].get)
    assert len({losses[key] for losses in found.values()}) == 3


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing(run, store):
    whole, _ = run("path")
    store.engine.dispose()
    with store.engine.begin() as connection:
        connection.exec_driver_sql(
            f"DELETE FROM loss WHERE numerics = '{A8}' AND layer LIKE '%layers.1%'"
        )
        connection.exec_driver_sql(f"DELETE FROM loss WHERE numerics = '{A8}' AND layer = '*'")
    again, events = run("path")
    assert again.losses == pytest.approx(whole.losses)
    assert events[0] == StageStarted("score", 1)


def bench_of(module):
    parts = TextParts({"calibration": WINDOWS, "selection": WINDOWS, "report": WINDOWS}, WINDOWS)
    loaded = from_module(module)
    return Bench(
        load=lambda: loaded,
        quality=TextQuality(parts, "cpu"),
        workload=WORKLOAD,
        device="cpu",
        execution="eager",
    )


@pytest.mark.parametrize("method", list(SENSITIVITIES))
@pytest.mark.parametrize(
    ("name", "activation"),
    [("static-int8/plain", "a8-static"), ("smooth-int8/plain", "a8-row-scaled")],
)
def test_an_activation_is_scored_with_what_the_weight_keeps_for_it(method, name, activation):
    bench, fmt = bench_of(tiny_llama().requires_grad_(False)), get_format(name)
    loaded = bench.loaded
    site = next(
        site
        for site in record(loaded.module, make_phases(loaded, WORKLOAD)).sites
        if site.name.endswith("layers.0.mlp.down_proj")
    )
    (made,) = jobs._with_inputs([Change(site, "made", fmt, activation)], bench, lambda _event: None)
    stored = bench.calibration.stored(site.parameters[0], fmt)
    assert torch.equal(made.input_kept, fmt.input_kept(stored))
    wrong = made.input_kept.clone()
    wrong.view(-1)[0] = (
        1e-3 if wrong.ndim == 0 else 1e4
    )  # all is clipped; all others are rounded away
    coarse = replace(made, numerics="coarse", input_kept=wrong)
    found = {}
    SENSITIVITIES[method].score(
        loaded.module, [made, coarse], bench.quality, lambda _name, losses: found.update(losses)
    )
    assert found[site.name, "coarse"] > max(3 * found[site.name, "made"], 1e-9)


def test_a_weight_that_cannot_be_rounded_for_its_inputs_is_left_out_with_the_reason():
    llama = tiny_llama().requires_grad_(False)
    llama.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    bench = bench_of(llama)
    loaded = bench.loaded
    sites = record(loaded.module, make_phases(loaded, WORKLOAD)).sites
    gptq, nearest = get_format("int3-g32-gptq/bit-planes"), get_format("int3-g32/bit-planes")
    changes = [Change(site, fmt.values, fmt, "a16") for site in sites for fmt in (nearest, gptq)]
    told = []
    left = jobs._with_inputs(changes, bench, told.append)
    reasons = [event.text for event in told[1:]]
    broken = "model.layers.1.self_attn.q_proj"
    assert (
        f"{gptq.id} not considered for {broken}.weight: the layer's inputs on the calibration text are not finite"
        in reasons
    )
    assert len(left) == len(changes) - len(reasons)
    assert (broken, nearest.values) in {(change.site.name, change.numerics) for change in left}
    for change in left:
        assert (change.stored is not None) is change.format.needs_inputs


@pytest.mark.parametrize("method", list(SENSITIVITIES))
def test_numerics_that_leave_every_weight_as_it_is_lose_nothing_and_are_not_scored(
    run, choices, method, monkeypatch
):
    scored, score_job = [], jobs.ScoreJob.run

    def watched(job, *rest):
        scored.extend(job.changes)
        return score_job(job, *rest)

    monkeypatch.setattr(jobs.ScoreJob, "run", watched)
    losses = run(method)[0].losses
    originals = {of.site.name: losses[of.site.name, "bfloat16+a16"] for of in choices}
    assert set(originals.values()) == {0.0}
    assert scored and "bfloat16+a16" not in {numerics for _, numerics, *_ in scored}
