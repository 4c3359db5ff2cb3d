"""`autoquant solve`: what it takes, and what it says of memory."""

from __future__ import annotations

import pytest

from autoquant.cli.main import app


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (("--embedding", "head"), "give --for llama.cpp, too"),
        (("--embedding", "head", "--for", "vllm"), "give --for llama.cpp, too"),
        (("--embedding", "int8", "--for", "llama.cpp"), "solve with head or plan"),
    ],
)
def test_an_embedding_that_is_not_counted_is_refused(runner, database, given, advice):
    result = runner.invoke(app, ["solve", str(database), *given])
    assert result.exit_code == 2
    assert advice in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (("--again", "--model", "m"), "--again and --model: needs --engine"),
        (("--engine", "llama.cpp", "--for", "vllm"), "--engine llama.cpp is for llama.cpp"),
        (("--engine", "llama.cpp", "--engine-path", "/nowhere"), "there is no folder /nowhere"),
        (("--engine", "vllm"), "only llama.cpp is timed by types of weights here"),
        (("--engine", "llama.cp"), "did you mean llama.cpp?"),
        (("--engine", "llama.cpp", "--embedding", "int8"), "solve with head or plan"),
    ],
)
def test_options_of_an_engine_that_do_not_fit_are_refused(runner, database, given, advice):
    result = runner.invoke(app, ["solve", str(database), *given])
    assert result.exit_code == 2
    assert advice in result.stderr and result.stderr.count("\n") == 1
