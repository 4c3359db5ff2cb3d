"""gemlite's Triton kernels (https://github.com/dropbox/gemlite) over the tensors of other formats.

gemlite takes a weight `[k, n]` as any strided tensor, so the transposed view of plain `[n, k]` bytes will do: one stored
weight serves its kernels and the others. Its operator is told everything by a list of integers, whose order is that of
`GemLiteLinearTriton.get_meta_args` in gemlite's `core.py`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from autoquant.candidates.gpu import needs_cuda, needs_library
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


def gemlite_unsupported(shape: LinearShape, _m: int, device_type: str) -> str | None:
    """Why gemlite cannot compute `shape` here."""
    if shape.n % 32 or shape.k % 32:
        return f"gemlite needs n and k divisible by 32, not {shape.n}x{shape.k}"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"gemlite needs 16-bit activations, not {shape.dtype}"
    return needs_cuda(device_type, "gemlite") or needs_library("gemlite", "gemlite")


def linear_w8(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *, dynamic: bool
) -> torch.Tensor:
    """8-bit weights with a scale a row.

    Args:
        x: `[..., k]`.
        values: int8 or float8 `[n, k]`.
        scale: `[n, 1]`.
        dynamic: Round the rows of x to the weight's dtype.
    """
    code, meta_code = _CODES[values.dtype], _CODES[scale.dtype]
    accumulator = _INT32 if dynamic and values.dtype == torch.int8 else _FLOAT32
    meta = [
        int(dynamic),
        8,
        values.shape[1],
        255,
        1,
        code if dynamic else _CODES[x.dtype],
        _CODES[x.dtype],
        accumulator,
        meta_code,
        _SCALE_BOTH if dynamic else _SCALE_WEIGHT,
        0,
        0,
    ]
    nothing = torch.empty((1, 0), dtype=torch.int32, device=x.device)
    return _forward(x, bias, [values.t(), scale.reshape(1, -1), nothing], meta)


def linear_w4(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """4-bit weights in groups: q * scale + offset.

    Args:
        x: `[..., k]`.
        words: int32 `[k / 8, n]`, eight weights along k in each, lowest bits first.
        scale: `[k / group, n]`; so `offset`.
    """
    group = words.shape[0] * 8 // scale.shape[0]
    dtype = _CODES[x.dtype]
    meta = [0, 4, group, 15, 8, dtype, dtype, _FLOAT32, _CODES[scale.dtype], 0, _GROUPS_AND_OFFSETS, 1]
    return _forward(x, bias, [words, scale, offset], meta)


def _forward(x: torch.Tensor, bias: torch.Tensor | None, tensors: list[torch.Tensor], meta: list[int]) -> torch.Tensor:
    _load()
    tensors = [*tensors, torch.empty((), dtype=torch.float32, device=x.device)]  # a scale that only nvfp4 has
    return cast(torch.Tensor, torch.ops.gemlite.forward_functional(x, bias, tensors, meta, -1))


def load_tuning(folder: str) -> None:
    """Take over what gemlite's tuning found in earlier runs, from every file in `folder`."""
    if needs_library("gemlite", "gemlite") is None:
        _load()
        from gemlite.core import GemLiteLinearTriton

        for path in sorted(Path(folder).glob("gemlite-*.json")):
            GemLiteLinearTriton.load_config(str(path), print_error=False)


def save_tuning(folder: str) -> None:
    """Keep what gemlite's tuning has found so far in a file of this process."""
    if "gemlite" in sys.modules:
        from gemlite.core import GemLiteLinearTriton

        Path(folder).mkdir(parents=True, exist_ok=True)
        GemLiteLinearTriton.cache_config(str(Path(folder) / f"gemlite-{os.getpid()}.json"))


def tune_briefly() -> None:
    """Spend a fifth of Triton's usual time on each setting: many processes tune at once, and each is in the others' way."""
    if needs_library("gemlite", "gemlite") is None:
        from triton.testing import do_bench

        for kernel in _tuned_kernels():
            kernel.do_bench = functools.partial(do_bench, warmup=5, rep=20)


@contextmanager
def untuned() -> Iterator[None]:
    """Inside, only the first settings are tried, and nothing is remembered; what tuning found before is used all the same."""
    if needs_library("gemlite", "gemlite") is not None:
        yield
        return
    kernels = _tuned_kernels()
    settings = [kernel.configs for kernel in kernels]
    known = [dict(kernel.cache) for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.configs = kernel.configs[:_FIRST_SETTINGS]  # with one alone, Triton would not adapt it to the shape
        yield
    finally:
        for kernel, configs, cache in zip(kernels, settings, known, strict=True):
            kernel.configs = configs
            kernel.cache.clear()
            kernel.cache.update(cache)


def _tuned_kernels() -> list[Any]:
    _load()
    from gemlite.core import GEMLITE_TRITON_MAPPING

    return [kernel for operator in GEMLITE_TRITON_MAPPING.values() for kernel in operator.kernel]


@functools.cache
def _load() -> None:
    import gemlite  # noqa: F401 - registers its operator; needs a GPU to be imported
