"""Hugging Face folders and factories as real files, and a check for refusals."""

from __future__ import annotations

import itertools
import sys

import pytest
from tiny_models import tiny_llama, tiny_tokenizer

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own, so that nothing is remembered from test to test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AUTOQUANT_CACHE", str(folder))
    return folder


@pytest.fixture
def save_llama(tmp_path):
    """Save a tiny Llama with a tokenizer and return (folder, model)."""

    def save(name="model", *, max_shard_size="1GB", tokenizer=True, **kwargs):
        model = tiny_llama(**kwargs)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer:
            tiny_tokenizer().save_pretrained(folder)
        return folder, model

    return save


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """Write Python source to a module in the current directory and return the name of `build` in it."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(source, callable_name="build"):
        name = f"factory_of_a_test_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + source)
        written.append(name)
        return f"{name}:{callable_name}"

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def refusal():
    """Call something that must be refused and return its message, which must be one line."""

    def call(error, function, *args, **kwargs):
        with pytest.raises(error) as caught:
            function(*args, **kwargs)
        message = str(caught.value)
        assert message and "\n" not in message
        return message

    return call
