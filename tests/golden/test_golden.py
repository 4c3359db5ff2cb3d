"""What earlier versions wrote stays readable and unchanged: names, ids, databases, a checkpoint.

A test that fails here says that users lose what they have. The files are kept as they were written,
see `write.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from end_to_end import quick
from end_to_end.conftest import FACTS, rows
from typer.testing import CliRunner

import autoquant
from autoquant.candidates.routed import RoutedWeight
from autoquant.cli.main import app
from autoquant.records import LayerChoice, LinearShape, RouteStep, Workload, content_key
from autoquant.solver.planning import PlanContext
from autoquant.solver.planning import make_plan as plan_of
from autoquant.store.connect import open_existing
from autoquant.study.study import Study

from . import write

HERE = Path(__file__).parent
STUDY = "644e6705"
STUDY_OF_PROTOCOL_4 = "5da8c82a"
"""Another protocol of timings makes another study: the newest search goes on with those only."""
PLANS = {
    "e2a46f6b": "original",
    "4e13e24d": "uniform int8-row a16",
    "9a2976be": "uniform float16 a16",
}
RECOMMENDED = "6deed148"
LOSS_KEY = ("33e07d15ca6f-bfloat16", "path-1")  # of the quality and the method


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    """Hashes are made by the code of today."""
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copied(tmp_path):
    """Copy a database to where it can be written."""

    def copy(name):
        path = tmp_path / f"{name}.db"
        shutil.copyfile(HERE / f"{name}.sqlite", path)
        return path

    return copy


@pytest.fixture
def here(monkeypatch):
    """Searches are short, and on the device whose database is kept."""
    threads = torch.get_num_threads()
    for module, name, value in quick.SHORTER:
        monkeypatch.setattr(module, name, value)
    for name in ("AUTOQUANT_EAGER", "AUTOQUANT_IN_PROCESS"):
        monkeypatch.setenv(name, "1")
    write.on_this_device(monkeypatch)
    yield
    torch.set_num_threads(threads)


def test_a_device_has_the_key_that_it_had():
    assert write.DEVICE.key == "b3d6e8f76ade"


def test_a_workload_is_written_as_it_was():
    assert str(Workload.parse("prefill=8,decode=4", batch=2)) == "prefill=8,decode=4 batch=2"


def test_content_has_the_key_that_it_had():
    assert content_key({"b": [1, 2.5, None], "a": "é"}) == "84afbf1d4853"


def test_a_plan_has_the_id_that_it_had():
    alone = LayerChoice(
        name="head",
        shape=LinearShape(n=64, k=32, bias=True, dtype="bfloat16"),
        format="int8-row/plain",
        route=(
            RouteStep(upper_m=8, kernel="int8pack-mm"),
            RouteStep(upper_m=None, kernel="int-mm"),
        ),
        numerics="int8-row+a16 int8-row+a8-row",
        latency_us={"prefill": 3.5},
        memory_bytes=2112,
        loss=0.25,
        parameters=("head.weight",),
    )
    joined = LayerChoice(
        name="q",
        shape=LinearShape(n=64, k=32, bias=False, dtype="bfloat16"),
        format="float8-row/plain",
        route=(RouteStep(upper_m=None, kernel="scaled-mm"),),
        numerics="float8-row+a8-float8-row",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
        parameters=("q.weight",),
        joined=("q", "k"),
    )
    workload = Workload.parse("prefill=8")
    context = PlanContext(
        study_id="5tudy000",
        model_hash="m",
        dtype="bfloat16",
        workload=workload,
        other_bytes=0,
        rest_ms=0.0,
    )
    ids = [
        plan_of(choices, "front 1", "front", context).plan_id
        for choices in ([alone], [alone, joined])
    ]
    assert ids == ["333835d8", "4f085c4b"]


def test_candidates_have_the_names_that_databases_hold():
    known = json.loads((HERE / "candidates.json").read_text())
    now = write.candidate_names()
    assert {name: now.get(name) for name in known} == known
    assert [name for name in now if name in known] == list(
        known
    )  # a study's id depends on their order


def test_a_finished_study_is_read_as_it_was(copied):
    study = Study.open(copied("finished"))
    assert study.study_id == STUDY and study.facts.complete
    assert study.facts.device == write.DEVICE
    labels = {plan.plan_id: plan.label for plan in study.plans()}
    assert len(labels) == 10 and labels.items() >= PLANS.items()
    assert study.recommended().plan_id == RECOMMENDED
    assert len(study.pareto()) == 10
    losses = study.store.losses(study.facts.model_hash, *LOSS_KEY)
    assert {numerics for _, numerics in losses} == {"bfloat16+a16", "float16+a16", "int8-row+a16"}
    study.store.close()


@pytest.mark.parametrize("command", ["show", "pareto", "studies"])
@pytest.mark.parametrize("name", ["finished", "interrupted", "finished-4", "interrupted-4"])
def test_the_command_line_reads_an_old_database(copied, command, name):
    result = CliRunner().invoke(app, [command, str(copied(name)), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


def test_the_same_search_finds_a_finished_study_and_measures_nothing_again(here, copied):
    db = copied("finished-4")
    open_existing(db).close()  # migrates it: what follows changes no row
    before = rows(db)
    study = write.search(HERE, db, budget_s=0.2)
    assert study.study_id == STUDY_OF_PROTOCOL_4
    assert rows(db) == before
    study.store.close()


def test_the_same_search_goes_on_where_an_interrupted_one_stopped(here, copied):
    db = copied("interrupted-4")
    open_existing(db).close()  # migrates it: what follows changes no row
    before = rows(db)
    study = write.search(HERE, db, budget_s=0.2)
    assert study.study_id == STUDY_OF_PROTOCOL_4 and study.facts.complete
    assert len(study.proofs()) > 2
    after = rows(db)
    assert all(set(map(repr, before[table])) <= set(map(repr, after[table])) for table in FACTS)
    assert [len(after[table]) for table in ("timing", "loss")] == [
        len(before[table]) for table in ("timing", "loss")
    ]
    study.store.close()


def test_a_checkpoint_loads_to_the_same_weights_and_products():
    module = autoquant.load(HERE / "checkpoint")
    weights = {name: parameter.data for name, parameter in module.named_parameters()}
    routed = {name for name, weight in weights.items() if isinstance(weight, RoutedWeight)}
    assert routed == {f"{write.BLOCK}.{leaf}.weight" for leaf in write.LAYERS}
    expected = torch.load(HERE / "expected.pt", weights_only=True)
    found = write.expected_of(module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("weight"):
            assert torch.equal(found[name], tensor), name
        else:  # the sums of products depend on the instruction set
            torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=0.02, msg=name)
