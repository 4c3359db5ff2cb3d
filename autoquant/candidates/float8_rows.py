"""The project's own product of a few rows with float8 weights, on tensor cores and at the memory's speed (`float8_rows.cu`)."""

from __future__ import annotations

import torch

from autoquant.candidates.cuda_source import ROWS_OF_A_PRODUCT, cuda_kernel, setting_of

CHUNK_COLUMNS = 128
_SOURCE = "float8_rows.cu"
SETTINGS = (
    (1, (16, 1, 2), (16, 1, 2)),
    (2, (16, 1, 2), (16, 2, 1)),
    (4, (8, 1, 3), (8, 1, 2)),
    (8, (4, 1, 4), (4, 2, 4)),
    (0, (16, 1, 2), (4, 2, 4)),
)
"""See `setting_of`; on an H200 (`python studies/gpu_linears/own_kernels/float8_settings.py`)."""


@torch.library.custom_op("autoquant::float8_rows", mutates_args=(), device_types="cuda")
def float8_rows(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[m, k]`, m up to 16, times float8 `[n, k]` with scales `[n, 1]`: `[m, n]`."""
    (m, k), n = x.shape, values.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    warps, tiles, blocks = setting_of(SETTINGS, n, m, processors)
    defines = (("WARPS", warps), ("TILES", tiles), ("BLOCKS", blocks), ("EIGHTS", -(-m // ROWS_OF_A_PRODUCT)))
    kernel = cuda_kernel(_SOURCE, "float8_rows", defines, x.device)
    x, y = x.contiguous(), x.new_empty(m, n)
    with torch.cuda.device(x.device):
        kernel.launch(-(-n // (16 * tiles)), 32 * warps, x, values, scale, bias, y, m, n, k)
    return y


@float8_rows.register_fake
def _(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], values.shape[0])
