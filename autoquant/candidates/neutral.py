"""One form for the numbers of any format: integers or codes, with scales, and without a layout.

Exports are written from it. `Format.neutral` maps a stored tensor to it, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeutralWeight:
    """A weight `[n, k]` as (number of the code * scale + zero) * tensor_scale.

    Attributes:
        codes: `[n, k]`. int8 holds integers, float8_e4m3fn itself, and uint8 the 4 bits of e2m1
            (sign, two of the exponent, one of the mantissa). Unquantized weights are their own
            codes.
        bits: Bits of a code that count.
        scale: `[n, groups]`, or None for unquantized weights. uint8 holds e8m0, the exponent plus
            127 of a power of two. If one scale is for the whole tensor, it is here for each row.
        group: Weights along k that share a scale. The last group may be in part.
        low: The smallest integer: -2^(bits - 1), or 0.
        zero: Like `scale`, or None where it is 0.
        tensor_scale: Float32 `[]`, or None where it is 1.
        scale_step: Float16 `[n, blocks]`: what the scales of a block are int8 multiples of, or None
            where they are any numbers.
    """

    codes: torch.Tensor
    bits: int
    scale: torch.Tensor | None = None
    group: int = 0
    low: int = 0
    zero: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None
    scale_step: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Return the float32 numbers `[n, k]`, bit for bit those that the format stores."""
        numbers = _code_numbers(self.codes)
        if self.scale is None:
            return numbers
        numbers = numbers * self._spread(_scale_numbers(self.scale))
        if self.zero is not None:
            numbers = numbers + self._spread(self.zero.float())
        return numbers if self.tensor_scale is None else numbers * self.tensor_scale

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return `[n, k]` of values `[n, groups]`."""
        return values.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]


def _code_numbers(codes: torch.Tensor) -> torch.Tensor:
    if codes.dtype != torch.uint8:
        return codes.float()
    numbers = torch.tensor([*_E2M1, *(-each for each in _E2M1)], device=codes.device)
    return numbers[codes.int()]


def _scale_numbers(scale: torch.Tensor) -> torch.Tensor:
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
