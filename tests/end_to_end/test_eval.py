"""Plans scored on tasks by lm-evaluation-harness, from local files."""

from __future__ import annotations

import copy
import json
import random
import sys
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from autoquant.candidates.routed import RoutedWeight
from autoquant.cli.main import app
from autoquant.delivery.applier import apply
from autoquant.delivery.searched import load_searched
from autoquant.store import open_store
from autoquant.tuner.tasks import score_tasks

from .tiny import WORDS

CHOICES = 4
DOCUMENTS = 40
TASK = """
task: guess_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


def installed():
    return pytest.importorskip(
        "lm_eval.models.huggingface",
        reason="lm_eval is not installed: pip install '.[eval]'",
        exc_type=ImportError,
    )


@pytest.fixture(scope="module")
def documents():
    draw = random.Random(0)

    def words(count):
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(count))

    return [
        {
            "context": words(12),
            "choices": [words(1) for _ in range(CHOICES)],
            "gold": draw.randrange(CHOICES),
        }
        for _ in range(DOCUMENTS)
    ]


@pytest.fixture(scope="module")
def folder(documents, tmp_path_factory):
    """A folder of task files: one whose data is there and one whose data is not."""
    place = tmp_path_factory.mktemp("tasks")
    data = place / "guess.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for kind, path in (("words", data), ("nothing", place / "missing.jsonl")):
        (place / f"{kind}.yaml").write_text(
            TASK.format(kind=kind, data=path, cache=place / "cache")
        )
    return place


@pytest.fixture(scope="module")
def plan(study):
    """A plan that quantizes the output layer, whose weight the embedding shares in the unquantized model."""
    uniform = [
        plan
        for plan in study.plans()
        if plan.kind == "uniform" and plan.label.startswith("uniform int")
    ]
    head = [
        plan
        for plan in uniform
        if any("lm_head.weight" in layer.parameters for layer in plan.layers)
    ]
    return head[0]


def run(searched, *options):
    return CliRunner().invoke(app, ["eval", *map(str, (searched.db, *options))])


@pytest.fixture(scope="module")
def scored(searched, plan, folder):
    """The command's JSON."""
    installed()
    result = run(
        searched, "--plan", plan.plan_id, "--tasks", "guess_words", "--tasks-path", folder, "--json"
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def accuracy(module, tokenizer, documents):
    """How often the right choice, of one token each, is the likeliest."""
    right = 0
    for document in documents:
        ids = torch.tensor([tokenizer(document["context"])["input_ids"]])
        choices = tokenizer(" ".join(document["choices"]))["input_ids"]
        with torch.no_grad():
            logits = module(ids).logits[0, -1]
        right += int(logits[choices].argmax()) == document["gold"]
    return right / len(documents)


def test_the_unquantized_model_and_the_plan_score_what_they_get_right(
    scored, study, searched, plan, documents
):
    loaded = load_searched(plan, str(searched.model), study.facts, None)
    quantized = apply(plan, copy.deepcopy(loaded.module))
    expected = [
        accuracy(module, loaded.tokenizer, documents) for module in (loaded.module, quantized)
    ]
    found = [score for score in scored if score["metric"] == "acc"]
    assert [(score["plan_id"], score["task"]) for score in found] == [
        (None, "guess_words"),
        (plan.plan_id, "guess_words"),
    ]
    assert [score["value"] for score in found] == pytest.approx(expected, abs=1.5 / DOCUMENTS)
    assert all(score["samples"] == DOCUMENTS and 0 < score["stderr"] < 0.1 for score in found)


def test_each_plan_is_scored_on_a_copy_with_its_layers_quantized(study, searched, plan):
    class Watcher:
        names = ("watched",)
        seen: ClassVar[list[set[str]]] = []

        def score(self, module, tokenizer):
            parameters = module.named_parameters(remove_duplicate=False)
            self.seen.append(
                {name for name, parameter in parameters if isinstance(parameter.data, RoutedWeight)}
            )
            return ()

    rows = score_tasks([plan, plan], str(searched.model), study.facts, Watcher(), study.store)
    planned = {
        name
        for layer in plan.layers
        if layer.format != "bfloat16/plain"
        for name in layer.parameters
    }
    assert planned and Watcher.seen == [set(), planned, planned]
    assert [row.plan_id for row in rows] == [None, plan.plan_id, plan.plan_id]


def test_a_quantized_output_layer_is_not_tied_to_the_embedding_again(study, searched, plan, folder):
    installed()
    from autoquant.evaluators.tasks import Tasks

    loaded = load_searched(plan, str(searched.model), study.facts, None)
    module = apply(plan, loaded.module)
    before = module.lm_head.weight
    Tasks(["guess_words"], folder=folder, limit=4).score(module, loaded.tokenizer)
    assert module.lm_head.weight is before and isinstance(before.data, RoutedWeight)
    assert "tie_weights" not in vars(module)


def test_scores_are_kept_and_measured_again_they_replace_the_old_ones(
    scored, searched, plan, folder
):
    for _ in range(2):
        options = (
            "--plan",
            plan.plan_id,
            "--tasks",
            "guess_words",
            "--tasks-path",
            folder,
            "--limit",
            "8",
        )
        assert run(searched, *options).exit_code == 0
    store = open_store(searched.db, create=False)
    for subject in (plan.plan_id, plan.model_hash):
        kept = store.task_scores(subject, plan.dtype)
        assert sorted((score.samples, score.limit) for score in kept) == [(8, 8), (DOCUMENTS, None)]
    assert {score.lm_eval_version for score in kept} == {scored[0]["lm_eval_version"]}
    store.close()


def test_the_table_fits_80_columns_and_shows_both_models(scored, searched, plan, folder):
    result = run(searched, "--plan", plan.plan_id, "--tasks", "guess_words", "--tasks-path", folder)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    for score in scored:
        assert f"{score['value']:.4f} ± {score['stderr']:.4f}" in result.stdout


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (("--tasks", "guess_word"), "did you mean guess_words"),
        (("--tasks", "guess_nothing"), "missing.jsonl"),
        (("--tasks", " , "), "separated by commas"),
        (
            ("--tasks", "guess_words", "--tasks-path", "nowhere"),
            "no folder of task files at nowhere",
        ),
        (("--tasks", "guess_words", "--plan", "ffffffffffff"), "no plan"),
        (("--tasks", "guess_words", "--model", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(searched, plan, folder, options, advice):
    installed()
    given = {"--plan": plan.plan_id, "--tasks-path": folder} | dict(
        zip(options[::2], options[1::2], strict=True)
    )
    result = run(searched, *(part for pair in given.items() for part in pair))
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and advice in result.stderr
    )


def test_without_lm_eval_the_command_says_how_to_install_it(searched, plan, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run(searched, "--plan", plan.plan_id, "--tasks", "guess_words")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "pip install -c constraints.txt '.[eval]'" in result.stderr
