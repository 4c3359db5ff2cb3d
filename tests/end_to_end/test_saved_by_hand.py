"""The two commands on a model that was saved by hand: model.pt beside its config.json, then the folder alone."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from autoquant.delivery.on_disk import apply_to_disk
from autoquant.study.study import Study

from .conftest import WORKLOAD, copy_database, folder_print, python, typed
from .quick import CANDIDATES
from .tiny import make_llama, make_tokenizer

GENERATE = """
import sys, torch, autoquant
from transformers import AutoTokenizer
model = autoquant.load(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("w1 w5 w9", return_tensors="pt").input_ids
print(type(model).__name__, model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 3)
"""


@pytest.fixture(scope="module")
def place(files, tmp_path_factory):
    """A folder with model.pt, config.json, the tokenizer and a text, and the database of a search of model.pt."""
    folder = tmp_path_factory.mktemp("by-hand")
    model = make_llama()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    make_tokenizer().save_pretrained(folder)
    state = {
        f"_orig_mod.{name}": value
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    old = {"_orig_mod.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save({"epoch": 1, "state_dict": state | old}, folder / "model.pt")
    shutil.copy(files[1], folder / "text.txt")
    globs = [part for glob in CANDIDATES for part in ("--candidates", glob)]
    options = (
        "--eval-text",
        "text.txt",
        "--device",
        "cpu",
        "--workload",
        WORKLOAD,
        "--time-budget",
        "1s",
        *globs,
    )
    result = typed("search", "model.pt", *options, "--max-ppl-increase", "1000%", cwd=folder)
    assert result.exit_code == 0, result.stderr
    assert "rotary_emb.inv_freq: LlamaForCausalLM computes these itself" in result.stderr
    assert "\n  autoquant apply plan.db\n" in result.stdout
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("plan.db*"))
    copy_database(place / "plan.db", tmp_path / "plan.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.processes
def test_what_was_searched_is_applied_and_generates_from_the_new_folder_alone(run, here):
    result = run("apply", "plan.db")
    assert result.exit_code == 0, result.stderr
    study = Study.open("plan.db")
    folder = here / f"model-{study.best_of_search().plan_id}"
    study.store.close()
    assert f"autoquant generate {folder.name} --prompt TEXT" in result.stdout
    assert {"config.json", "tokenizer.json", "autoquant.json"} <= {
        path.name for path in folder.iterdir()
    }
    alone = here / "alone"
    folder.rename(alone)
    for path in ("model.pt", "config.json", "tokenizer.json", "plan.db"):
        (here / path).unlink()
    fresh = python("-c", GENERATE, alone)
    assert fresh.stdout.split() == ["LlamaForCausalLM", "True"], fresh.stderr


def test_a_folder_that_is_there_already_stays_as_it_is(run, here):
    assert run("apply", "plan.db").exit_code == 0
    before = folder_print(here)
    result = run("apply", "plan.db")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "exists already and holds this plan; load it, or choose another --out" in result.stderr
    assert folder_print(here) == before
    [folder] = here.glob("model-*")
    (folder / "autoquant.json").unlink()
    result = run("apply", "plan.db")
    assert (result.exit_code, "exists already; choose another --out" in result.stderr) == (2, True)


def test_the_new_folder_is_beside_the_database_wherever_one_is(run, here, monkeypatch):
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert run("apply", "../plan.db").exit_code == 0
    assert list((here / "elsewhere").iterdir()) == [] and len(list(here.glob("model-*"))) == 1


def test_the_same_weights_in_another_form_are_the_model_that_was_searched(run, here):
    make_llama().save_pretrained(here / "folder")
    make_tokenizer().save_pretrained(here / "folder")
    result = run("apply", "plan.db", "--model", "folder")
    assert result.exit_code == 0, result.stderr
    assert len(list(here.glob("folder-*"))) == 1


@pytest.mark.processes
def test_a_tokenizer_given_apart_is_saved_with_the_model(here):
    (here / "words").mkdir()
    for path in here.glob("tokenizer*"):
        path.rename(here / "words" / path.name)
    study = Study.open("plan.db")
    facts = replace(study.facts, source={**study.facts.source, "tokenizer": "words"})
    report = apply_to_disk(study.best_of_search(), "model.pt", "out", facts=facts)
    study.store.close()
    assert report.generates and "tokenizer.json" in report.files
    shutil.rmtree(here / "words")
    fresh = python("-c", GENERATE, here / "out")
    assert fresh.stdout.split() == ["LlamaForCausalLM", "True"], fresh.stderr
