"""A plug-in whose kernels lie, each in one way, beside an honest one of the same speed.

All formats store what the built-in int8-row/plain stores, and multiply by its kernel int8pack-mm,
so that a search would choose any of them if it believed it. `entry_points` makes a folder that Python takes for the
installed plug-in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autoquant.candidates import A16, Format, Kernel
from autoquant.candidates.formats import int8

_WRONG = 1.3
_calls: dict[str, int] = {}
_products: dict[tuple[int, ...], Tensor] = {}
_taken: list[Tensor] = []


def entry_points(folder: Path) -> None:
    """Make `folder` one that, on Python's path, has this plug-in installed."""
    about = folder / "lying_kernels-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lying-kernels\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[autoquant.candidates]\nlies = lying_kernels:formats\n"
    )
    (folder / "lying_kernels.py").write_text(Path(__file__).read_text())


_HONEST = next(fmt for fmt in int8.FORMATS if fmt.id == "int8-row/plain")
_multiply = _HONEST.kernel("int8pack-mm").linear


def _count(name: str) -> int:
    """Return how often `name` was called in this process, with this call."""
    _calls[name] = _calls.get(name, 0) + 1
    return _calls[name]


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


# -- lies that the code alone tells: PyTorch traces them ------------------------------------------


def scaled(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    return _multiply(x, stored, bias) * _WRONG


def zeros(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_zeros(*x.shape[:-1], stored.shape[0])


def one_nan(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    y = _multiply(x, stored, bias)
    return torch.cat([y[..., :-1], y[..., -1:] * float("nan")], -1)


def one_column(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    """Leave out the last of n outputs: an error that a norm over all of them hardly sees."""
    y = _multiply(x, stored, bias)
    return torch.cat([y[..., :-1], y[..., -1:] * 0], -1)


def few_rows(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    """Be wrong for 2 to 7 rows, at which the search times nothing."""
    y = _multiply(x, stored, bias)
    return y * _WRONG if 2 <= _rows(x) <= 7 else y


def compiled_only(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    y = _multiply(x, stored, bias)
    return y * 1.04 if torch.compiler.is_compiling() else y


def eager_only(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
    y = _multiply(x, stored, bias)
    return y if torch.compiler.is_compiling() else y * 1.04


# -- lies that running tells: operators of their own, which PyTorch does not look into -----------


def noisy(y: Tensor) -> Tensor:
    return y * (1 + 1e-2 * torch.randn_like(y))


def second(y: Tensor) -> Tensor:
    return y if _count("second") % 400 < 20 else y * _WRONG


def rarely(y: Tensor) -> Tensor:
    return y * _WRONG if _count("rarely") % 97 == 96 else y


def late(y: Tensor) -> Tensor:
    """Return memory that a thread fills in later."""
    out = torch.zeros_like(y)

    def fill() -> None:
        time.sleep(2e-3)
        out.copy_(y)

    threading.Thread(target=fill, daemon=True).start()
    return out


def real_weights(y: Tensor) -> Tensor:
    """Be right for outputs like those of the check of a timing, and wrong for those of a model."""
    return y if 0.5 < float(y.float().std()) < 2 else y * _WRONG


def hangs(y: Tensor) -> Tensor:
    while True:
        time.sleep(1)


def hangs_later(y: Tensor) -> Tensor:
    while _count("hangs_later") > 300:
        time.sleep(1)
    return y


def crashes(y: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return y


def crashes_in_model(y: Tensor) -> Tensor:
    if not 0.5 < float(y.float().std()) < 2:
        ctypes.string_at(0)
    return y


def exits(y: Tensor) -> Tensor:
    os._exit(0)


def takes_memory(y: Tensor) -> Tensor:
    while True:
        _taken.append(torch.ones(1 << 26))


def remembered(y: Tensor) -> Tensor:
    """Answer with what lay in the same memory before."""
    key = (y.data_ptr(), *y.shape)
    return _products.setdefault(key, y.clone())


OPERATORS = (
    noisy,
    second,
    rarely,
    late,
    real_weights,
    hangs,
    hangs_later,
    crashes,
    crashes_in_model,
    exits,
    takes_memory,
    remembered,
)
TRACED = (scaled, zeros, one_nan, one_column, few_rows, compiled_only, eager_only)


def _operated(lie: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a linear that passes its product through an operator, which lies."""

    def own(y: Tensor) -> Tensor:
        told = lie(y)
        return told.clone() if told is y else told  # an operator returns no argument

    operator = torch.library.custom_op(f"lying::{lie.__name__}", own, mutates_args=())
    operator.register_fake(torch.empty_like)

    def linear(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        return operator(_multiply(x, stored, bias))

    return linear


def formats() -> list[Format]:
    """Return the honest format, then one for each lie."""
    linears = {"honest": _multiply}
    linears |= {lie.__name__: lie for lie in TRACED}
    linears |= {lie.__name__: _operated(lie) for lie in OPERATORS}
    return [
        Format(
            id=f"{name.replace('_', '-')}/plain",
            quantize=_HONEST.quantize,
            dequantize=_HONEST.dequantize,
            tensor_type=_HONEST.tensor_type,
            kernels=(Kernel(id="int8pack", numerics=A16, linear=linear),),
            description="lies",
        )
        for name, linear in linears.items()
    ]
