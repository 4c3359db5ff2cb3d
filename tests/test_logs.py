"""What libraries log and a user can do nothing about is dropped, all else is not."""

from __future__ import annotations

import logging

import pytest
import torch

import autoquant

KERNELS = (
    "torchao",
    "Failed to load /somewhere/torchao/_C_cutlass_90a.abi3.so: Could not load this library",
)
ENUMERATION = (
    "torch.utils._pytree",
    "<enum 'X'> ... Calling register_constant() on Enum subclasses is deprecated",
)


@pytest.fixture
def logged(caplog):
    """Log it as libraries do once autoquant is imported; returns whether anybody reads it."""
    assert autoquant.__all__

    def log(name, text):
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)  # PyTorch's loggers keep their records to themselves
        try:
            caplog.clear()
            logger.warning("%s", text)
            return text in caplog.text
        finally:
            logger.removeHandler(caplog.handler)

    return log


@pytest.mark.parametrize("gpu", [True, False])
def test_kernels_for_gpus_that_are_not_loaded_are_of_interest_only_where_there_is_one(
    logged, monkeypatch, gpu
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert logged(*KERNELS) is gpu


def test_how_a_library_registers_its_enumerations_is_not_said(logged):
    assert not logged(*ENUMERATION)


@pytest.mark.parametrize("name", ["torchao", "torch.utils._pytree"])
def test_everything_else_is_said(logged, name):
    assert logged(name, "weights are not finite")
