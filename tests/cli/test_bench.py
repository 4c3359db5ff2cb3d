"""What `autoquant bench` says of options for engines, before it imports torch."""

import pytest

from autoquant.cli.main import app


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine-path", "."], "--engine-path: needs --engine"),
        (["--embedding", "int8"], "--embedding: needs --engine"),
        (
            ["--engine-path", ".", "--embedding", "int8"],
            "--engine-path and --embedding: needs --engine",
        ),
        (["--engine", "vllm", "--engine-path", "nowhere"], "there is no folder nowhere"),
        (["--engine", "vllm", "--loop", "generate"], "are of autoquant's own runs: leave them out"),
    ],
)
def test_options_of_engines_that_do_not_fit_are_refused(
    runner, database, tmp_path, monkeypatch, options, said
):
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["bench", str(database), *options])
    assert result.exit_code == 2 and result.stdout == ""
    assert said in " ".join(result.stderr.split())


def test_an_engine_that_is_not_where_it_was_said_to_be_is_refused(runner, database, tmp_path):
    options = ["--engine", "vllm", "--engine-path", str(tmp_path)]
    result = runner.invoke(app, ["bench", str(database), *options])
    assert result.exit_code == 2 and result.stdout == ""
    assert f"the program vllm is not in {tmp_path}" in result.stderr
