"""Weights whose columns are scaled to suit their inputs, and the inputs the other way round.

`smooth-int8` moves large numbers of an activation into the weight before both are rounded to int8
(Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023). `awq-int4` multiplies the columns that inputs count most, so that the integers there
are finer (Lin et al., "AWQ: Activation-aware Weight Quantization", 2023), and rounds by GPTQ then.

Both papers fold the scales into the layer before. Here they stay with the weight, since layers that
read one input want scales of their own. The compiler fuses the product with what makes the input.
All scales are powers of two, so no number is rounded by them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import A8_ROW, A8_ROW_SCALED, Format, Kernel, by_name_only
from autoquant.candidates.formats import int4_lanes, int4_tiled, int8
from autoquant.candidates.formats.int4_rounding import ASYMMETRIC, int4_values
from autoquant.candidates.formats.rounding import Grid
from autoquant.candidates.inputs import InputStatistics
from autoquant.errors import CandidateError

_EXPONENTS = torch.linspace(0, 0.9, 10, device="cpu").tolist()
_SMALLEST = 1e-4
_STRENGTH = 0.5
"""How much of a column's range SmoothQuant leaves to the weight."""
_MOST_POWERS = 12


class ScaledInputTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A weight `[n, k]` with what each column of its input is multiplied with.

    Tensor attributes:
        weight: The weight with its columns divided by that, as another format stores it.
        factors: `[k]`, powers of two in the dtype that the weight shows.
    """

    tensor_data_names = ["weight", "factors"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, weight: torch.Tensor, factors: torch.Tensor) -> ScaledInputTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=factors.dtype, device=weight.device, requires_grad=False
        )

    def __init__(self, weight: torch.Tensor, factors: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.factors = factors


Scales = Callable[[torch.Tensor, InputStatistics], torch.Tensor]
"""Maps (weight `[n, k]`, its inputs) to what its columns are worth multiplying with, `[k]`."""


def smoothing(weight: torch.Tensor, inputs: InputStatistics) -> torch.Tensor:
    """Return SmoothQuant's scales `[k]`: as far as the input's range is above the weight's.

    Raises:
        CandidateError: The inputs are not finite, or not known.
    """
    largest = inputs.largest
    if largest is None or not bool(largest.isfinite().all()):
        raise CandidateError("the layer's inputs on the calibration text are not finite, or known")
    own = weight.float().abs().amax(0).clamp(min=_SMALLEST)
    return largest.clamp(min=_SMALLEST) ** _STRENGTH / own ** (1 - _STRENGTH)


def awq_scales(weight: torch.Tensor, inputs: InputStatistics, grid: Grid) -> torch.Tensor:
    """Return AWQ's scales `[k]`: the power of the inputs' sizes with the least error of the output.

    The error is that of rounding to nearest.
    """
    more = -weight.shape[1] % grid.group
    size = inputs.hessian.diagonal().sqrt()
    size = (size / size.mean()).clamp(min=_SMALLEST)
    best, least = torch.ones_like(size), float("inf")
    for exponent in _EXPONENTS:
        scale = _powers(size**exponent)
        scaled = F.pad(weight.float() * scale, (0, more)).reshape(len(weight), -1, grid.group)
        step, zero = grid.fitted(*grid.ends(scaled), weight.dtype)
        found = (grid.integers(scaled, step, zero) * step + zero).reshape(len(weight), -1)
        off = found[:, : weight.shape[1]] / scale - weight.float()
        error = ((off @ inputs.hessian) * off).sum().item()
        if error < least:
            best, least = scale, error
    return best


def _powers(scale: torch.Tensor) -> torch.Tensor:
    """Return powers of two near scales, whose largest and smallest are about reciprocals."""
    powers = scale.log2()
    powers = powers - (powers.amax() + powers.amin()) / 2
    return powers.round().clamp(-_MOST_POWERS, _MOST_POWERS).exp2()


def _scaled_format(
    inside: Format, nearest: Format, values: str, scales: Scales, description: str
) -> Format:
    """Return a format that stores scaled weights in another one, and has its kernels.

    Args:
        nearest: The other one without better rounding, for timings.
    """

    def quantize(weight: torch.Tensor, inputs: InputStatistics) -> torch.Tensor:
        scale = _powers(scales(weight, inputs))
        seen = InputStatistics(lambda: inputs.hessian / scale / scale.unsqueeze(1))
        stored = inside.store((weight.float() * scale).to(weight.dtype), seen)
        return ScaledInputTensor(stored, scale.reciprocal().to(weight.dtype))

    def unscaled(weight: torch.Tensor) -> torch.Tensor:
        factors = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return ScaledInputTensor(nearest.store(weight), factors)

    def dequantize(stored: torch.Tensor) -> torch.Tensor:
        scaled = cast(ScaledInputTensor, stored)
        return inside.dequantize(scaled.weight) * scaled.factors.float()

    return Format(
        id=f"{values}/{inside.id.partition('/')[2]}",
        quantize=quantize,
        dequantize=dequantize,
        input_kept=lambda stored: cast(ScaledInputTensor, stored).factors.float(),
        tensor_type=ScaledInputTensor,
        unsupported=inside.unsupported,
        by_default=by_name_only,
        needs_inputs=True,
        without_inputs=unscaled,
        kernels=tuple(_scaling(kernel) for kernel in inside.kernels if not kernel.tuned),
        description=description,
    )


def _scaling(kernel: Kernel) -> Kernel:
    """Return a kernel that multiplies the activation first."""

    inside = kernel.linear

    @functools.wraps(inside)
    def linear(x: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        scaled = cast(ScaledInputTensor, stored)
        return inside(x * scaled.factors, scaled.weight, bias)

    numerics = A8_ROW_SCALED if kernel.numerics == A8_ROW else kernel.numerics
    return replace(kernel, numerics=numerics, linear=linear, grouped=None)


def _awq_formats() -> tuple[Format, ...]:
    inside = {fmt.id: fmt for fmt in (*int4_lanes.FORMATS, *int4_tiled.FORMATS)}
    return tuple(
        _scaled_format(
            inside[f"{int4_values(grid)}-gptq/{layout}"],
            inside[f"{int4_values(grid)}/{layout}"],
            f"awq-{int4_values(grid)}",
            lambda weight, inputs, grid=grid: awq_scales(weight, inputs, grid),  # type: ignore[misc]
            f"int4 weights, scale and zero point for every {grid.group} along k; columns scaled for"
            " the layer's inputs (AWQ), then rounded for them (GPTQ)",
        )
        for layout in ("lanes", "tiled")
        for grid in ASYMMETRIC
    )


FORMATS = (
    _scaled_format(
        int8.FORMATS[0],
        int8.FORMATS[0],
        "smooth-int8",
        smoothing,
        "int8 weights, one scale a row; columns scaled for the layer's inputs (SmoothQuant)",
    ),
    *_awq_formats(),
)

torch.serialization.add_safe_globals([ScaledInputTensor])
