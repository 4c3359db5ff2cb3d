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
    codes = weight.codes.reshape(n, -1, _BLOCK)
    halves = [_halves(scale, codes)]
    if scheme == "Q8_0":
        return _joined(*halves, codes.view(torch.uint8))
    if scheme == "Q4_1":
        assert weight.zero is not None
        halves.append(_halves(weight.zero.float() - 8 * scale.float(), codes))
    return _joined(*halves, _nibbles((codes + 8).to(torch.uint8)))


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
