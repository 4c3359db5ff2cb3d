"""What a search is judged by where little or nothing is said of it, from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from autoquant.errors import QualityError, TextError
from autoquant.evaluators.outputs import SAMPLES
from autoquant.evaluators.text import DEFAULT_TEXT
from autoquant.events import Notice
from autoquant.study.study import Study
from autoquant.tuner import driver
from autoquant.tuner.stages import prove

from . import quick
from .conftest import WORKLOAD
from .tiny import Perceptron, save_llama

SHORT = ("--device", "cpu", "--candidates", "int8-row/plain/int-mm", "--time-budget", "0.5s")
OWN_TEXT = "note: quality is measured on a text that autoquant ships: one like what the model will read is better"


@pytest.fixture(autouse=True)
def few_plans(monkeypatch, tmp_path):
    monkeypatch.setattr(prove, "LEAST_PLANS", 1)
    monkeypatch.setattr(prove, "FRONT_PLANS", 1)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("judged") / "model", layers=1)


class Convolutional(nn.Module):
    """A classifier of images, as small as can be."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Linear(8 * 6 * 6, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        x = torch.relu(self.convolution(images)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


def export(path, module, *inputs):
    torch.export.save(torch.export.export(module.eval(), inputs), path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    return export(
        tmp_path_factory.mktemp("exported") / "net.pt2", Convolutional(), torch.randn(2, 3, 8, 8)
    )


def search(run, model, *options):
    """A short search that must succeed: the study, and what it said."""
    result = run("search", model, "--db", "plan.db", *SHORT, *options)
    assert result.exit_code == 0, result.stderr
    return Study.open("plan.db"), result


def test_a_language_model_is_judged_by_a_text_that_comes_with_autoquant(run, model):
    study, result = search(run, model, "--workload", WORKLOAD)
    assert (
        "100% of the tokens of a text that autoquant ships are unknown to the tokenizer"
        in result.stderr
    )
    assert (
        result.stderr.count(OWN_TEXT) == 1
        and "(--eval-text FILE or --eval-data DATASET)" in result.stderr
    )
    assert {row["measure"] for row in study.rows()} == {"perplexity"}
    again, _ = search(run, model, "--workload", WORKLOAD, "--eval-text", DEFAULT_TEXT)
    assert again.study_id == study.study_id
    page = run("report", "plan.db", "--out", "report.html")
    assert page.exit_code == 0 and f"the text {DEFAULT_TEXT}" in Path("report.html").read_text()


def test_rows_of_a_dataset_are_the_same_study_as_their_text(run, model, files, tmp_path):
    text = files[1].read_text()
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"n": 1, "text": row}) + "\n" for row in text.splitlines())
    )
    study, result = search(run, model, "--workload", WORKLOAD, "--eval-data", "rows.jsonl")
    assert OWN_TEXT not in result.stderr and "unknown to the tokenizer" not in result.stderr
    assert study.store.references(study.study_id)["judge"]["words"].startswith(
        "the dataset rows.jsonl (key "
    )
    other, _ = search(run, model, "--workload", WORKLOAD, "--eval-text", files[1])
    assert other.study_id == study.study_id


def test_a_saved_recipe_finds_the_dataset_from_anywhere(run, model, files, tmp_path):
    (tmp_path / "d.txt").write_text(files[1].read_text())
    search(
        run,
        model,
        "--workload",
        WORKLOAD,
        "--eval-data",
        "d.txt:text",
        "--save-recipe",
        "again.toml",
    )
    assert f'eval-data = "{tmp_path / "d.txt"}:text"' in Path("again.toml").read_text()


def test_an_exported_program_is_judged_by_how_far_its_outputs_are(run, exported):
    study, result = search(run, exported)
    assert (
        "note: judged by how little outputs diverge from the unquantized model's" in result.stderr
    )
    assert "a loss of your own says more, --quality package.module:callable" in result.stderr
    assert "Output" in result.stdout and "divergence" in result.stdout
    assert "perplexity" not in result.stdout.lower() and "increase" not in result.stdout.lower()
    rows = {row["kind"]: row for row in study.rows()}
    assert {row["measure"] for row in rows.values()} == {"divergence"}
    assert rows["original"]["perplexity_increase"] == 0.0
    uniform = rows["uniform"]
    assert 0 < uniform["perplexity_increase"] < 0.01 and uniform["within_limits"]
    assert uniform["perplexity"] is None and uniform["kl"] is None
    proof = study.proofs()[uniform["plan_id"]]
    assert (
        proof.loss == pytest.approx(proof.increase.value)
        and len(proof.selection_losses) == SAMPLES["selection"]
    )
    assert study.limits.as_object() == {
        "max_ppl_increase": 0.01,
        "max_memory_bytes": None,
        "measure": "divergence",
    }
    assert study.best(max_ppl_increase=1.0).plan_id in {row["plan_id"] for row in rows.values()}
    for command in (("pareto", "--chart"), ("show", "--plan", uniform["plan_id"])):
        printed = run(command[0], "plan.db", *command[1:])
        assert printed.exit_code == 0, printed.output
        assert "divergence" in printed.stdout and "ncrease" not in printed.stdout, printed.stdout
    solved = json.loads(run("solve", "plan.db", "--max-ppl-increase", "5%", "--json").stdout)
    assert solved["limits"]["measure"] == "divergence"
    assert run("report", "plan.db", "--out", "report.html").exit_code == 0
    page = Path("report.html").read_text()
    assert (
        "divergence of outputs from the unquantized model" in page
        and "divergence at most 1.00%" in page
    )
    applied = run("apply", "plan.db", "--plan", uniform["plan_id"], "--out", "quantized")
    assert applied.exit_code == 0 and "bit for bit" in applied.stdout


def test_a_limit_of_divergence_is_kept_to(run, exported):
    study, result = search(run, exported, "--max-ppl-increase", "0.0000001%")
    assert "divergence at most" in result.stdout
    assert [row["kind"] for row in study.rows() if row["within_limits"]] == ["original"]


def test_a_search_of_an_exported_program_goes_on_and_another_seed_is_another_study(run, exported):
    study, _ = search(run, exported)
    again, result = search(run, exported)
    assert again.study_id == study.study_id and "nothing measured" in result.stderr
    assert search(run, exported, "--seed", "1")[0].study_id != study.study_id


@pytest.mark.slow
def test_an_exported_program_is_searched_in_processes_of_its_own(exported, monkeypatch):
    monkeypatch.delenv("AUTOQUANT_IN_PROCESS")
    events = []
    study = driver.search(
        exported,
        db="plan.db",
        device="cpu",
        candidates=quick.CANDIDATES,
        time_budget_s=0.5,
        listener=events.append,
    )
    assert not [
        event
        for event in events
        if isinstance(event, Notice) and "runs in one process" in event.text
    ]
    assert [plan for plan in study.plans() if plan.kind == "uniform"]
    assert all(proof.loss < 0.01 for proof in study.proofs().values())


def live(**options):
    torch.manual_seed(0)
    base = {"db": "plan.db", "device": "cpu", "candidates": quick.CANDIDATES, "time_budget_s": 0.5}
    return driver.search(Perceptron().eval(), **(base | options))


def test_a_live_module_needs_its_inputs_only():
    study = live(sample_inputs=(torch.randn(4, 32),))
    assert study.limits.measure == "divergence" and study.recommended() is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {},
            TextError,
            r"give --sample-inputs package.module:callable.* \(if it is a language model, give --tokenizer",
        ),
        (
            {"eval_data": "rows.jsonl"},
            TextError,
            r"give --sample-inputs .* and leave out --eval-data .* or give --quality package.module:callable",
        ),
        ({"eval_text": "missing.txt"}, TextError, "there is no text file at missing.txt"),
        ({"eval_data": "missing.csv"}, TextError, "there is no file or folder at missing.csv"),
        (
            {"eval_data": "rows.jsonl", "quality": len},
            TextError,
            "--eval-data and --quality cannot be combined",
        ),
        (
            {"max_kl": 0.1, "sample_inputs": (torch.ones(4, 32),)},
            QualityError,
            "--max-kl needs a text",
        ),
        (
            {"sensitivity": "path", "sample_inputs": (torch.ones(4, 32),)},
            QualityError,
            "--sensitivity path needs a text: without one use --sensitivity isolated",
        ),
        ({"sensitivity": "guess"}, QualityError, "no sensitivity 'guess'"),
    ],
    ids=str,
)
def test_what_cannot_be_judged_is_refused_before_a_database_is_made(
    tmp_path, options, error, message
):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(error, match=message) as refused:
        live(**options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "plan.db").exists()


def test_a_language_model_without_a_tokenizer_is_told_both_ways(model, tmp_path):
    from autoquant.models import load_model

    module = load_model(str(model)).module
    with pytest.raises(
        TextError, match=r"give one with --tokenizer FOLDER, or judge it by --quality"
    ):
        driver.search(module, db="plan.db", device="cpu", candidates=quick.CANDIDATES)
