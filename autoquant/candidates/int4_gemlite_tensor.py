"""The tensor subclass of int4 weights in gemlite's packing, which torchao has no class for."""

from __future__ import annotations

import torch
from torchao.utils import TorchAOBaseTensor


class Int4GemliteTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """int4 weights `[n, k]` as gemlite reads them.

    Tensor attributes:
        qdata: int32 `[k / 8, n]`, eight weights along k in each word, lowest bits first.
        scale: `[k / group, n]`, of the dtype that the weight shows.
        offset: The same; w = q * scale + offset.
    """

    tensor_data_names = ["qdata", "scale", "offset"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Int4GemliteTensor:
        shape = (qdata.shape[1], qdata.shape[0] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(self, qdata: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.offset = offset

    @classmethod
    def pack(cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Int4GemliteTensor:
        """Pack q `[n, k]` from 0 to 15 whose weight is (q - 8) * scale + zero, both `[n, k / group]`."""
        n, k = q.shape
        words = _words(q.reshape(n, k // 8, 8).to(torch.int32))
        offset = (zero.float() - 8 * scale.float()).to(scale.dtype)
        return cls(words.t().contiguous(), scale.t().contiguous(), offset.t().contiguous())

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The `[n, k]` numbers that gemlite multiplies with."""
        n, k = self.shape
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.qdata.device)
        q = (self.qdata.t().unsqueeze(-1) >> shifts) & 15
        q = q.reshape(n, self.scale.shape[0], -1).to(dtype)
        return (q * self.scale.t().unsqueeze(-1).to(dtype) + self.offset.t().unsqueeze(-1).to(dtype)).reshape(n, k)


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    """`[..., 8]` nibbles put into one int32 `[...]`, the first one in the lowest bits."""
    word = torch.zeros_like(nibbles[..., 0])
    for position, nibble in enumerate(nibbles.unbind(-1)):
        word |= nibble << (4 * position)
    return word


torch.serialization.add_safe_globals([Int4GemliteTensor])
