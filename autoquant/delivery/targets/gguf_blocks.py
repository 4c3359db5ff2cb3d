"""Blocks of a GGUF tensor, made of a weight in the neutral form.

The layouts are those of llama.cpp's `ggml/src/ggml-common.h`. A group is a multiple of a block, so
blocks of a group repeat its scale. Float scales become float16, which holds what bfloat16 does
between 2^-17 and 65504.
"""

from __future__ import annotations

import torch

from autoquant.candidates.neutral import NeutralWeight

_BLOCK, _NVFP4_BLOCK, _NVFP4_BLOCKS = 32, 16, 4


def blocks(weight: NeutralWeight, scheme: str) -> torch.Tensor:
    """Return uint8 `[n, bytes]`, the blocks of each row behind one another.

    - Q8_0: float16 d and 32 int8 q, for q * d.
    - Q4_0: float16 d and 32 nibbles q + 8, for q * d.
    - Q4_1: float16 d and m, and 32 nibbles u, for u * d + m.
    - Q5_0: float16 d, the highest bits of 32 u = q + 16, and their nibbles, for q * d.
    - Q5_1: float16 d and m, highest bits and nibbles of 32 u, for u * d + m.
    - Q6_K: nibbles and pairs of bits of 256 u = q + 32, 16 int8 scales, and a float16 step of them.
    - MXFP4: an e8m0 scale and 32 e2m1 codes.
    - NVFP4: four e4m3 scales and 64 e2m1 codes, 16 a scale. The tensor's scale lies elsewhere.

    Args:
        weight: `[n, k]` with k divisible by the block.
        scheme: One of these names.
    """
    scale = weight.scale
    assert scale is not None  # it is quantized
    n = len(weight.codes)
    if scheme == "MXFP4":
        return _joined(scale.unsqueeze(-1), _nibbles(weight.codes.reshape(n, -1, _BLOCK)))
    if scheme == "NVFP4":
        codes = _nibbles(weight.codes.reshape(n, -1, _NVFP4_BLOCK))
        scales = scale.view(torch.uint8).reshape(n, -1, _NVFP4_BLOCKS)
        return _joined(scales, codes.reshape(*scales.shape[:2], -1))
    if scheme == "Q6_K":
        return _six_bits(weight)
    codes = weight.codes.reshape(n, -1, _BLOCK)
    halves = [_halves(scale, codes)]
    if scheme == "Q8_0":
        return _joined(*halves, codes.view(torch.uint8))
    values = (codes - weight.low).to(torch.uint8)
    if weight.zero is not None:
        halves.append(_halves(weight.zero.float() + weight.low * scale.float(), codes))
    if scheme in ("Q5_0", "Q5_1"):
        return _joined(*halves, _highest(values), _nibbles(values & 15))
    return _joined(*halves, _nibbles(values + 8 + weight.low))


def _highest(values: torch.Tensor) -> torch.Tensor:
    """Return bytes `[n, blocks, 4]` of the fifth bits of 32 values, the first value's lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=values.device)
    ones: torch.Tensor = (values >> 4).reshape(*values.shape[:-1], -1, 8) << places
    return ones.sum(-1, dtype=torch.uint8)


def _six_bits(weight: NeutralWeight) -> torch.Tensor:
    """Return the blocks of a weight whose scales are int8 multiples of float16 steps.

    A half of a block is four quarters of 32 values. Two of them share their nibbles' bytes, and all
    four the bytes of their pairs of higher bits.
    """
    step = weight.scale_step
    assert step is not None and weight.scale is not None  # no other format is held so
    n = len(weight.codes)
    values = (weight.codes - weight.low).to(torch.uint8)
    quarters = values.reshape(n, -1, 2, 4, _BLOCK)
    low = quarters & 15
    nibbles = (low[..., :2, :] | low[..., 2:, :] << 4).flatten(2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=values.device).unsqueeze(-1)
    pairs = ((quarters >> 4) << shifts).sum(3, dtype=torch.uint8).flatten(2)
    scales = weight.scale.float().reshape(n, step.shape[1], -1) / step.float().unsqueeze(-1)
    small = scales.round().to(torch.int8).view(torch.uint8)
    return _joined(nibbles, pairs, small, step.unsqueeze(-1).view(torch.uint8))


def _halves(numbers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return float16 bytes `[n, blocks, 2]` of numbers `[n, groups]`, one for each block."""
    blocks_of_a_group = codes.shape[1] // numbers.shape[1]
    halves = numbers.to(torch.float16).repeat_interleave(blocks_of_a_group, dim=1)
    return halves.unsqueeze(-1).view(torch.uint8)


def _nibbles(values: torch.Tensor) -> torch.Tensor:
    """Return bytes of uint8 values from 0 to 15: the first half of a block low, the other high."""
    low, high = values.chunk(2, dim=-1)
    return low | high << 4


def _joined(*parts: torch.Tensor) -> torch.Tensor:
    """Return the parts `[n, blocks, bytes]` of each block behind one another: `[n, bytes]`."""
    return torch.cat(parts, dim=-1).flatten(1)
