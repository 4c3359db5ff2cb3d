"""What a device can do at most: bytes a second to and from memory, products a second in each arithmetic.

Both are medians of repeated runs on random numbers, after a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from autoquant.devices.device import synchronize
from autoquant.devices.load import HIGHEST_OTHER_LOAD, watch_load
from autoquant.events import Listener, Notice, StageFinished, StageStarted
from autoquant.profiler.floor import floor_us
from autoquant.records import Device, Roofline
from autoquant.store import Store

__all__ = ["floor_us", "known_roofline", "measure_roofline"]

_STAGE = "roofline"
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20, "mps": 256 << 20}
_PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024, "mps": 2048}
_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ARITHMETIC = {
    "cuda": ("bfloat16", "float16", "float32", "int8", "float8"),
    "cpu": ("bfloat16", "float32", "int8"),
    "mps": ("bfloat16", "float16", "float32"),
}
_ROUNDS = 7
_ATTEMPTS = 3


def known_roofline(device: Device, device_name: str, store: Store, listener: Listener) -> Roofline:
    """The roofline that the store holds of `device`, or measure it and keep it.

    What was measured while the machine was busy with something else is used with a notice, and not kept.

    Args:
        device: The fingerprint that it belongs to; the store must know it.
        device_name: The torch device to run on.
    """
    if kept := store.roofline(device):
        return kept
    listener(StageStarted(_STAGE, 1))
    for _ in range(_ATTEMPTS):
        watch = watch_load(device_name)
        roofline = measure_roofline(device_name, cache_bytes=device.cache_bytes)
        share = watch.share()
        if share <= HIGHEST_OTHER_LOAD:
            store.put_roofline(device, roofline)
            break
    else:
        listener(
            Notice(
                f"roofline measured while others used {share:.0%} of the machine: not kept; close other programs and run again"
            )
        )
    rates = ", ".join(f"{name} {rate / 1e12:.3g} Tflop/s" for name, rate in roofline.flops_per_s.items())
    listener(StageFinished(_STAGE, f"memory {roofline.bandwidth_bytes_per_s / 1e9:.3g} GB/s; {rates}"))
    return roofline


def measure_roofline(device_name: str, *, cache_bytes: int = 0) -> Roofline:
    """Measure copy bandwidth and matrix rates of a torch device. Arithmetic that it does not do is left out.

    Args:
        cache_bytes: Size of the last-level cache, which the copy must not fit into.
    """
    kind = torch.device(device_name).type
    rates = {name: _flops_per_s(name, _PRODUCT_SIDE[kind], device_name) for name in _ARITHMETIC[kind]}
    return Roofline(
        bandwidth_bytes_per_s=_copy_bytes_per_s(max(_COPY_BYTES[kind], 2 * cache_bytes), device_name),
        flops_per_s={name: rate for name, rate in rates.items() if rate is not None},
    )


def _copy_bytes_per_s(size_bytes: int, device_name: str) -> float:
    """Bytes read plus bytes written, a second, by an elementwise kernel: copy engines can be slower."""
    source = torch.rand(size_bytes // 4, device=device_name)
    target = torch.rand_like(source)
    return 2 * source.nbytes / _median_s(lambda: torch.neg(source, out=target), device_name)


def _flops_per_s(arithmetic: str, side: int, device_name: str) -> float | None:
    """Rate of a product of two square matrices, two operations a product; None where the device has no such product."""
    try:
        seconds = _median_s(_product(arithmetic, side, device_name), device_name)
    except RuntimeError:  # what PyTorch raises for a product that a device does not have
        return None
    return 2 * side**3 / seconds


def _product(arithmetic: str, side: int, device_name: str) -> Callable[[], object]:
    if arithmetic == "int8":
        x, w = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device_name) for _ in range(2))
        return lambda: torch._int_mm(x, w.t())
    a, b = (torch.randn(side, side, device=device_name) for _ in range(2))
    if arithmetic == "float8":
        one = torch.ones((), device=device_name)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    a, b = a.to(_FLOATS[arithmetic]), b.to(_FLOATS[arithmetic])
    return lambda: torch.mm(a, b.t())


def _median_s(call: Callable[[], object], device_name: str) -> float:
    """Median seconds of one call; on CUDA by the device's own clock."""
    for _ in range(2):
        call()
    synchronize(device_name)
    timed = _event_s if torch.device(device_name).type == "cuda" else _wall_s
    return statistics.median(timed(call, device_name) for _ in range(_ROUNDS))


def _event_s(call: Callable[[], object], device_name: str) -> float:
    with torch.cuda.device(device_name):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _wall_s(call: Callable[[], object], device_name: str) -> float:
    start = time.perf_counter()
    call()
    synchronize(device_name)
    return time.perf_counter() - start
