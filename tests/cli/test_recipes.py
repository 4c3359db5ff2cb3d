"""`autoquant search --recipe`, `--save-recipe` and `autoquant recipes`."""

import json

import pytest

from autoquant.cli.main import app
from autoquant.recipes import FOLDER_VARIABLE, read_recipe
from autoquant.records import Workload


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A folder of the user's own recipes, and the current folder beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def searched(runner, driver, *options):
    """What the driver was called with."""
    result = runner.invoke(app, ["search", *options])
    assert result.exit_code == 0, result.stderr
    call = driver.calls[-1]
    return {name: value for name, value in call.items() if name != "listener"}


def refused(runner, driver, *options):
    """The one line that the search is refused with."""
    result = runner.invoke(app, ["search", *options])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert driver.calls == []
    return result.stderr


def test_a_recipe_gives_the_options_that_the_command_line_leaves_out(runner, driver):
    call = searched(runner, driver, "model", "--eval-text", "t", "--recipe", "h200-chat")
    assert (call["device"], call["dtype"], call["fuse"]) == ("cuda", "bf16", None)
    assert call["workload"] == Workload.parse("prefill=2048,decode=256")
    assert call["time_budget_s"] == 1200.0
    assert call["db"] == "plan.db"


def test_an_option_of_the_command_line_wins_wherever_it_stands(runner, driver, own):
    (own / "mine.toml").write_text(
        'batch = 4\nfuse = true\ncandidates = ["int4*"]\nmax-ppl-increase = 0.5\n'
    )
    given = ["--batch", "2", "--no-fuse", "--candidates", "int8*", "--max-ppl-increase", "2%"]
    before = searched(runner, driver, *given, "model", "--eval-text", "t", "--recipe", "mine")
    after = searched(runner, driver, "--recipe", "mine", "model", "--eval-text", "t", *given)
    alone = searched(runner, driver, "--recipe", "mine", "model", "--eval-text", "t")
    assert before == after
    assert (before["fuse"], before["candidates"], before["max_ppl_increase"]) == (
        False,
        ("int8*",),
        0.02,
    )
    assert (alone["fuse"], alone["candidates"], alone["max_ppl_increase"]) == (
        True,
        ("int4*",),
        0.5,
    )
    assert alone["workload"] is None and (before["batch"], alone["batch"]) == (2, 4)


def test_a_given_option_wins_over_one_of_the_recipe_that_excludes_it(runner, driver, own):
    (own / "text.toml").write_text('eval-text = "t"\n')
    (own / "loss.toml").write_text('quality = "a:b"\n')
    call = searched(runner, driver, "model", "--recipe", "text", "--quality", "mine:loss")
    assert (call["eval_text"], call["quality"]) == (None, "mine:loss")
    call = searched(runner, driver, "model", "--recipe", "loss", "--eval-text", "given.txt")
    assert (call["eval_text"], call["quality"]) == ("given.txt", None)


def test_a_recipe_may_hold_everything_the_model_too(runner, driver, own):
    (own / "all.toml").write_text('model = "m"\neval-text = "t"\ntime-budget = 90\n')
    call = searched(runner, driver, "--recipe", "all")
    assert (call["model"], call["eval_text"], call["time_budget_s"]) == ("m", "t", 90.0)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("max-ppl = 1", "a search has no option 'max-ppl'; did you mean max-ppl-increase?"),
        ("zzz = 1", "a search has no option 'zzz'; `autoquant search --help` lists them"),
        (
            "trust-pickle = true",
            "trust-pickle is not taken from a recipe, give --trust-pickle on the command line",
        ),
        ('recipe = "cpu-latency"', "recipe is not taken from a recipe"),
        ('batch = "many"', "batch: "),
        ("batch = 0", "batch: "),
        ('dtype = "int3"', "dtype: "),
        ('fuse = "yes"', "fuse must be true or false"),
        ('candidates = "int8*"', "candidates must be a list of texts"),
        ('db = ["a", "b"]', "db must be one text or number"),
        ("db = true", "db must be one text or number"),
    ],
)
def test_a_key_or_value_that_a_search_does_not_take_is_refused_by_file_and_key(
    runner, driver, own, line, what
):
    (own / "bad.toml").write_text(f"{line}\n")
    message = refused(runner, driver, "model", "--eval-text", "t", "--recipe", "bad")
    assert message.startswith(f"error: {own / 'bad.toml'}: {what}")


def test_an_unknown_recipe_is_refused(runner, driver):
    assert "no recipe 'fast': take one of cpu-latency" in refused(
        runner, driver, "model", "--recipe", "fast"
    )


def test_a_saved_recipe_replays_the_search(runner, driver, own, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (own / "mine.toml").write_text('workload = "prefill=8,decode=4"\nfuse = true\n')
    options = [
        "model",
        "--eval-text",
        "text.txt",
        "--recipe",
        "mine",
        "--candidates",
        "int8*",
        "--candidates",
        "int4*",
    ]
    first = searched(
        runner, driver, *options, "--minimize", "memory", "--save-recipe", "saved.toml"
    )
    again = searched(runner, driver, "--recipe", "saved.toml", "--save-recipe", "again.toml")
    assert again == first | {
        "model": str(tmp_path / "model"),
        "eval_text": str(tmp_path / "text.txt"),
    }
    assert (
        read_recipe(tmp_path / "again.toml").options == read_recipe(tmp_path / "saved.toml").options
    )
    saved = read_recipe(tmp_path / "saved.toml").options
    assert (saved["seed"], saved["time-budget"], saved["max-ppl-increase"]) == (0, "10m", "1%"), (
        "defaults are saved too"
    )


def test_trust_in_a_pickle_is_not_saved_and_that_is_said(runner, driver, tmp_path):
    result = runner.invoke(
        app,
        [
            "search",
            "m.pt",
            "--eval-text",
            "t",
            "--trust-pickle",
            "--save-recipe",
            str(tmp_path / "saved.toml"),
        ],
    )
    assert "cannot allow code to run: say --trust-pickle again" in result.stderr
    assert "trust-pickle" not in (tmp_path / "saved.toml").read_text()


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("no/saved.toml", "is not a folder"),
        ("saved.json", "must end in .toml"),
        ("d.toml", "a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_search(
    runner, driver, tmp_path, place, what
):
    (tmp_path / "d.toml").mkdir()
    assert what in refused(runner, driver, "model", "--eval-text", "t", "--save-recipe", place)


def test_a_search_that_fails_saves_nothing(runner, driver, tmp_path):
    driver.error = KeyboardInterrupt()
    runner.invoke(app, ["search", "model", "--eval-text", "t", "--save-recipe", "saved.toml"])
    assert not (tmp_path / "saved.toml").exists()


def test_recipes_lists_what_each_is_for_and_its_options_in_80_columns(runner, own):
    (own / "mine.toml").write_text('about = "Mine alone"\nfuse = false\ncandidates = ["int8*"]\n')
    result = runner.invoke(app, ["recipes"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 81
    for words in (
        "h200-chat",
        "smallest-within-1pct",
        "--minimize memory",
        "Mine alone",
        "--no-fuse",
        "'int8*'",
    ):
        assert words in result.stdout


def test_a_recipe_that_cannot_be_used_is_listed_with_the_reason(runner, own):
    (own / "bad.toml").write_text("batsh = 1\n")
    listed = {
        recipe["name"]: recipe
        for recipe in json.loads(runner.invoke(app, ["recipes", "--json"]).stdout)
    }
    assert "did you mean batch?" in listed["bad"]["problem"] and listed["bad"]["options"] is None
    assert listed["cpu-latency"]["shipped"] is True and listed["cpu-latency"]["problem"] is None
    assert listed["cpu-latency"]["options"]["device"] == "cpu"
    assert "cannot be used" in runner.invoke(app, ["recipes"]).stdout


def test_an_option_of_an_earlier_version_is_refused_with_what_to_write_instead(runner, driver, own):
    (own / "old.toml").write_text('fusable = "vllm"\n')
    line = refused(runner, driver, "model", "--recipe", "old")
    assert 'old.toml: there is no fusable any more: write for = "vllm"' in line


def test_an_engine_is_taken_from_a_recipe_and_written_to_one(runner, driver, own, tmp_path):
    (own / "mine.toml").write_text('for = "llama.cpp"\n')
    assert searched(runner, driver, "model", "--recipe", "mine")["engine"] == "llama.cpp"
    searched(runner, driver, "model", "--for", "vllm", "--save-recipe", "saved.toml")
    assert read_recipe(tmp_path / "saved.toml").options["for"] == "vllm"
