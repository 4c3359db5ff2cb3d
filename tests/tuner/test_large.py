"""Models that do not fit: what is said and refused before the work."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from builders.records import make_plan
from models.test_model_streaming import WORKLOAD, Parts, bytes_of, load_whole, save

from autoquant.candidates import get_format
from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.errors import CandidateError, PlanError
from autoquant.evaluators.quality import TextQuality
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.models.fitting import gib
from autoquant.profiler.record import record_model
from autoquant.records import Prediction
from autoquant.tuner import large
from autoquant.tuner.prove import Prover


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture
def streamed(folder, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "100kB")
    return load_model(folder)


def settled(loaded, *formats):
    """What the check reads of a settled request."""
    candidates = [SimpleNamespace(format=get_format(name)) for name in formats]
    return SimpleNamespace(loaded=loaded, candidates=candidates)


def test_a_model_that_fits_needs_no_word(folder):
    assert large.streaming_notice(load_whole(folder)) == ""


def test_the_notice_says_what_does_not_fit_and_which_plans_do(streamed):
    notice = large.streaming_notice(streamed)
    size = gib(bytes_of(streamed.module))
    assert f"takes {size}, and a search needs twice that" in notice
    assert f"plans of up to {gib(streamed.stream.most_plan_bytes)} are searched" in notice


def test_the_least_that_weights_take_counts_formats_by_their_bits(streamed):
    recording = record_model(streamed, WORKLOAD, ignore)
    linears = sum(site.shape.n * site.shape.k for site in recording.sites)
    head = 64 * 32  # tied to the embedding, which stays beside it
    rest = bytes_of(streamed.module) - 2 * (linears - head)
    formats = [get_format(name) for name in ("int8-row/plain", "int4-g32/cpu-packed")]
    assert large.least_bytes(recording, formats) == rest + linears // 2
    assert large.least_bytes(recording, formats[:1]) == rest + linears


def test_a_model_of_which_no_plan_fits_is_refused_with_what_would_do(streamed):
    recording = record_model(streamed, WORKLOAD, ignore)
    large.check_smallest(settled(streamed, "int8-row/plain"), recording)
    streamed.stream.most_plan_bytes = 1000
    with pytest.raises(PlanError, match=f"allow more with {LIMIT_VARIABLE}"):
        large.check_smallest(settled(streamed, "int8-row/plain"), recording)


def prover(loaded):
    return Prover(loaded, WORKLOAD, TextQuality(Parts(), "cpu"), "cpu", "eager")


def plan(size, kind="front"):
    prediction = Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=size)
    return replace(make_plan(layers=(), kind=kind), prediction=prediction)


def test_a_plan_that_has_no_room_is_not_proven(streamed):
    with pytest.raises(CandidateError, match=r"its weights take 1 MiB, and cpu has room for"):
        prover(streamed).prove(plan(1 << 20))


def test_the_unquantized_model_is_judged_whole_and_timed_by_a_stand_in(streamed, folder):
    proof = prover(streamed).prove(plan(0, kind="original"))
    whole = prover(load_whole(folder)).prove(plan(0, kind="original"))
    assert proof.perplexity == whole.perplexity and proof.selection_losses == whole.selection_losses
    assert proof.memory_bytes == whole.memory_bytes == bytes_of(streamed.module)
    assert any("timed with the weights of 1 of 4 blocks" in note for note in proof.notes)
    assert not any("blocks" in note for note in whole.notes)


def test_a_plan_is_measured_as_if_the_unquantized_model_fitted(streamed, folder):
    some = plan(0)
    ours, theirs = (prover(each).prove(some) for each in (streamed, load_whole(folder)))
    assert (ours.loss, ours.kl, ours.increase) == (theirs.loss, theirs.kl, theirs.increase)
