"""8-bit weights whose activations are rounded in a range that is stored beside them.

The range is found beforehand, on a calibration text (see `InputStatistics.range`). So nothing is
reduced at run time, and rounding the activation fuses into what comes before the linear. One range
for all numbers is worse than one for each row, so a search tries these only by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import (
    A8_FLOAT8_STATIC,
    A8_STATIC,
    A16,
    STORED_ROUNDING,
    Format,
    Kernel,
    by_name_only,
    round_static,
    static_step,
)
from autoquant.candidates.formats.float8 import float8_product_unsupported
from autoquant.candidates.formats.int8 import int8_rows, int_mm_unsupported
from autoquant.candidates.formats.rows import round_rows
from autoquant.candidates.inputs import InputStatistics
from autoquant.candidates.kernels.cpu_rows import cpu_rows_kernel

_NORMAL_RANGE = 4.5
"""What holds nearly all normally distributed numbers."""


class StaticRangeTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """8-bit weights `[n, k]` with the range of their activation.

    Tensor attributes:
        values: int8 or float8 (e4m3) `[n, k]`.
        scale: `[n, 1]`, in the dtype that the weight shows.
        largest: Float32 `[n, 1]`, the largest magnitude of an activation that is held: the same in
            each row, so that linears with the same input can be computed as one.
    """

    tensor_data_names = ["values", "scale", "largest"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(
        cls, values: torch.Tensor, scale: torch.Tensor, largest: torch.Tensor
    ) -> StaticRangeTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=scale.dtype, device=values.device, requires_grad=False
        )

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, largest: torch.Tensor) -> None:
        super().__init__()
        self.values = values
        self.scale = scale
        self.largest = largest

    @property
    def input_range(self) -> torch.Tensor:
        """The largest magnitude `[]` of an activation."""
        return self.largest[0, 0]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What weights and activations are rounded to.

    Attributes:
        values: The `VALUES` of the format.
        words: How a description names the numbers.
        numerics: Those of its kernels that round the activation.
    """

    values: str
    words: str
    dtype: torch.dtype
    numerics: str

    def quantize(self, weight: torch.Tensor, inputs: InputStatistics) -> StaticRangeTensor:
        """Round a weight `[n, k]`, and find the range of its activation."""
        return self.stored(weight, inputs.range(STORED_ROUNDING[self.numerics]))

    def for_normal(self, weight: torch.Tensor) -> StaticRangeTensor:
        """Round a weight `[n, k]` whose activation is normally distributed."""
        return self.stored(weight, torch.tensor(_NORMAL_RANGE))

    def stored(self, weight: torch.Tensor, largest: torch.Tensor) -> StaticRangeTensor:
        """Round a weight `[n, k]`, and keep a range `[]`."""
        values, scale = round_rows(weight, self.dtype, weight.dtype)
        of_rows = largest.to(weight.device).reshape(1, 1).repeat(len(weight), 1)
        return StaticRangeTensor(values, scale, of_rows)


_INT8 = _Kind("static-int8", "int8", torch.int8, A8_STATIC)
_FLOAT8 = _Kind("static-float8", "float8 e4m3", torch.float8_e4m3fn, A8_FLOAT8_STATIC)


def _dequantize(stored: torch.Tensor) -> torch.Tensor:
    weight = cast(StaticRangeTensor, stored)
    return weight.values.float() * weight.scale.float()


def _int_mm(x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = cast(StaticRangeTensor, stored)
    rounded = round_static(x.reshape(-1, x.shape[-1]), weight.input_range, torch.int8)
    y = torch._int_mm(rounded, weight.values.t()).float()
    return _scaled(y, x, weight, bias)


def _scaled_mm(x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = cast(StaticRangeTensor, stored)
    rows = x.reshape(-1, x.shape[-1])
    step = static_step(weight.input_range, weight.values.dtype)
    y = torch._scaled_mm(
        round_static(rows, weight.input_range, weight.values.dtype),
        weight.values.t(),
        scale_a=step.reshape(1, 1).repeat(rows.shape[0], 1),
        scale_b=weight.scale.float().t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _emulated(x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = cast(StaticRangeTensor, stored)
    rounded = round_static(x.reshape(-1, x.shape[-1]), weight.input_range, weight.values.dtype)
    return _scaled(F.linear(rounded.float(), weight.values.float()), x, weight, bias)


def _scaled(
    y: torch.Tensor, x: torch.Tensor, weight: StaticRangeTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the sums `[m, n]` of a product, in float32, as the linear of x."""
    y = y * (static_step(weight.input_range, weight.values.dtype) * weight.scale.float().t())
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _dequantize_matmul(
    x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    weight = cast(StaticRangeTensor, stored)
    return F.linear(x, weight.values.to(x.dtype) * weight.scale.to(x.dtype), bias)


def _cpu_rows(x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = cast(StaticRangeTensor, stored)
    return int8_rows(x, weight.values, weight.scale, bias)


def _format(kind: _Kind, kernels: tuple[Kernel, ...]) -> Format:
    return Format(
        id=f"{kind.values}/plain",
        quantize=kind.quantize,
        dequantize=_dequantize,
        input_kept=lambda stored: cast(StaticRangeTensor, stored).input_range,
        tensor_type=StaticRangeTensor,
        joins=True,
        by_default=by_name_only,
        needs_inputs=True,
        without_inputs=kind.for_normal,
        kernels=(*kernels, _DEQUANTIZING),
        description=(
            f"{kind.words} weights, one scale a row; one range of the activation, found on a text"
        ),
    )


_DEQUANTIZING = Kernel(
    id="dequantize-matmul",
    numerics=A16,
    linear=_dequantize_matmul,
    materializes=True,
    description="dequantize the weight, then the float product",
)
_INT8_KERNELS = (
    cpu_rows_kernel(_cpu_rows, _dequantize_matmul),
    Kernel(
        id="int-mm",
        numerics=A8_STATIC,
        linear=_int_mm,
        arithmetic="int8",
        unsupported=int_mm_unsupported,
        description="activation rounded to int8, integer product, scales applied in float32",
    ),
)
_FLOAT8_KERNELS = (
    Kernel(
        id="scaled-mm",
        numerics=A8_FLOAT8_STATIC,
        linear=_scaled_mm,
        arithmetic="float8",
        unsupported=float8_product_unsupported,
        description="activation rounded to float8, then torch._scaled_mm",
    ),
    Kernel(
        id="emulated",
        numerics=A8_FLOAT8_STATIC,
        linear=_emulated,
        materializes=True,
        description="activation rounded to float8, then the float32 product",
    ),
)

FORMATS = (_format(_INT8, _INT8_KERNELS), _format(_FLOAT8, _FLOAT8_KERNELS))

torch.serialization.add_safe_globals([StaticRangeTensor])
