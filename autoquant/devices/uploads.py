"""Copies from the host to a device, piece by piece."""

from __future__ import annotations

from collections.abc import Callable

import torch

_PIECE_BYTES = 32 * 2**20


def is_plain(tensor: torch.Tensor) -> bool:
    """Check that a tensor on the CPU is nothing but its bytes, one behind the other."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_quantized
        and tensor.numel() > 0
    )


def in_pieces(
    tensor: torch.Tensor, device: str, staged: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Copy a plain tensor to a device, each piece from where `staged` puts it."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    source, target = (each.reshape(-1).view(torch.uint8) for each in (tensor, copy))
    for start in range(0, source.numel(), _PIECE_BYTES):
        piece = source[start : start + _PIECE_BYTES]
        target[start : start + _PIECE_BYTES].copy_(staged(piece), non_blocking=True)
    return copy
