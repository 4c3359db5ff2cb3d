"""`autoquant apply` with a stand-in for the work itself."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType

import pytest

from autoquant.cli.main import app

from .conftest import MIXED, SMALL, UNIFORM


@dataclass(frozen=True)
class Report:
    out: object
    files: tuple = ("config.json", "model.safetensors")
    layers: int = 90
    formats: object = None
    memory_bytes: int = 2**24
    original_memory_bytes: int = 2**25
    logits_identical: bool = True
    loaded_again: bool = True
    repeatable: bool = True


@pytest.fixture
def work(monkeypatch):
    """A stand-in for `autoquant.apply`: `calls` notes what was asked, `changes` alters the report."""
    module = ModuleType("autoquant.applier")
    module.calls, module.changes = [], {}

    def apply_to_disk(plan, model, out, *, facts, device=None, listener=None):
        module.calls.append((plan.plan_id, str(model), out.name))
        return replace(Report(out=out, formats=plan.formats()), **module.changes)

    module.apply_to_disk = apply_to_disk
    monkeypatch.setitem(sys.modules, "autoquant.applier", module)
    return module


def test_the_recommended_plan_is_applied_to_the_model_that_was_searched(runner, database, work):
    result = runner.invoke(app, ["apply", str(database), "--out", "DIR"])
    assert result.exit_code == 0, result.stderr
    assert work.calls == [(MIXED, "/somewhere/tiny-model", "DIR")]
    assert "60 x int8-row, 30 x bf16" in result.stdout
    assert "16.0 MiB instead of 32.0 MiB" in result.stdout
    assert "bit for bit" in result.stdout


def test_a_plan_and_another_place_of_the_model_can_be_named(runner, database, work):
    runner.invoke(app, ["apply", str(database), "--plan", UNIFORM[:5], "--model", "elsewhere", "--out", "DIR"])
    assert work.calls == [(UNIFORM, "elsewhere", "DIR")]


def test_another_limit_takes_another_plan(runner, database, work):
    runner.invoke(app, ["apply", str(database), "--max-ppl-increase", "5%", "--out", "DIR"])
    assert work.calls == [(SMALL, "/somewhere/tiny-model", "DIR")]


def test_a_plan_and_a_limit_together_are_a_usage_error(runner, database, work):
    result = runner.invoke(app, ["apply", str(database), "--plan", MIXED, "--max-ppl-increase", "1%", "--out", "DIR"])
    assert (result.exit_code, result.stderr.count("\n"), work.calls) == (2, 1, [])
    assert "--plan: cannot be combined with --max-ppl-increase" in result.stderr


def test_a_checkpoint_that_differs_from_memory_is_an_error(runner, database, work):
    work.changes = {"logits_identical": False}
    result = runner.invoke(app, ["apply", str(database), "--out", "DIR"])
    assert result.exit_code == 2
    assert "do not use it" in result.stderr


def test_logits_that_differ_from_run_to_run_are_not_said_to_be_the_same(runner, database, work):
    work.changes = {"repeatable": False}
    result = runner.invoke(app, ["apply", str(database), "--out", "DIR"])
    assert result.exit_code == 0 and "its weights are those" in result.stdout and "bit for bit" not in result.stdout


def test_a_missing_database_is_refused_before_anything_is_written(runner, tmp_path, work):
    result = runner.invoke(app, ["apply", str(tmp_path / "plan.db"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == []
