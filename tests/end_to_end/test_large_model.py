"""A model larger than the memory it may use: searched, applied, loaded and run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import autoquant
from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.records import STAND_IN
from autoquant.store import open_store
from autoquant.study.study import Study

from .conftest import WORKLOAD, typed
from .tiny import save_llama, save_text

CANDIDATES = ("int8-row/plain/int8pack-mm", "int4-g64/cpu-packed/int4pack-mm")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    save_llama(folder / "model", layers=6)
    save_text(folder / "text.txt")
    return folder


def search(here, db, *more):
    candidates = [word for name in CANDIDATES for word in ("--candidates", name)]
    return typed(
        "search", "model", "--eval-text", "text.txt", "--db", db, "--workload", WORKLOAD,
        "--device", "cpu", "--max-ppl-increase", "90%", "--time-budget", "1s", *candidates, *more,
        cwd=here,
    )  # fmt: skip


@pytest.fixture(scope="module")
def searched(here):
    """The same search with two thirds of the model's memory, and with all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIMIT_VARIABLE, f"{size(here) * 2 // 3}")
        capped = search(here, "capped.db")
        assert capped.exit_code == 0, capped.output
    free = search(here, "free.db")
    assert free.exit_code == 0, free.output
    return capped, free


def size(here):
    return sum(path.stat().st_size for path in (here / "model").glob("*.safetensors"))


def study(here, name):
    return Study(open_store(here / name), None)


def test_the_search_says_that_blocks_are_brought_one_at_a_time(searched):
    capped, free = searched
    assert "blocks are brought there one at a time" in capped.stderr
    assert "one at a time" not in free.stderr


def test_proofs_are_the_same_as_with_all_memory(here, searched):
    capped, free = study(here, "capped.db"), study(here, "free.db")
    assert capped.facts.recording == free.facts.recording
    ours, theirs = capped.proofs(), free.proofs()
    both = ours.keys() & theirs.keys()
    assert len(both) >= 2
    for plan_id in both:
        assert ours[plan_id].loss == pytest.approx(theirs[plan_id].loss, rel=1e-3)
        assert ours[plan_id].memory_bytes == theirs[plan_id].memory_bytes


def test_no_plan_is_proven_that_has_no_room(here, searched):
    capped = study(here, "capped.db")
    most = capped.limits.max_memory_bytes
    sizes = [
        p.memory_bytes for i, p in capped.proofs().items() if capped.plan(i).kind != "original"
    ]
    assert sizes and max(sizes) <= most


def test_the_unquantized_times_are_marked(here, searched):
    notes = [note for proof in study(here, "capped.db").proofs().values() for note in proof.notes]
    assert any(note.startswith(STAND_IN) for note in notes)
    front = typed("pareto", "capped.db", cwd=here).stdout
    for text in (searched[0].stdout, front):
        assert STAND_IN in " ".join(text.split())
    assert STAND_IN not in searched[1].stdout


def test_the_plan_was_run_as_its_user_will_beside_a_stand_in(here, searched):
    delivered = list(study(here, "capped.db").deliveries().values())
    assert delivered and not any(each.reason for each in delivered)
    assert all(each.ratio and each.notes[0].startswith(STAND_IN) for each in delivered)


def test_the_memory_of_each_stage_is_kept_and_shown(here, searched):
    kept = study(here, "capped.db").stage_memory()
    assert {"load", "record", "profile", "score", "prove"} <= kept.keys()
    assert all(sizes["host"] > 1 << 20 for sizes in kept.values())
    out = here / "report.html"
    assert typed("report", "capped.db", "--out", out, cwd=here).exit_code == 0
    assert "Most memory" in out.read_text()


def test_the_plan_is_applied_layer_by_layer_loaded_and_run(here, searched, monkeypatch):
    plan = next(p for p in study(here, "capped.db").plans() if p.kind == "uniform")
    monkeypatch.setenv(LIMIT_VARIABLE, f"{size(here) * 2 // 3}")
    applied = typed("apply", "capped.db", "--plan", plan.plan_id, "--out", "small", cwd=here)
    assert applied.exit_code == 0, applied.output
    assert "layers were quantized one at a time" in applied.stdout
    monkeypatch.delenv(LIMIT_VARIABLE)
    typed("apply", "capped.db", "--plan", plan.plan_id, "--out", "whole", cwd=here)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        expected = autoquant.load(here / "whole")(ids).logits
        assert torch.equal(autoquant.load(here / "small")(ids).logits, expected)
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(here / "small")(ids).logits, expected
        )
    manifest = json.loads((here / "small" / "autoquant.json").read_text())
    assert manifest["plan_id"] == plan.plan_id


def test_a_model_of_which_no_plan_fits_is_refused_before_anything_is_timed(here, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, f"{size(here) // 6}")
    result = search(here, "none.db")
    assert result.exit_code == 2
    assert "no plan fits" in result.stderr and LIMIT_VARIABLE in result.stderr
    assert "profile" not in result.stderr
