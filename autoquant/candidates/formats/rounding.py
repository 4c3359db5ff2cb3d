"""Better rounding than to nearest, for the same storage and the same kernels.

Each function takes a weight `[n, k]` and returns the integers, scales and zero points of a `Grid`,
which the format packs. `hqq` uses only the weight. `gptq` also uses the layer's inputs, and
minimizes the error of the output instead of the weight's. `clip` does so with less work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torchao.quantization.quant_primitives import (
    _choose_qparams_and_quantize_affine_hqq,
    _choose_qparams_and_quantize_scale_only_hqq,
)

from autoquant.candidates.base import Format
from autoquant.candidates.inputs import InputStatistics

_SMALLEST_STEP = 1e-6
_SMALLEST_SCALE = 1e-12
_SHRINKS = torch.linspace(1.0, 0.35, 27, device="cpu").tolist()
_STRETCHES = torch.linspace(1.0, 1.4, 12, device="cpu").tolist()
_COLUMNS_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight as integers: w = q * scale + zero.

    Attributes:
        q: int32 `[n, k]`, from -2^(bits - 1) to 2^(bits - 1) - 1.
        scale: `[n, groups]`, in the weight's dtype. The last group may be in part.
        zero: Like `scale`, and all 0 for a symmetric grid. Float32 for one `from_low`.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a format can hold: integers with a scale for every group along k.

    Attributes:
        bits: Bits of an integer.
        group: Weights along k that share a scale.
        symmetric: The groups have no zero point.
        from_low: What is exact in the weight's dtype is the number of the smallest integer, not the
            zero point.
    """

    bits: int
    group: int
    symmetric: bool
    from_low: bool = False

    @property
    def half(self) -> int:
        """Half the number of integers, which range from -half to half - 1."""
        return 1 << (self.bits - 1)

    def ends(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the smallest and largest number `[..., 1]` of each group `[..., group]`."""
        low, high = torch.aminmax(groups, dim=-1, keepdim=True)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low, high

    def fitted(
        self, low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero with which the grid just spans `ends`.

        They are float32 values that are exact in `dtype` (see `from_low`). Numbers beyond the ends
        are clipped.
        """
        if self.symmetric:
            scale = (high / (self.half - 0.5)).clamp_(min=_SMALLEST_SCALE).to(dtype).float()
            return scale, torch.zeros_like(scale)
        scale = ((high - low) / (2 * self.half - 1)).clamp_(min=_SMALLEST_STEP).to(dtype).float()
        if self.from_low:
            return scale, low.to(dtype).float() + scale * self.half
        return scale, (low + scale * self.half).to(dtype).float()

    def zero_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return what zero points of a weight in `dtype` are kept in."""
        return torch.float32 if self.from_low else dtype

    def integers(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """Return the nearest integers as floats. The arguments broadcast."""
        return ((weight - zero) / scale).round_().clamp_(-self.half, self.half - 1)

    def best(
        self,
        groups: torch.Tensor,
        importance: torch.Tensor,
        dtype: torch.dtype,
        shrinks: Sequence[float] = _SHRINKS,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero `[..., 1]` of groups, clipped if that lowers the weighted error.

        This is AWQ's search for a clipping range (Lin et al., "AWQ: Activation-aware Weight
        Quantization", 2023).

        Args:
            groups: `[..., group]`.
            importance: Weight of each number's squared error, broadcast to `[..., group]`.
            shrinks: What the ends are multiplied by, one after the other.
        """
        low, high = self.ends(groups)
        least = scale = zero = None
        for shrink in shrinks:
            tried = self.fitted(shrink * low, shrink * high, dtype)
            off = self.integers(groups, *tried).mul_(tried[0]).add_(tried[1]).sub_(groups)
            error = off.square_().mul_(importance).sum(-1, keepdim=True)
            if least is None or scale is None or zero is None:
                least, (scale, zero) = error, tried
                continue
            better = error < least
            least = torch.minimum(error, least)
            scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
        assert scale is not None and zero is not None
        return scale, zero


Round = Callable[[torch.Tensor, Grid, InputStatistics | None], Rounded]
"""Maps (weight `[n, k]`, grid, the layer's inputs or None) to integers."""


def hqq(weight: torch.Tensor, grid: Grid, _inputs: InputStatistics | None = None) -> Rounded:
    """Round half-quadratically, with torchao's functions.

    See Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. The
    zero point is optimized under a norm below 1, so that outliers weigh less. A symmetric grid has
    no zero point, and alternating least squares optimize its scale.
    """
    n, k = weight.shape
    if grid.symmetric:
        block = [1, grid.group]
        _, scale = _choose_qparams_and_quantize_scale_only_hqq(
            weight, block, -grid.half, grid.half - 1
        )
        zero = torch.zeros_like(scale)
    else:
        _, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
            weight, grid.bits, grid.group, compute_dtype=weight.dtype, device=str(weight.device)
        )
    scale, zero = scale.reshape(n, -1), zero.reshape(n, -1)
    groups = weight.float().reshape(n, -1, grid.group)
    q = grid.integers(groups, scale.float().unsqueeze(-1), zero.float().unsqueeze(-1))
    return Rounded(q.reshape(n, k).to(torch.int32), scale, zero)


def gptq(weight: torch.Tensor, grid: Grid, inputs: InputStatistics | None = None) -> Rounded:
    """Round by GPTQ: later columns compensate the error of each rounded column.

    See Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2023. Each group's scale is chosen when its turn comes, with the clipping that
    suits the inputs best (`Grid.best`). Columns keep their order. The order of activation would
    need all scales beforehand, which costs more at 2 bits than it gains.
    """
    assert inputs is not None  # `Format.store` checks that
    n, k = weight.shape
    dtype = weight.dtype
    factor = inputs.inverse_factor
    importance = inputs.hessian.diagonal()
    left = weight.float().t().contiguous()  # `[k, n]`, so that columns of the weight are contiguous
    q = torch.empty(k, n, dtype=torch.int8, device=weight.device)
    scales, zeros = [], []
    at_once = max(_COLUMNS_AT_ONCE, grid.group)
    for start in range(0, k, at_once):
        stop = min(start + at_once, k)
        errors = torch.empty(stop - start, n, device=weight.device)
        for column in range(start, stop):
            if column % grid.group == 0:
                group = slice(column, column + grid.group)
                scale, zero = grid.best(left[group].t().contiguous(), importance[group], dtype)
                scales.append(scale)
                zeros.append(zero)
                scale, zero = scale[:, 0], zero[:, 0]
            rounded = grid.integers(left[column], scale, zero)
            q[column] = rounded
            error = (left[column] - (rounded * scale + zero)) / factor[column, column]
            errors[column - start] = error
            left[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return Rounded(
        q.t().to(torch.int32).contiguous(),
        torch.cat(scales, 1).to(dtype),
        torch.cat(zeros, 1).to(grid.zero_dtype(dtype)),
    )


def nearest(weight: torch.Tensor, grid: Grid, _inputs: InputStatistics | None = None) -> Rounded:
    """Round to nearest by a symmetric grid, with the scale of each group's least squared error.

    The largest magnitude lies on the largest integer, or up to 40 % beyond it.
    """
    widest = (grid.half - 0.5) / (grid.half - 1)
    shrinks = [widest / stretch for stretch in _STRETCHES]
    return _clipped(weight, grid, torch.ones(1, device=weight.device), shrinks)


def clip(weight: torch.Tensor, grid: Grid, inputs: InputStatistics | None = None) -> Rounded:
    """Round to nearest, with each group clipped to suit the inputs: AWQ without its scales.

    AWQ's scales divide the inputs. In a general model that needs one more operation in the layer.
    It gains less than `gptq`, which costs the layer nothing.
    """
    assert inputs is not None
    return _clipped(weight, grid, inputs.hessian.diagonal().reshape(1, -1, grid.group))


def _clipped(
    weight: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor,
    shrinks: Sequence[float] = _SHRINKS,
) -> Rounded:
    n, k = weight.shape
    groups = weight.float().reshape(n, -1, grid.group)
    scale, zero = grid.best(groups, importance, weight.dtype, shrinks)
    q = grid.integers(groups, scale, zero).reshape(n, k).to(torch.int32)
    zero_dtype = grid.zero_dtype(weight.dtype)
    return Rounded(q, scale[..., 0].to(weight.dtype), zero[..., 0].to(zero_dtype))


def round_padded(
    weight: torch.Tensor, grid: Grid, how: Round, inputs: InputStatistics | None = None
) -> Rounded:
    """Round a weight `[n, k]` whose last group may be in part, as if zeros filled it."""
    k = weight.shape[1]
    more = -k % grid.group
    inputs = inputs.padded(more) if inputs and more else inputs
    rounded = how(F.pad(weight, (0, more)), grid, inputs)
    return replace(rounded, q=rounded.q[:, :k])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One way to round the weights of a format.

    Attributes:
        id: Suffix of the storage in the format's id: `int4-g64-hqq`.
        round: Maps (weight `[n, k]`, grid, the layer's inputs or None) to integers.
        needs_inputs: The rounding needs the layer's inputs.
        description: Text that `autoquant candidates` adds to the storage's.
    """

    id: str
    round: Round
    needs_inputs: bool
    description: str


HQQ = Rounding(id="hqq", round=hqq, needs_inputs=False, description="half-quadratic rounding")
GPTQ = Rounding(
    id="gptq", round=gptq, needs_inputs=True, description="rounded for the layer's inputs (GPTQ)"
)
CLIP = Rounding(
    id="clip",
    round=clip,
    needs_inputs=True,
    description="clipped for the layer's inputs (as AWQ does)",
)
ROUNDINGS = (HQQ, CLIP, GPTQ)


def rounded_formats(
    fmt: Format,
    grid: Grid,
    pack: Callable[[Rounded], torch.Tensor],
    by_default: Callable[[str], bool],
) -> tuple[Format, ...]:
    """Return a format with every other rounding: `int4-g64/L` gives `int4-g64-hqq/L` and so on.

    Args:
        pack: Maps integers of the grid to the format's stored tensor.
        by_default: As for `Format`.
    """

    def quantize(
        weight: torch.Tensor, inputs: InputStatistics | None = None, *, rounding: Rounding
    ) -> torch.Tensor:
        return pack(round_padded(weight, grid, rounding.round, inputs))

    values, _, layout = fmt.id.partition("/")
    return tuple(
        Format(
            id=f"{values}-{rounding.id}/{layout}",
            quantize=functools.partial(quantize, rounding=rounding),
            dequantize=fmt.dequantize,
            kernels=fmt.kernels,
            unsupported=fmt.unsupported,
            description=f"{fmt.description}; {rounding.description}",
            tensor_type=fmt.tensor_type,
            joins=fmt.joins,
            by_default=by_default,
            needs_inputs=rounding.needs_inputs,
            neutral=fmt.neutral,
            rounds=fmt.id,
        )
        for rounding in ROUNDINGS
    )
