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
