"""What a search was asked for, and the identity of its study."""

from dataclasses import replace

import pytest
import torch
from builders.request import make_request
from models.tiny_models import Perceptron

from autoquant.candidates import select
from autoquant.devices.cpu import CpuBackend
from autoquant.devices.cuda import CudaBackend
from autoquant.errors import AutoquantError, CandidateError, QualityError, WorkloadError
from autoquant.evaluators.quality import FunctionQuality
from autoquant.models import ModelRequest, load_request
from autoquant.records import Workload
from autoquant.solver.constraints import Constraints
from autoquant.solver.limits import Limits
from autoquant.tuner.judge import Asked, make_judge
from autoquant.tuner.request import SettledRequest

INT8 = ("int8-row/plain/int8pack-mm",)


def loss(module, part):
    return [0.0, 1.0]


@pytest.fixture
def request_of(tmp_path):
    def make(**changed):
        model = ModelRequest(model=Perceptron(), device="cpu", sample_inputs=(torch.ones(2, 8),))
        asked = {
            "asked": Asked(None, None, FunctionQuality(loss, "own.loss")),
            "candidates": select(INT8, "cpu"),
            "limits": Limits(max_ppl_increase=0.01),
            "seed": 3,
            "db": tmp_path / "plan.db",
        }
        return make_request(model, **(asked | changed))

    return make


def settled_by(request):
    loaded = load_request(request.model)
    return SettledRequest.of(
        request, loaded, make_judge(request.asked, loaded, request.candidates, request.seed, print)
    )


def test_what_the_user_left_open_suits_the_model(request_of):
    settled = settled_by(request_of())
    assert settled.workload == Workload.single()
    assert settled.method.id == "isolated"
    assert settled.candidates[0].format.id == "float32/plain"
    assert settled.limits == Limits(max_ppl_increase=0.01)


def test_where_outputs_are_compared_the_limit_is_of_their_divergence(request_of):
    settled = settled_by(request_of(asked=Asked(None, None, None)))
    assert settled.limits.measure == "divergence"


def test_the_identity_of_a_study_holds_what_its_results_depend_on(request_of):
    settled = settled_by(request_of())
    assert settled.identity() == {
        "model_hash": settled.loaded.content_hash,
        "device": settled.hardware.key,
        "workload": str(Workload.single()),
        "dtype": "float32",
        "quality": "own.loss",
        "candidates": list(INT8),
        "seed": 3,
        "protocol": settled.identity()["protocol"],
        "method": settled.method.version,
    }


def test_layers_are_tried_as_one_where_that_pays_unless_the_user_says_otherwise(
    request_of, monkeypatch
):
    def fuses(asked):
        settled = settled_by(replace(request_of(), fuse=asked))
        assert ("fuse" in settled.identity()) is settled.fuse
        return settled.fuse

    assert [fuses(asked) for asked in (None, True, False)] == [False, True, False]
    monkeypatch.setattr(CpuBackend, "fuses", True)
    assert [fuses(asked) for asked in (None, True, False)] == [True, True, False]
    assert CudaBackend.fuses


def test_limits_and_time_are_no_part_of_the_identity_and_constraints_are(request_of):
    settled = settled_by(request_of())
    others = {"limits": Limits(), "time_budget_s": 9.0, "db": "other.db"}
    assert replace(settled, request=replace(settled.request, **others)).study_id == settled.study_id
    for changed in (
        {"fuse": True},
        {"constraints": Constraints.parse(("0",), (), None)},
        {"seed": 4},
    ):
        other = replace(settled, request=replace(settled.request, **changed))
        assert other.study_id != settled.study_id and set(settled.identity()) <= set(
            other.identity()
        )


def test_a_request_that_contradicts_itself_is_refused_before_the_model_is_loaded(
    request_of, tmp_path
):
    with pytest.raises(QualityError, match="needs a text"):
        request_of(sensitivity="path")
    with pytest.raises(AutoquantError, match="folder"):
        request_of(db=tmp_path / "nowhere" / "plan.db")


def test_a_workload_that_does_not_fit_is_refused(request_of):
    request = request_of()
    request = replace(request, model=replace(request.model, sample_inputs=None))
    with pytest.raises(WorkloadError, match="sample_inputs"):
        settled_by(request)


def test_weights_of_a_dtype_that_no_candidate_computes_with_are_refused(request_of):
    request = request_of()
    model = replace(request.model, model=Perceptron().double())
    with pytest.raises(CandidateError, match=r"weights are float64, .*: give --dtype fp32"):
        settled_by(replace(request, model=model))
