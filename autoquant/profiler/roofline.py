"""The limits of a device: bytes a second to and from memory, products a second in each arithmetic.

Both are medians of repeated runs on random numbers, after a warm-up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from autoquant.devices import backend
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.devices.watch import Watch
from autoquant.events import Listener, Notice, StageFinished, StageStarted
from autoquant.records import Roofline

_STAGE = "roofline"
_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ROUNDS = 7


def undisturbed_roofline(
    device: str,
    *,
    cache_bytes: int,
    on_measured: Callable[[Roofline], None],
    listener: Listener,
    effort: TimingEffort | None = None,
) -> Roofline:
    """Measure the roofline of a torch device, again while the machine is busy with something else.

    Args:
        cache_bytes: See `measure_roofline`.
        on_measured: Takes the roofline if nothing disturbed it. What was disturbed is only
            returned, with a notice.
        effort: None for the process's own, `timing_effort()`.
    """
    effort = effort or timing_effort()
    listener(StageStarted(_STAGE, 1))
    for _ in range(effort.attempts):
        watch = Watch(backend(device).watch_load())
        roofline = measure_roofline(device, cache_bytes=cache_bytes, effort=effort)
        disturbance = watch.disturbance(effort.highest_other_load)
        if not disturbance:
            on_measured(roofline)
            break
    else:
        busy = f"roofline measured while {disturbance}"
        listener(Notice(f"{busy}: not kept; close other programs and run again"))
    rates = ", ".join(
        f"{name} {rate / 1e12:.3g} Tflop/s" for name, rate in roofline.flops_per_s.items()
    )
    listener(
        StageFinished(_STAGE, f"memory {roofline.bandwidth_bytes_per_s / 1e9:.3g} GB/s; {rates}")
    )
    return roofline


def measure_roofline(
    device: str, *, cache_bytes: int = 0, effort: TimingEffort | None = None
) -> Roofline:
    """Measure copy bandwidth and matrix rates of a torch device.

    Arithmetic that the device cannot do is left out.

    Args:
        cache_bytes: Size of the last-level cache, which the copy must not fit into.
        effort: None for the process's own, `timing_effort()`.
    """
    effort, place = effort or timing_effort(), backend(device)
    side = min(place.product_side, effort.largest_product)
    copy_bytes = max(min(place.copy_bytes, effort.largest_copy_bytes), 2 * cache_bytes)
    rates = {name: _flops_per_s(name, side, device) for name in place.arithmetic}
    return Roofline(
        bandwidth_bytes_per_s=_copy_bytes_per_s(copy_bytes, device),
        flops_per_s={name: rate for name, rate in rates.items() if rate is not None},
    )


def _copy_bytes_per_s(size_bytes: int, device_name: str) -> float:
    """Return the bytes that an elementwise kernel, not a copy engine, moves in a second."""
    source = torch.rand(size_bytes // 4, device=device_name)
    target = torch.rand_like(source)
    return 2 * source.nbytes / _median_s(lambda: torch.neg(source, out=target), device_name)


def _flops_per_s(arithmetic: str, side: int, device_name: str) -> float | None:
    """Return the rate of a product of square matrices, or None if the device has none.

    A multiplication and an addition count as two.
    """
    try:
        seconds = _median_s(_product(arithmetic, side, device_name), device_name)
    except RuntimeError:  # what PyTorch raises for a product that a device does not have
        return None
    return 2 * side**3 / seconds


def _product(arithmetic: str, side: int, device_name: str) -> Callable[[], object]:
    if arithmetic == "int8":
        x, w = (
            torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device_name)
            for _ in range(2)
        )
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
    """Return the median seconds of one call."""
    place = backend(device_name)
    for _ in range(2):
        call()
    place.synchronize()
    return statistics.median(place.time_s(call) for _ in range(_ROUNDS))
