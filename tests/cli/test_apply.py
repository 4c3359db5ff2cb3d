"""`autoquant apply` with a stand-in for the work itself."""

import sys
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace

import pytest
from builders.searched import MIXED, SMALL, UNIFORM

from autoquant.cli.main import app


@dataclass(frozen=True)
class Report:
    out: object
    files: tuple = ("config.json", "model.safetensors")
    layers: int = 90
    formats: object = None
    memory_bytes: int = 2**24
    original_memory_bytes: int = 2**25
    compared: str = "logits"
    needs_module: bool = False
    generates: bool = True
    needs_code: object = field(default_factory=dict)


@pytest.fixture
def work(monkeypatch):
    """A stand-in for `autoquant.apply`: `calls` notes what was asked, `changes` alters the report."""
    module = ModuleType("autoquant.delivery.on_disk")
    module.calls, module.folders, module.changes = [], [], {}

    def apply_to_disk(plan, model, out, *, facts, device=None, listener=None, trust=None):
        module.calls.append((plan.plan_id, str(model), out.name))
        module.folders.append(out.parent)
        return replace(Report(out=out.absolute(), formats=plan.formats()), **module.changes)

    module.apply_to_disk = apply_to_disk
    monkeypatch.setitem(sys.modules, "autoquant.delivery.on_disk", module)
    return module


def test_the_recommended_plan_is_applied_to_the_model_that_was_searched(runner, database, work):
    result = runner.invoke(app, ["apply", str(database), "--out", "DIR"])
    assert result.exit_code == 0, result.stderr
    assert work.calls == [(MIXED, "/somewhere/tiny-model", "DIR")]
    assert "60 x int8-row, 30 x bf16" in result.stdout
    assert "16.0 MiB instead of 32.0 MiB" in result.stdout
    assert "bit for bit" in result.stdout


def test_a_plan_and_another_place_of_the_model_can_be_named(runner, database, work):
    runner.invoke(
        app, ["apply", str(database), "--plan", UNIFORM[:5], "--model", "elsewhere", "--out", "DIR"]
    )
    assert work.calls == [(UNIFORM, "elsewhere", "DIR")]


def test_another_limit_takes_another_plan(runner, database, work):
    runner.invoke(app, ["apply", str(database), "--max-ppl-increase", "5%", "--out", "DIR"])
    assert work.calls == [(SMALL, "/somewhere/tiny-model", "DIR")]


def test_a_plan_and_a_limit_together_are_a_usage_error(runner, database, work):
    result = runner.invoke(
        app, ["apply", str(database), "--plan", MIXED, "--max-ppl-increase", "1%", "--out", "DIR"]
    )
    assert (result.exit_code, result.stderr.count("\n"), work.calls) == (2, 1, [])
    assert "--plan: cannot be combined with --max-ppl-increase" in result.stderr


def test_without_a_folder_it_is_named_after_model_and_plan_beside_the_database(
    runner, database, work
):
    for address in (str(database), f"sqlite:///{database}"):
        result = runner.invoke(app, ["apply", address])
        assert result.exit_code == 0, result.stderr
        assert work.calls.pop() == (MIXED, "/somewhere/tiny-model", f"tiny-model-{MIXED}")
        assert work.folders.pop() == database.parent


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/model.pt", "model"),
        ("weights.safetensors", "weights"),
        ("Some-Model-3.1-8B", "Some-Model-3.1-8B"),
        ("some-org/some-model", "some-model"),
        ("runs/best/", "best"),
        ("runs/best/.", "best"),
    ],
)
def test_the_folder_is_named_after_any_kind_of_model(runner, database, work, model, name):
    runner.invoke(app, ["apply", str(database), "--model", model])
    assert work.calls == [(MIXED, model, f"{name}-{MIXED}")]


@pytest.mark.parametrize(
    ("changes", "commands"),
    [
        ({}, ["autoquant generate DIR --prompt TEXT", "autoquant.load('DIR')"]),
        ({"generates": False}, ["autoquant.load('DIR')"]),
        ({"needs_module": True}, ["autoquant.load('DIR', module)"]),
    ],
)
def test_it_ends_with_what_can_be_done_with_the_folder(runner, database, work, changes, commands):
    work.changes = changes
    lines = runner.invoke(app, ["apply", str(database), "--out", "DIR"]).stdout.splitlines()
    following = lines[lines.index("Next:") + 1 :]
    assert len(following) == len(commands)
    assert all(command in line for command, line in zip(commands, following, strict=True))


def test_logits_that_differ_from_run_to_run_are_not_said_to_be_the_same(runner, database, work):
    work.changes = {"compared": "weights"}
    result = runner.invoke(app, ["apply", str(database), "--out", "DIR"])
    assert (
        result.exit_code == 0
        and "its weights are those" in result.stdout
        and "bit for bit" not in result.stdout
    )


def test_a_missing_database_is_refused_before_anything_is_written(runner, tmp_path, work):
    result = runner.invoke(
        app, ["apply", str(tmp_path / "plan.db"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_trained_on_weights_are_said_to_be_others_with_their_quality(runner, database, monkeypatch):
    asked = {}

    def apply_retrained(study, plan, model, out, **options):
        asked.update(options, model=str(model))
        applied = Report(out=out.absolute(), formats=plan.formats())
        return SimpleNamespace(
            applied=SimpleNamespace(**vars(applied), model_hash="0123"),
            quality=("Perplexity 20, 21",),
            beyond="+3.00 % is beyond 1 %",
        )

    module = ModuleType("autoquant.tuner.retrained")
    module.apply_retrained = apply_retrained
    monkeypatch.setitem(sys.modules, "autoquant.tuner.retrained", module)
    command = ["apply", str(database), "--out", "DIR", "--retrained", "--model", "trained"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert asked["model"] == "trained" and asked["asked"].text is None
    text = " ".join(result.stdout.split())
    assert "Applied to other weights (content 0123)" in text and "Perplexity 20, 21" in text
    assert "Note: +3.00 % is beyond 1 %, the limit of the search." in text


def test_a_text_to_judge_by_is_for_trained_on_weights(runner, database, work):
    result = runner.invoke(app, ["apply", str(database), "--eval-text", "text.txt"])
    assert result.exit_code == 2 and not work.calls
    assert "with --retrained only" in " ".join(result.stderr.split())
