"""Products of a few rows by the project's own kernels (`rows.cuh`): the host's side.

Those of experts too, each of which has a few rows of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from autoquant.candidates.base import A16, GroupedFunction, Kernel, LinearFunction, Unsupported
from autoquant.candidates.kernels.cuda_source import cuda_kernel
from autoquant.records import LinearShape

ROWS_OF_A_PRODUCT, MOST_ROWS = 8, 16
"""Rows of x that tensor cores take at a time, and most rows of a product of a few rows."""
Setting = tuple[int, int, int]
"""Warps and tiles of 16 rows of a block, and blocks that a multiprocessor should hold."""
Settings = Sequence[tuple[int, Setting, Setting]]
"""Entries of (most, few, many): the fastest setting for up to 8 rows of x, and for up to 16.

An entry holds if a weight has at most `most` tiles for each multiprocessor; 0 means any number.
"""


def setting_of(settings: Settings, n: int, m: int, processors: int) -> Setting:
    """Return the setting for `[m, k]` times a weight `[n, k]` on a GPU of `processors`."""
    for most, few, many in settings:
        if most == 0 or n <= 16 * most * processors:
            return few if m <= ROWS_OF_A_PRODUCT else many
    raise ValueError("the last entry of settings holds for any number of tiles")


def multiply_rows(
    source: str,
    name: str,
    settings: Settings,
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    defines: Sequence[tuple[str, int]] = (),
) -> torch.Tensor:
    """Return x `[..., k]`, up to 16 rows in all, times a weight `[n, k]`: `[..., n]`.

    Args:
        source: File of the kernel.
        name: Name of the kernel.
        weight: The tensors that it is stored in. The first has a row for each of its rows.
        defines: Macros of the source that are not part of the setting.
    """
    *rows, k = x.shape
    n, m = weight[0].shape[0], math.prod(rows)
    y = x.new_empty(*rows, n)
    if m:
        key = (source, name, *defines, x.device, n, -(-m // ROWS_OF_A_PRODUCT))
        found = _launches.get(key)
        if found is None:
            found = _launches[key] = _launch_of(source, name, settings, defines, x.device, n, m)
        launch, blocks, threads = found
        launch(blocks, threads, x.contiguous(), *weight, bias, y, m, n, k)
    return y


def multiply_rows_of_experts(
    source: str,
    name: str,
    settings: Settings,
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    ends: torch.Tensor,
    defines: Sequence[tuple[str, int]] = (),
) -> torch.Tensor:
    """Return x `[m, k]`, sorted by expert, times each row's own expert of `[experts * n, k]`.

    It takes any number of rows, and is meant for a few of each expert. The host need not know
    which rows are whose. Rows of no expert give zeros.

    Args:
        source: File of the kernel.
        name: Name of the kernel.
        weight: The tensors that it is stored in. The first has a row for each of its rows.
        ends: int32 `[experts]`, the row after the last of each.
        defines: Macros of the source that are not part of the setting.

    Returns:
        `[m, n]`.
    """
    (m, k), experts = x.shape, len(ends)
    n, active = weight[0].shape[0] // experts, min(experts, m)
    y = x.new_empty(m, n)
    if m:
        rows = -(-m // active)
        sizes = (active, rows > ROWS_OF_A_PRODUCT)
        key = (source, name, *defines, x.device, n, *sizes)
        found = _launches.get(key)
        if found is None:
            found = _launch_of(source, name, settings, defines, x.device, n, rows, active)
            _launches[key] = found
        launch, blocks, threads = found
        launch(blocks, threads, x.contiguous(), *weight, ends, y, m, n, k, experts, high=active)
    return y


_launches: dict[tuple[object, ...], tuple[Callable[..., None], int, int]] = {}
"""The launcher of a product of one size on one device, with its numbers of blocks and threads."""


def _launch_of(
    source: str,
    name: str,
    settings: Settings,
    defines: Sequence[tuple[str, int]],
    device: torch.device,
    n: int,
    m: int,
    weights: int = 1,
) -> tuple[Callable[..., None], int, int]:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    warps, tiles, blocks = setting_of(settings, n * weights, m, processors)
    eights = min(-(-m // ROWS_OF_A_PRODUCT), MOST_ROWS // ROWS_OF_A_PRODUCT)
    sizes = (("WARPS", warps), ("TILES", tiles), ("BLOCKS", blocks), ("EIGHTS", eights))
    kernel = cuda_kernel(source, name, (*defines, *sizes), device)
    return kernel.launch, -(-n // (16 * tiles)), 32 * warps


def rows_kernel(
    linear: LinearFunction, unsupported: Unsupported, grouped: GroupedFunction
) -> Kernel:
    """Return a format's kernel `rows`, which computes by `multiply_rows`."""
    return Kernel(
        id="rows",
        numerics=A16,
        linear=linear,
        grouped=grouped,
        opaque=True,
        unsupported=unsupported,
        description="the project's own product for a few rows, on tensor cores",
    )


def too_many_rows(_shape: LinearShape, m: int, _device_type: str) -> str | None:
    """Return why a product of a few rows does not take m of them, or None."""
    return f"it takes up to {MOST_ROWS} rows, not {m}" if m > MOST_ROWS else None
