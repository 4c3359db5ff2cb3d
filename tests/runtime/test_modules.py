"""A module as a function: compiled, or as it is where that does not work."""

from __future__ import annotations

import pytest
import torch
from end_to_end.tiny import Perceptron

import autoquant
from autoquant.runtime import modules

X = torch.ones(2, 32)


def test_where_nothing_compiles_a_module_runs_as_it_is_and_says_why(monkeypatch):
    monkeypatch.setenv("AUTOQUANT_EAGER", "1")
    monkeypatch.delattr(modules, "compile_forward")  # would fail if it was called
    module = Perceptron()
    with pytest.warns(UserWarning, match="without being compiled.*AUTOQUANT_EAGER is set"):
        run = autoquant.compile(module)
    result = run(X)
    assert torch.equal(result, module(X)) and not result.requires_grad


def test_a_module_is_compiled_where_that_works(monkeypatch):
    monkeypatch.setattr(modules, "_compile_failure", lambda _module: None)
    compiled = []
    monkeypatch.setattr(
        modules, "compile_forward", lambda forward: compiled.append(forward) or forward
    )
    module = Perceptron()
    assert torch.allclose(autoquant.compile(module)(X), module(X)) and len(compiled) == 1
