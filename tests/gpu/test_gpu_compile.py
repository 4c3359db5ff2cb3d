"""Models made ready on a GPU: compiled in parts, with kernels that are tuned once."""

import pytest
import torch
from models.tiny_models import as_loaded, tiny_llama

from autoquant.candidates import get_format
from autoquant.candidates.kernels import gemlite
from autoquant.candidates.kernels.caches import kernels_kept
from autoquant.records import Workload
from autoquant.runtime import parts
from autoquant.runtime.phases import make_phases
from autoquant.runtime.request import warm_up

pytestmark = pytest.mark.gpu


def test_steps_in_parts_are_replayed_and_compute_what_the_model_computes(monkeypatch):
    monkeypatch.setattr(parts, "FUNCTIONS", {})
    module = tiny_llama().cuda().requires_grad_(False)
    phases = make_phases(as_loaded(module), Workload.parse("prefill=8,decode=4"), compiled=True)
    warm_up(phases)  # raises where they do not
    # Embedding, positions, block and norm, for each of two phases, and the head of one token.
    assert len(parts.FUNCTIONS) == 9


def test_a_replayed_call_takes_no_less_than_the_memory_and_not_as_long_as_a_launch():
    source, target = torch.ones(2, 1 << 20, device="cuda", dtype=torch.uint8)
    (ms,) = gemlite.replayed_ms(lambda: target.copy_(source))
    assert 0.0004 < ms < 0.01


def test_a_kernel_is_tuned_once_on_a_machine(tmp_path, monkeypatch):
    core = pytest.importorskip("gemlite.core")
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(core, "GEMLITE_TRITON_CONFIG_CACHE", {})
    fmt = get_format("float8-row/plain")
    stored = fmt.store(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    with kernels_kept("cuda"):
        fmt.kernel("gemlite").linear(x, stored, None)
    assert not core.GEMLITE_TRITON_CONFIG_CACHE
    with kernels_kept("cuda"):
        assert any(
            "256, 512" in key
            for settings in core.GEMLITE_TRITON_CONFIG_CACHE.values()
            for key in settings
        )
