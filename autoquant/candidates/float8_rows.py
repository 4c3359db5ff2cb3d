"""The project's own product of a few rows with float8 weights, on tensor cores and at the memory's speed (`float8_rows.cu`)."""

from __future__ import annotations

import torch

from autoquant.candidates.cuda_source import cuda_kernel

CHUNK_COLUMNS, MOST_ROWS = 128, 16
_SOURCE = "float8_rows.cu"
_ROWS_OF_A_PRODUCT = 8
_SETTINGS = (
    (1, (16, 1, 2), (16, 1, 2)),
    (2, (16, 1, 2), (16, 2, 1)),
    (4, (8, 1, 3), (8, 1, 2)),
    (8, (4, 1, 4), (4, 2, 4)),
    (0, (16, 1, 2), (4, 2, 4)),
)
"""Up to how many tiles of 16 rows for each multiprocessor (0: any) what is fastest on an H200 for up to 8 rows of x, and to 16:
warps of a block, tiles of a block, blocks of a multiprocessor (`python studies/gpu_linears/own_kernels/float8_settings.py`)."""


def setting(n: int, m: int, processors: int) -> tuple[int, int, int]:
    """Warps and tiles of a block, and blocks a multiprocessor should hold, for `[m, k]` times `[n, k]`."""
    few, many = next(both for most, *both in _SETTINGS if not most or n <= 16 * most * processors)
    return few if m <= _ROWS_OF_A_PRODUCT else many


@torch.library.custom_op("autoquant::float8_rows", mutates_args=(), device_types="cuda")
def float8_rows(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[m, k]`, m up to 16, times float8 `[n, k]` with scales `[n, 1]`: `[m, n]`."""
    (m, k), n = x.shape, values.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    warps, tiles, blocks = setting(n, m, processors)
    defines = (("WARPS", warps), ("TILES", tiles), ("BLOCKS", blocks), ("EIGHTS", -(-m // _ROWS_OF_A_PRODUCT)))
    kernel = cuda_kernel(_SOURCE, "float8_rows", defines, x.device)
    x, y = x.contiguous(), x.new_empty(m, n)
    with torch.cuda.device(x.device):
        kernel.launch(-(-n // (16 * tiles)), 32 * warps, x, values, scale, bias, y, m, n, k)
    return y


@float8_rows.register_fake
def _(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], values.shape[0])
