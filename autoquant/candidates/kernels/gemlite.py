"""gemlite's Triton kernels (https://github.com/dropbox/gemlite) over the tensors of other formats.

gemlite takes a weight `[k, n]` as any strided tensor, so the transposed view of plain `[n, k]`
bytes will do: one stored weight serves its kernels and the others. Its operator takes its settings
as a list of integers, in the order of `GemLiteLinearTriton.get_meta_args` in gemlite's `core.py`.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch

from autoquant.candidates.base import A16, Kernel, Unsupported
from autoquant.candidates.kernels.library import TunedLibrary
from autoquant.devices.gpu import needs_cuda, needs_library
from autoquant.files import move_whole, scratch_folder
from autoquant.records import LinearShape

_FLOAT32, _FLOAT16, _BFLOAT16, _FLOAT8, _INT8, _INT32 = 0, 1, 2, 3, 4, 6
_CODES = {
    torch.float32: _FLOAT32,
    torch.float16: _FLOAT16,
    torch.bfloat16: _BFLOAT16,
    torch.float8_e4m3fn: _FLOAT8,
    torch.int8: _INT8,
}
_SCALE_WEIGHT, _SCALE_BOTH = 1, 3
_GROUPS_AND_OFFSETS = 4
_FIRST_SETTINGS = 2
_CALLS, _BENCH_S = 8, 0.02


def gemlite_unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    """Return why gemlite cannot compute `shape` here, or None."""
    if shape.n % 32 or shape.k % 32:
        return f"gemlite needs n and k divisible by 32, not {shape.n}x{shape.k}"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"gemlite needs 16-bit activations, not {shape.dtype}"
    return needs_cuda(device_type, "gemlite") or needs_library("gemlite", "gemlite")


def linear_w8(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dynamic: bool,
) -> torch.Tensor:
    """Multiply with 8-bit weights that have a scale a row.

    Args:
        x: `[..., k]`.
        values: int8 or float8 `[n, k]`.
        scale: `[n, 1]`.
        dynamic: Round the rows of x to the weight's dtype.
    """
    code, meta_code = _CODES[values.dtype], _CODES[scale.dtype]
    accumulator = _INT32 if dynamic and values.dtype == torch.int8 else _FLOAT32
    meta = [
        int(dynamic),  # whether the activation is rounded
        8,  # bits of a weight
        values.shape[1],  # weights of a group
        255,  # mask of a weight in a word
        1,  # weights of a word
        code if dynamic else _CODES[x.dtype],  # of the activation
        _CODES[x.dtype],  # of the result
        accumulator,
        meta_code,  # of scales and offsets
        _SCALE_BOTH if dynamic else _SCALE_WEIGHT,
        0,  # no groups
        0,  # a transposed view, so not contiguous
    ]
    nothing = torch.empty((1, 0), dtype=torch.int32, device=x.device)
    return _forward(x, bias, [values.t(), scale.reshape(1, -1), nothing], meta)


def linear_w4(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply with 4-bit weights in groups: q * scale + offset.

    Args:
        x: `[..., k]`.
        words: int32 `[k / 8, n]`, eight weights along k in each, lowest bits first.
        scale: `[k / group, n]`; so `offset`.
    """
    group = words.shape[0] * 8 // scale.shape[0]
    dtype = _CODES[x.dtype]
    meta = [
        0,  # the activation is not rounded
        4,  # bits of a weight
        group,  # weights of a group
        15,  # mask of a weight in a word
        8,  # weights of a word
        dtype,  # of the activation
        dtype,  # of the result
        _FLOAT32,  # accumulator
        _CODES[scale.dtype],  # of scales and offsets
        0,  # scales belong to groups, not to rows
        _GROUPS_AND_OFFSETS,
        1,  # contiguous
    ]
    return _forward(x, bias, [words, scale, offset], meta)


def _forward(
    x: torch.Tensor, bias: torch.Tensor | None, tensors: list[torch.Tensor], meta: list[int]
) -> torch.Tensor:
    _load()
    no_scale = torch.empty((), dtype=torch.float32, device=x.device)  # only nvfp4 has one
    result = torch.ops.gemlite.forward_functional(x, bias, [*tensors, no_scale], meta, -1)
    return cast(torch.Tensor, result)


class Gemlite(TunedLibrary):
    """gemlite, whose Triton kernels choose among many settings for each shape."""

    def missing_reason(self) -> str | None:
        return needs_library("gemlite", "gemlite")

    def load(self, folder: Path) -> None:
        _load()
        from gemlite.core import GemLiteLinearTriton

        for path in sorted(folder.glob("gemlite-*.json")):
            GemLiteLinearTriton.load_config(str(path), print_error=False)

    def save(self, folder: Path) -> None:
        if "gemlite" not in sys.modules:  # nothing was tuned
            return
        from gemlite.core import GemLiteLinearTriton

        target = folder / f"gemlite-{os.getpid()}.json"
        with suppress(OSError):  # settings that cannot be kept are found again
            folder.mkdir(parents=True, exist_ok=True)
            with scratch_folder(target) as scratch:
                GemLiteLinearTriton.cache_config(str(scratch / target.name))
                move_whole(scratch / target.name, target)

    def tune_briefly(self) -> None:
        """Spend a fifth of Triton's usual time on each setting."""
        from triton.testing import do_bench

        for kernel in _tuned_kernels():
            kernel.do_bench = functools.partial(do_bench, warmup=5, rep=20)

    def tune_alone(self, threads: int) -> None:
        """Time settings by replayed CUDA graphs, and compile them all at once before.

        Triton's own clock includes the launch on the host, which is longer than most kernels for
        one row. Compiling takes most of the time.
        """
        _tune_alone(threads)

    @contextmanager
    def untuned(self, *, timed: bool) -> Iterator[None]:
        """Inside, only the first settings are tried, and nothing is remembered."""
        kernels = _tuned_kernels()
        settings = [(kernel.configs, kernel.do_bench) for kernel in kernels]
        known = [dict(kernel.cache) for kernel in kernels]
        try:
            for kernel in kernels:
                # With a single one, Triton would not adapt it to the shape.
                kernel.configs = kernel.configs[:_FIRST_SETTINGS]
                kernel.do_bench = kernel.do_bench if timed else _untimed
            yield
        finally:
            for kernel, (configs, bench), cache in zip(kernels, settings, known, strict=True):
                kernel.configs, kernel.do_bench = configs, bench
                kernel.cache.clear()
                kernel.cache.update(cache)


GEMLITE = Gemlite()


def gemlite_kernels(
    parts: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    *,
    rounds: str,
    arithmetic: str,
    unsupported: Unsupported,
    by_name: bool = False,
) -> tuple[Kernel, Kernel]:
    """Return gemlite's two kernels for 8-bit weights with a scale a row.

    Args:
        parts: Stored weight to its values `[n, k]` and scales `[n, 1]`.
        rounds: Numerics of the second kernel, which rounds the activation to `arithmetic`.
    """
    shared: dict[str, Any] = {
        "opaque": True,
        "library": GEMLITE,
        "by_name": by_name,
        "unsupported": unsupported,
    }
    plain = Kernel(
        id="gemlite",
        numerics=A16,
        linear=functools.partial(_linear_of, parts, dynamic=False),
        description="gemlite's weight-only product",
        **shared,
    )
    dynamic = Kernel(
        id="gemlite-dynamic",
        numerics=rounds,
        linear=functools.partial(_linear_of, parts, dynamic=True),
        arithmetic=arithmetic,
        description=f"activation rows rounded to {arithmetic}, gemlite's product",
        **shared,
    )
    return plain, dynamic


def _linear_of(
    parts: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    dynamic: bool,
) -> torch.Tensor:
    values, scale = parts(weight)
    return linear_w8(x, values, scale, bias, dynamic=dynamic)


@functools.cache
def _tune_alone(threads: int) -> None:
    for kernel in _tuned_kernels():
        kernel.do_bench = replayed_ms
        kernel.prune_configs = _compiled_first(kernel, threads)


def _compiled_first(kernel: Any, threads: int) -> Callable[[dict[str, Any]], list[Any]]:
    """Return what a kernel asks for the settings to try, which are compiled by then."""
    from triton.runtime._async_compile import AsyncCompileMode

    choose = kernel.prune_configs

    def chosen(arguments: dict[str, Any]) -> list[Any]:
        settings: list[Any] = choose(arguments)
        with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for setting in settings:
                only_compile = arguments | setting.all_kwargs() | {"warmup": True}
                kernel.fn.run(*kernel.nargs.values(), **only_compile)
        return settings

    return chosen


def _untimed(call: Callable[[], object], quantiles: Sequence[float] = (0.5,)) -> list[float]:
    """Return the same for every setting that runs."""
    call()  # what the device cannot run fails here
    return [1.0] * len(quantiles)


def replayed_ms(call: Callable[[], object], quantiles: Sequence[float] = (0.5,)) -> list[float]:
    """Return the milliseconds of `call` with cold weights, once for each of `quantiles`."""
    call()  # what the device cannot run fails here
    flush = _flush()
    ms = (_shortest_ms(lambda: (flush.zero_(), call())) - _flush_ms()) / _CALLS
    return [ms] * len(quantiles)


@functools.cache
def _flush() -> torch.Tensor:
    """Return memory that fills the device's cache twice."""
    return torch.empty(
        2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda"
    )


@functools.cache
def _flush_ms() -> float:
    return _shortest_ms(_flush().zero_)


def _shortest_ms(call: Callable[[], object]) -> float:
    """Return the shortest replay of some calls.

    The device is busy long enough to run at its full clock.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for _ in range(_CALLS):
            call()
        graph.capture_end()
    samples: list[float] = []
    started = time.perf_counter()
    while time.perf_counter() - started < _BENCH_S:
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return min(samples)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _tuned_kernels() -> list[Any]:
    _load()
    from gemlite.core import GEMLITE_TRITON_MAPPING

    return [kernel for operator in GEMLITE_TRITON_MAPPING.values() for kernel in operator.kernel]


@functools.cache
def _load() -> None:
    """Import gemlite, which registers its operator and needs a GPU.

    Its kernels that round activations get the first of their settings. They would try them all in
    each process, for each k and number of rows, which took ten seconds. Another setting is worth at
    most 20 us, of 2,048 rows.
    """
    import gemlite  # noqa: F401
    from gemlite import quant_utils
    from triton.runtime import Autotuner

    for kernel in vars(quant_utils).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = kernel.configs[:1]
