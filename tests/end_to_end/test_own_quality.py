"""A module, its inputs and its loss, all named on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from autoquant.cli.main import app

from .conftest import typed

MINE = """
import torch
from torch import nn

PARTS = {"calibration": 40, "selection": 60, "report": 80}


class TwoArms(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, *, left, right):
        return self.head(torch.relu(self.left(left)) + torch.relu(self.right(right)))


def draw(rows):
    return torch.randn(2, rows, 32, generator=torch.Generator().manual_seed(rows))


def inputs():
    return dict(zip(("left", "right"), draw(4)))


def pair():
    return tuple(draw(4))


def number():
    return 4


def loss(module, part):
    left, right = draw(PARTS[part])
    return (module(left=left, right=right) - 1.0).square().mean(dim=1)


def nothing(module, part):
    return []


def broken(module, part):
    return DATA[part]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, which holds a module's weights and the code that goes with them."""
    (tmp_path / "my_model_code.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_model_code", raising=False)
    code = {}
    exec(MINE, code)
    torch.manual_seed(0)
    torch.save(code["TwoArms"]().state_dict(), tmp_path / "weights.pt")
    return tmp_path


def search(**changes):
    given = {"model-factory": "TwoArms", "sample-inputs": "inputs", "quality": "loss"} | changes
    named = [
        part
        for name, value in given.items()
        if value
        for part in (f"--{name}", f"my_model_code:{value}")
    ]
    options = (
        "--candidates",
        "int8*",
        "--time-budget",
        "0.5s",
        "--db",
        "own.db",
        "--device",
        "cpu",
        "--json",
    )
    return ("search", "weights.pt", *named, *options)


def test_a_module_is_searched_and_written_by_the_functions_named(here):
    result = typed(*search())
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["study_id"]
    front = json.loads(CliRunner().invoke(app, ["pareto", "own.db", "--json"]).stdout)
    assert front and all(row["perplexity"] is None for row in front)
    uniform = next(row for row in front if row["kind"] == "uniform")
    code = ("--model-factory", "my_model_code:TwoArms", "--sample-inputs", "my_model_code:inputs")
    applied = typed("apply", "own.db", "--plan", uniform["plan_id"], "--out", "quantized", *code)
    assert applied.exit_code == 0, applied.stderr
    assert "bit for bit" in applied.stdout


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"quality": "lost"},
            "my_model_code has no lost (did you mean loss?): check --quality my_model_code:lost",
        ),
        (
            {"quality": "PARTS"},
            "--quality needs a callable that takes (module, part) and returns losses",
        ),
        ({"quality": "nothing"}, "must return one number per sample"),
        ({"quality": "broken"}, "failed on the report part (NameError"),
        ({"sample-inputs": None}, "--sample-inputs package.module:callable"),
        ({"sample-inputs": "number"}, "returned a int: it must return a tuple"),
    ],
    ids=str,
)
def test_functions_that_do_not_fit_are_refused_in_one_line(here, changes, advice):
    result = CliRunner().invoke(app, search(**changes))
    assert (result.exit_code, result.stdout) == (2, "")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and advice in errors[0], result.stderr


def test_inputs_are_cast_to_what_the_module_computes_in(here):
    from autoquant.models import load_model

    loaded = load_model(
        "weights.pt",
        dtype="bf16",
        model_factory="my_model_code:TwoArms",
        sample_inputs="my_model_code:inputs",
    )
    assert {tensor.dtype for tensor in loaded.example_inputs.values()} == {torch.bfloat16}
    assert loaded.source.sample_inputs == "my_model_code:inputs"
    assert loaded.module(**loaded.example_inputs).shape == (4, 8)
