"""A recipe names code: a suggestion, which the error repeats."""

from __future__ import annotations

import pytest
import torch

from .conftest import refused, run

CODE = {"model-factory": "evil:run", "sample-inputs": "evil:run", "quality": "evil:run"}


@pytest.fixture
def recipe(evil, tmp_path):
    path = tmp_path / "others.toml"
    path.write_text("".join(f'{key} = "{value}"\n' for key, value in CODE.items()))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    return path


def test_code_that_a_recipe_names_is_not_imported(recipe, marker):
    message = refused("search", "weights.pt", "--recipe", recipe)
    for key, value in CODE.items():
        assert f"--{key} {value}" in message, "all of it at once"
    assert not marker.exists()


def test_what_the_command_names_is_not_asked_for_again(recipe, marker):
    given = ("--quality", "mine:loss", "--sample-inputs", "mine:inputs")
    message = refused("search", "weights.pt", "--recipe", recipe, *given)
    assert "--model-factory evil:run" in message and "mine" not in message
    assert not marker.exists()


def test_a_loss_that_a_text_replaces_is_not_asked_for(recipe, tmp_path):
    (tmp_path / "text.txt").write_text("words")
    message = refused("search", "weights.pt", "--recipe", recipe, "--eval-text", "text.txt")
    assert "--quality" not in message and "--model-factory" in message


def test_named_in_the_command_it_runs(recipe, marker):
    given = [part for key, value in CODE.items() for part in (f"--{key}", value)]
    run("search", "weights.pt", "--recipe", recipe, *given)
    assert marker.exists()


@pytest.mark.parametrize("flag", ["trust-pickle", "trust-remote-code"])
def test_a_recipe_cannot_set_a_flag(tmp_path, flag):
    (tmp_path / "others.toml").write_text(f"{flag} = true\n")
    message = refused("search", "weights.pt", "--recipe", tmp_path / "others.toml")
    assert f"{flag} is not taken from a recipe, give --{flag} on the command line" in message
