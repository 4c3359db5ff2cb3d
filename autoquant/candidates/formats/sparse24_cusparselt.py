"""2:4 sparse weights in cuSPARSELt's layout, which sparse tensor cores of NVIDIA GPUs multiply.

PyTorch's own operators pack them and multiply them. They have no kernel for few rows, and halve at
most the product's time: a search tries them only by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import (
    A8_FLOAT8_ROW,
    A8_ROW,
    A16,
    Kernel,
    round_float8,
    round_row_int8,
)
from autoquant.candidates.formats.sparse24 import FLOAT8, FLOATS, INT8, KINDS, Kept, sparse_formats
from autoquant.devices.gpu import needs_cuda, not_divisible
from autoquant.records import LinearShape

_SUMS = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}
"""What sums of rounded numbers come as. PyTorch 2.11 traces no float32 ones of float8."""
_Round = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
_COLUMNS_AT_ONCE = 1024
_FLOAT8_CAPABILITY = (9, 0)


class CompressedTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """2:4 sparse weights `[n, k]` as `torch._cslt_compress` packs them.

    Tensor attributes:
        packed: `[n, ...]`, kept numbers and their places, in the kept numbers' dtype.
        scale: `[n, 1]` in the dtype that the weight shows, or None if nothing was rounded.

    Other attributes:
        k: Columns of the weight.
    """

    tensor_data_names = ["packed"]  # noqa: RUF012
    optional_tensor_data_names = ["scale"]  # noqa: RUF012
    tensor_attribute_names = ["k"]  # noqa: RUF012

    def __new__(
        cls, packed: torch.Tensor, k: int, scale: torch.Tensor | None = None
    ) -> CompressedTensor:
        dtype = packed.dtype if scale is None else scale.dtype
        return torch.Tensor._make_wrapper_subclass(
            cls, (packed.shape[0], k), dtype=dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: torch.Tensor, k: int, scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.k = k
        self.scale = scale

    @classmethod
    def pack(cls, numbers: torch.Tensor, scale: torch.Tensor | None) -> CompressedTensor:
        """Pack numbers `[n, k]` with at most two in every four that are not zero."""
        packed = torch._cslt_compress(numbers.contiguous())
        return cls(packed.reshape(len(numbers), -1), numbers.shape[1], scale)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x `[m, k]`, in the packed numbers' dtype, times the packed numbers: `[m, n]`.

        The result has the dtype of `_SUMS`, or x's if nothing was rounded.
        """
        m = x.shape[0]
        x = F.pad(x, (0, 0, 0, -m % (16 if x.itemsize == 1 else 8)))
        y = torch._cslt_sparse_mm(
            self.packed,
            x.contiguous().t(),
            bias=bias,
            out_dtype=_SUMS.get(x.dtype),
            transpose_result=True,
        )
        return y[:m]

    def unpack(self) -> torch.Tensor:
        """Return the float32 numbers `[n, k]`: products with parts of the identity."""
        columns = []
        for start in range(0, self.k, _COLUMNS_AT_ONCE):
            rows = min(_COLUMNS_AT_ONCE, self.k - start)
            part = torch.zeros(rows, self.k, device=self.packed.device)
            part[torch.arange(rows), start + torch.arange(rows)] = 1
            columns.append(self.product(part.to(self.packed.dtype)).float().t())
        numbers = torch.cat(columns, dim=1)
        if self.scale is not None:
            numbers = numbers * self.scale.float()
        return numbers


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = cast(CompressedTensor, weight).product(rows, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _rounded_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rounds: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    stored = cast(CompressedTensor, weight)
    assert stored.scale is not None  # its numbers are rounded
    rounded, x_scale = rounds(x.reshape(-1, x.shape[-1]))
    y = stored.product(rounded).float() * x_scale * stored.scale.reshape(1, -1).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _unsupported(shape: LinearShape, _m: int, device_type: str, *, kind: Kept) -> str | None:
    what = "a 2:4 sparse product"
    capability = _FLOAT8_CAPABILITY if kind is FLOAT8 else (8, 0)
    if reason := needs_cuda(device_type, what, capability):
        return reason
    if not torch.backends.cusparselt.is_available():
        return f"{what} needs a PyTorch with cuSPARSELt"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"{what} takes 16-bit activations, not {shape.dtype}"
    return not_divisible(shape.n, shape.k, 16 if kind is FLOATS else 32, what)


_KERNELS = {
    FLOATS: Kernel(
        id="sparse-mm",
        numerics=A16,
        linear=_product,
        description="cuSPARSELt's product",
    ),
    INT8: Kernel(
        id="sparse-mm",
        numerics=A8_ROW,
        linear=functools.partial(_rounded_product, rounds=round_row_int8),
        arithmetic="int8",
        description="activation rows rounded to int8, cuSPARSELt's product, scaled in float32",
    ),
    FLOAT8: Kernel(
        id="sparse-mm",
        numerics=A8_FLOAT8_ROW,
        linear=functools.partial(
            _rounded_product, rounds=functools.partial(round_float8, per_row=True)
        ),
        arithmetic="float8",
        description="activation rows rounded to float8, cuSPARSELt's product, scaled in float32",
    ),
}

FORMATS = tuple(
    fmt
    for kind in KINDS
    for fmt in sparse_formats(
        kind,
        "cusparselt",
        CompressedTensor.pack,
        lambda stored: cast(CompressedTensor, stored).unpack(),
        tensor_type=CompressedTensor,
        joins=False,
        kernels=(_KERNELS[kind],),
        unsupported=functools.partial(_unsupported, kind=kind),
    )
)

torch.serialization.add_safe_globals([CompressedTensor])
