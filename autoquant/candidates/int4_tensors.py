"""Tensor subclasses of packed int4 weights that torchao has no class for."""

from __future__ import annotations

import torch
from torchao.utils import TorchAOBaseTensor


class Int4ChunkedTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """int4 weights `[n, k]` in chunks of 32 along k, each in four 32-bit words that one thread reads at once.

    Weight 4 * s + j of a chunk is nibble s (lowest first) of word j.

    Tensor attributes:
        qdata: int32 `[n, k / 8]`.
        scale_and_zero: `[n, k / group, 2]`, of the dtype that the weight shows; w = (q - 8) * scale + zero.

    Other attributes:
        group: Weights along k that share a scale, a multiple of 32.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]  # noqa: RUF012
    tensor_attribute_names = ["group"]  # noqa: RUF012

    def __new__(cls, qdata: torch.Tensor, scale_and_zero: torch.Tensor, group: int) -> Int4ChunkedTensor:
        shape = (qdata.shape[0], qdata.shape[1] * 8)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale_and_zero.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(self, qdata: torch.Tensor, scale_and_zero: torch.Tensor, group: int) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.group = group

    @classmethod
    def pack(cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Int4ChunkedTensor:
        """Pack q `[n, k]` from 0 to 15 with scale and zero `[n, k / group]`."""
        n, k = q.shape
        nibbles = q.reshape(n, k // 32, 8, 4).to(torch.int32)
        words = _shifted_sum(nibbles, dim=2)
        return cls(words.reshape(n, k // 8), torch.stack((scale, zero), dim=-1), k // scale.shape[1])

    def unpack(self) -> torch.Tensor:
        """q `[n, k]`, int32 from 0 to 15."""
        n, k = self.shape
        words = self.qdata.reshape(n, k // 32, 1, 4)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.qdata.device).reshape(1, 1, 8, 1)
        return ((words >> shifts) & 15).reshape(n, k)


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
        words = _shifted_sum(q.reshape(n, k // 8, 8).to(torch.int32), dim=2)
        offset = (zero.float() - 8 * scale.float()).to(scale.dtype)
        return cls(words.t().contiguous(), scale.t().contiguous(), offset.t().contiguous())

    def unpacked_float(self) -> torch.Tensor:
        """The float32 `[n, k]` numbers that gemlite multiplies with."""
        n, k = self.shape
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.qdata.device)
        q = ((self.qdata.t().unsqueeze(-1) >> shifts) & 15).reshape(n, self.scale.shape[0], -1)
        scale, offset = self.scale.t().float().unsqueeze(-1), self.offset.t().float().unsqueeze(-1)
        return (q.float() * scale + offset).reshape(n, k)


def _shifted_sum(nibbles: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight nibbles along `dim` put into one int32, the first one in the lowest bits."""
    word = torch.zeros_like(nibbles.select(dim, 0))
    for position in range(8):
        word |= nibbles.select(dim, position) << (4 * position)
    return word


torch.serialization.add_safe_globals([Int4ChunkedTensor, Int4GemliteTensor])
