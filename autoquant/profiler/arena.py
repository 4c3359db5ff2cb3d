"""Memory that holds more weights than a cache, so that each is read cold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 64
# One, two or four of these in a row are an ordinary number in every dtype that is timed.
_BENIGN_BYTES = (0x3A, 0x3B, 0x3C, 0x3D, 0xBA, 0xBB, 0xBC, 0xBD)


class Arena:
    """Memory that weights are rotated through.

    Args:
        size_bytes: How much is read between two uses of the same byte.
        device: The torch device that it lies on.
    """

    def __init__(self, size_bytes: int, device: str) -> None:
        palette = torch.tensor(_BENIGN_BYTES, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        block_bytes = min(size_bytes, 1 << 20)
        picks = torch.randint(0, len(palette), (block_bytes,), generator=generator)
        block = palette[picks]
        self.device = device
        self.bytes = block.repeat(-(-size_bytes // block.numel()))[:size_bytes].to(device)

    def views(
        self, tensors: Sequence[torch.Tensor], most: int | None = None
    ) -> list[list[torch.Tensor]]:
        """Return as many disjoint copies of `tensors` as fit, at least one.

        A copy has the same shapes and dtypes, not the same numbers.

        Args:
            most: Return no more than these, at even distances.
        """
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        if sum(sizes) > self.bytes.numel():
            return [list(tensors)]
        fitting = self.bytes.numel() // sum(sizes)
        count = fitting if most is None else min(fitting, most)
        starts = (number * fitting // count * sum(sizes) for number in range(count))
        return [self._copy(tensors, sizes, start) for start in starts]

    def _copy(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], start: int
    ) -> list[torch.Tensor]:
        copies = []
        for tensor, size in zip(tensors, sizes, strict=True):
            copies.append(
                self.bytes[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            )
            start += size
        return copies
