"""Tensors that are kept are made once and come back bit for bit."""

import os
import pickle

import pytest
import torch
from models.tiny_models import tiny_llama

from autoquant.devices import backend
from autoquant.evaluators.kept import HeldTensor, KeptTensor
from autoquant.evaluators.quality import next_token_logits


class Maker:
    def __init__(self, tensor):
        self.tensor, self.calls = tensor, 0

    def __call__(self):
        self.calls += 1
        return self.tensor


@pytest.mark.parametrize("keeper", [KeptTensor, HeldTensor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_is_made_once_and_comes_back_bit_for_bit(dtype, keeper):
    make = Maker(torch.randn(5, 7).to(dtype))
    kept = keeper(1 << 20)
    for _ in range(3):
        found = kept.get(make)
        assert found.dtype == dtype and torch.equal(found, make.tensor)
    assert make.calls == 1


def test_a_tensor_too_large_for_memory_is_kept_on_disk():
    make = Maker(torch.randn(100, 100))
    for most_bytes, on_disk in ((1 << 20, False), (1000, True)):
        file = KeptTensor(1 << 20)
        held = HeldTensor(most_bytes, file)
        assert all(torch.equal(held.get(make), make.tensor) for _ in range(3))
        assert file.is_kept() is on_disk
    assert make.calls == 2


def test_what_is_on_disk_already_is_read_once_if_memory_may_hold_it():
    make = Maker(torch.randn(100, 100))
    file = KeptTensor(1 << 20)
    file.keep(make.tensor)
    held = HeldTensor(1 << 20, file)
    first = held.get(make)
    assert torch.equal(first, make.tensor) and held.get(make) is first
    assert make.calls == 0


@pytest.mark.parametrize("keeper", [KeptTensor, HeldTensor])
def test_a_tensor_larger_than_allowed_is_made_each_time(keeper):
    make = Maker(torch.randn(100, 100))
    kept = keeper(1000)
    assert all(torch.equal(kept.get(make), make.tensor) for _ in range(2))
    assert make.calls == 2


def test_a_tensor_larger_than_allowed_is_not_even_pickled(monkeypatch):
    def refuse(_tensor):
        raise AssertionError("from a GPU this copies all of it")

    monkeypatch.setattr(pickle, "dumps", refuse)
    KeptTensor(0).get(lambda: torch.randn(100))


def test_a_full_disk_costs_time_only(monkeypatch):
    def refuse(*_arguments):
        raise OSError(28, "No space left on device")

    make = Maker(torch.randn(10))
    kept = KeptTensor(1 << 20)
    monkeypatch.setattr(os, "pwrite", refuse)
    assert all(torch.equal(kept.get(make), make.tensor) for _ in range(2))
    assert make.calls == 2


def test_what_a_forked_process_made_is_there_for_all():
    kept = KeptTensor(1 << 20)
    child = os.fork()
    if child == 0:
        kept.get(lambda: torch.arange(6))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert kept.get(lambda: torch.zeros(1)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("own_memory", [False, True])
def test_comparisons_with_a_kept_reference_run_it_once_and_find_the_same(
    quality, own_memory, monkeypatch
):
    if own_memory:  # as on a GPU
        monkeypatch.setattr(type(backend("cpu")), "free_bytes", lambda _self: 1 << 30)
        monkeypatch.setattr(KeptTensor, "get", lambda *_: pytest.fail("copied to the host"))
    reference, module = tiny_llama(), tiny_llama()
    with torch.no_grad():
        module.lm_head.weight.mul_(1.1)
    runs = []
    reference.lm_head.register_forward_hook(lambda *_args: runs.append(1))
    keeping = quality.keeping()
    expected = quality.compare(module, reference, "report")
    runs.clear()
    assert [keeping.compare(module, reference, "report") for _ in range(3)] == [expected] * 3
    assert len(runs) == len(quality.parts.windows["report"])


def test_of_a_reference_that_is_too_large_the_first_windows_are_kept(quality, monkeypatch):
    reference, module = tiny_llama(), tiny_llama()
    runs = []
    reference.lm_head.register_forward_hook(lambda *_args: runs.append(1))
    windows = quality.parts.windows["report"]
    logits_bytes = next_token_logits(reference, windows[:1]).nbytes
    runs.clear()
    monkeypatch.setattr("autoquant.evaluators.kept._HELD_SHARE", 0)
    # As pickled, logits are a little larger.
    monkeypatch.setattr("autoquant.evaluators.quality._KEPT_BYTES", 5 * logits_bytes // 2)
    keeping = quality.keeping()
    for _ in range(3):
        keeping.compare(module, reference, "report")
    count = len(windows)
    assert count > 2 and len(runs) == count + 2 * (count - 2)
