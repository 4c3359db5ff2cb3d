"""The tensor subclass of int4 weights in tiles as the project's own CUDA kernels read them."""

from __future__ import annotations

import torch
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import FLOAT8_MAX

TILE_ROWS, TILE_COLUMNS = 8, 128
_LANES, _WORDS, _PAIRS = 4, 4, 4


class Int4TiledTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """int4 weights `[n, k]` in tiles of 8 rows and 128 columns, one for each warp (see `int4_tiled.cu`).

    All tensors have n rows, of which each 8 belong together: weights behind one another are one weight.

    Tensor attributes:
        qdata: int32 `[n, k / 8]`; of a tile, words `[8, 4, 4]` by row a, lane b and j, whose nibble (odd, p), lowest first, is
            column 32 * j + 8 * b + 2 * p + odd.
        scale_and_zero: `[n, k / group, 2]`, of the dtype that the weight shows; of a tile, `[8, groups, 2]`.
            w = (q - 8) * scale + zero.
        row_scale: float32 `[n, 1]`, the largest number of each row over float8's largest.
    """

    tensor_data_names = ["qdata", "scale_and_zero", "row_scale"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor) -> Int4TiledTensor:
        shape = (qdata.shape[0], qdata.shape[1] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale_and_zero.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(self, qdata: torch.Tensor, scale_and_zero: torch.Tensor, row_scale: torch.Tensor) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.row_scale = row_scale

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return int(self.qdata.shape[1] * 8 // self.scale_and_zero.shape[1])

    @classmethod
    def pack(cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Int4TiledTensor:
        """Pack q `[n, k]` from 0 to 15 whose weight is (q - 8) * scale + zero, both `[n, k / group]`."""
        n, k = q.shape
        high, wide = n // TILE_ROWS, k // TILE_COLUMNS
        nibbles = q.to(torch.int32).reshape(high, TILE_ROWS, wide, _WORDS, _LANES, _PAIRS, 2)
        nibbles = nibbles.permute(0, 2, 1, 4, 3, 5, 6)  # tile, row a, lane b, word j, pair p, odd
        words = torch.zeros(nibbles.shape[:-2], dtype=torch.int32, device=q.device)
        for pair in range(_PAIRS):
            for odd in range(2):
                words |= nibbles[..., pair, odd] << (4 * pair + 16 * odd)
        both = torch.stack((scale, zero), dim=-1).reshape(high, TILE_ROWS, wide, -1, 2).transpose(1, 2)
        packed = cls(words.reshape(n, k // 8), both.reshape(n, -1, 2), torch.empty(0))
        largest = packed.unpack(torch.float32).abs().amax(dim=1, keepdim=True)
        return cls(packed.qdata, packed.scale_and_zero, largest.clamp(min=1e-12) / FLOAT8_MAX)

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The `[n, k]` numbers."""
        n, k = self.shape
        high, wide = n // TILE_ROWS, k // TILE_COLUMNS
        shifts = torch.tensor([[4 * pair, 4 * pair + 16] for pair in range(_PAIRS)], dtype=torch.int32)
        words = self.qdata.reshape(high, wide, TILE_ROWS, _LANES, _WORDS, 1, 1)
        q = ((words >> shifts.to(words.device)) & 15).permute(0, 2, 1, 4, 3, 5, 6)
        both = self.scale_and_zero.reshape(high, wide, TILE_ROWS, -1, 2).transpose(1, 2).reshape(n, -1, 1, 2).to(dtype)
        return ((q.reshape(n, both.shape[1], -1).to(dtype) - 8) * both[..., 0] + both[..., 1]).reshape(n, k)


torch.serialization.add_safe_globals([Int4TiledTensor])
