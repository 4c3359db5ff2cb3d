"""The clock on a GPU: against the roofline, cold against hot, and on a GPU that others use."""

import subprocess
import sys
import time

import pytest
import torch

from autoquant.candidates import A16, Candidate, Format, Kernel, select
from autoquant.devices.effort import timing_effort
from autoquant.devices.load import GpuLoad
from autoquant.profiler.arena import Arena
from autoquant.profiler.roofline import measure_roofline
from autoquant.profiler.timing import compare
from autoquant.records import LinearShape

pytestmark = pytest.mark.gpu

SHAPE = LinearShape(n=4096, k=4096, bias=False, dtype="bfloat16")
WEIGHT_BYTES = 2 * 4096 * 4096


def measured(*candidates, m=1, arena_bytes=1 << 28):
    return compare(SHAPE, m, candidates, arena=Arena(arena_bytes, "cuda"), compiled=True)


def test_a_matrix_product_takes_no_less_than_reading_its_weight_and_not_many_times_that():
    (candidate,) = select(["bfloat16/plain/matmul"])
    (result,) = measured(candidate)
    floor_us = WEIGHT_BYTES / measure_roofline("cuda").bandwidth_bytes_per_s * 1e6
    assert result.outcome == "ok" and len(result.samples_us) >= 4
    assert floor_us / 1.15 < result.latency_us < 3 * floor_us
    assert result.spread_us < 0.1 * result.latency_us


def test_a_weight_that_stays_in_the_cache_is_faster_than_a_cold_one():
    (candidate,) = select(["bfloat16/plain/matmul"])
    (cold,) = measured(candidate)
    (hot,) = measured(candidate, arena_bytes=WEIGHT_BYTES)
    assert hot.latency_us < 0.95 * cold.latency_us


def test_a_small_weight_is_cold_and_timed_quickly():
    """Its copies fit into the cache, which other data fills before each replay."""
    (candidate,) = select(["bfloat16/plain/matmul"])
    small = LinearShape(n=1024, k=64, bias=False, dtype="bfloat16")
    samples = {}
    for arena_bytes in (1 << 31, 2 * 1024 * 64):
        started = time.perf_counter()
        (result,) = compare(small, 1, [candidate], arena=Arena(arena_bytes, "cuda"), compiled=True)
        assert result.outcome == "ok" and time.perf_counter() - started < 5
        samples[arena_bytes] = result.latency_us
    cold, hot = samples.values()
    assert 1.05 * hot < cold < 4 * hot


def test_what_cannot_be_captured_has_failed_and_does_not_spoil_the_others():
    def syncs(x, w, b):
        return x @ w.t() * float(x.abs().max().item() > 0)

    kernel = Kernel(id="syncs", numerics=A16, linear=syncs, opaque=True)
    own = Format(
        id="own/plain",
        quantize=lambda w: w.clone(),
        dequantize=lambda s: s.float(),
        kernels=(kernel,),
    )
    failed, right = measured(Candidate(own, kernel), *select(["bfloat16/plain/matmul"]))
    assert (failed.outcome, right.outcome) == ("failed", "ok") and failed.reason


def test_a_gpu_of_ones_own_is_not_busy():
    watch = GpuLoad("cuda")
    torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")
    assert watch.share() <= timing_effort().highest_other_load


def test_a_gpu_that_another_process_uses_is_busy():
    undisturbed = GpuLoad("cuda")
    assert undisturbed.share() <= timing_effort().highest_other_load
    burner = (
        "import torch\nx = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16)\n"
        "print('go', flush=True)\nwhile True:\n    for _ in range(50): x @ x\n    "
        "torch.cuda.synchronize()\n"
    )
    with subprocess.Popen([sys.executable, "-c", burner], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(1)
            watch = GpuLoad("cuda")
            assert watch.share() > timing_effort().highest_other_load
        finally:
            process.kill()
