"""Recipes as files: found by name or path, read, written and read back."""

import pytest

from autoquant.errors import RecipeError
from autoquant.recipes import (
    FOLDER_VARIABLE,
    find_recipe,
    read_recipe,
    recipe_files,
    user_folder,
    written,
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An empty folder of the user's own recipes."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return folder


def test_those_that_come_with_the_package_say_what_they_are_for(own):
    assert set(recipe_files()) == {"h200-chat", "cpu-latency", "smallest-within-1pct"}
    for name in recipe_files():
        recipe = find_recipe(name)
        assert recipe.shipped and recipe.about and recipe.options


def test_the_smallest_one_minimizes_memory_within_one_percent(own):
    options = find_recipe("smallest-within-1pct").options
    assert (options["minimize"], options["max-ppl-increase"]) == ("memory", "1%")


def test_the_users_own_are_found_by_name_and_win(own):
    (own / "mine.toml").write_text('about = "Mine"\nbatch = 4\n')
    (own / "cpu-latency.toml").write_text("batch = 8\n")
    assert find_recipe("mine").options == {"batch": 4}
    assert (find_recipe("cpu-latency").options, find_recipe("cpu-latency").shipped) == (
        {"batch": 8},
        False,
    )


def test_a_path_is_a_path_even_in_the_current_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.toml").write_text("seed = 1\n")
    for asked in ("here.toml", "./here.toml", str(tmp_path / "here.toml")):
        assert find_recipe(asked).options == {"seed": 1}


def test_without_a_variable_the_users_own_lie_under_the_configuration_folder(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "autoquant" / "recipes"
    assert "cpu-latency" in recipe_files(), "a folder that does not exist holds none"


def test_an_unknown_name_lists_the_known_ones(own):
    with pytest.raises(
        RecipeError,
        match=r"no recipe 'fast': take one of cpu-latency, h200-chat, .* or give the path",
    ):
        find_recipe("fast")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"batch = ", "is not TOML"),
        (b"about = \xff", "is not TOML"),
        (b"about = 3", "about must be a line of text"),
        (b"[search]\nbatch = 1", "search must be a text, a number, true, false or a list of texts"),
        (b"candidates = [1]", "candidates must be"),
        (b"db = 2026-01-01", "db must be"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_in_one_line(tmp_path, content, what):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=what) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.toml: No such file"):
        find_recipe(str(tmp_path / "none.toml"))


def test_what_is_written_reads_back_as_it_was(tmp_path):
    path = tmp_path / "odd.toml"
    options = {
        "model": 'C:\\models\\"größer"\n\t\x01\x7f 🙂',
        "candidates": ["int8*", "a'b"],
        "fuse": True,
        "seed": -7,
        "max-ppl-increase": 0.01,
    }
    path.write_text(written("What = it is # for", options), encoding="utf-8")
    recipe = read_recipe(path)
    assert (recipe.about, recipe.options) == ("What = it is # for", options)
