"""NF4: 4-bit weights whose 16 levels suit normal numbers, for quality and memory only.

See Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, whose levels these are.
Each level stands for as many of a normal distribution's numbers. The scales are kept as they are:
QLoRA rounds them, too. No kernel here multiplies them faster than the dequantized weight, so a
search tries them only by name.
"""

from __future__ import annotations

from typing import cast

import torch
from torchao.utils import TorchAOBaseTensor

from autoquant.candidates.base import Format, by_name_only
from autoquant.candidates.formats.low_bit import UNPACKING
from autoquant.records import LinearShape

GROUP = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The levels, times the largest magnitude of a group."""
_SMALLEST_SCALE = 1e-12


class NormalFloatTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """NF4 weights `[n, k]` with a scale for each group along k.

    Tensor attributes:
        packed: uint8 `[n, k / 2]`, numbers of levels. The even column is in the low bits.
        scale: `[n, k / 64]`, the largest magnitudes, in the dtype that the weight shows.
    """

    tensor_data_names = ["packed", "scale"]  # noqa: RUF012
    tensor_attribute_names: list[str] = []  # noqa: RUF012

    def __new__(cls, packed: torch.Tensor, scale: torch.Tensor) -> NormalFloatTensor:
        shape = (packed.shape[0], packed.shape[1] * 2)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale.dtype, device=packed.device, requires_grad=False
        )

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.packed = packed
        self.scale = scale

    @classmethod
    def round(cls, weight: torch.Tensor) -> NormalFloatTensor:
        """Round a weight `[n, k]` to the nearest levels of its groups."""
        n, k = weight.shape
        groups = weight.float().reshape(n, -1, GROUP)
        largest = groups.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_SCALE)
        scale = largest.to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
        levels = torch.tensor(LEVELS, device=weight.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(groups / scale.float(), middles).to(torch.uint8).reshape(n, k)
        return cls(codes[:, 1::2] << 4 | codes[:, ::2], scale[..., 0])

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers `[n, k]`."""
        n, k = self.shape
        codes = torch.stack((self.packed & 15, self.packed >> 4), dim=-1)
        levels = torch.tensor(LEVELS, dtype=dtype, device=self.packed.device)
        groups = levels[codes.int()].reshape(n, k // GROUP, GROUP)
        weight: torch.Tensor = groups * self.scale.to(dtype).unsqueeze(-1)
        return weight.reshape(n, k)


def _unsupported(shape: LinearShape, _m: int, _device_type: str) -> str | None:
    return f"k={shape.k} is not divisible by the group size {GROUP}" if shape.k % GROUP else None


FORMATS = (
    Format(
        id=f"nf4-g{GROUP}/packed",
        quantize=NormalFloatTensor.round,
        dequantize=lambda stored: cast(NormalFloatTensor, stored).unpack(torch.float32),
        tensor_type=NormalFloatTensor,
        joins=True,
        unsupported=_unsupported,
        by_default=by_name_only,
        kernels=(UNPACKING,),
        description=f"NF4 weights, a scale for every {GROUP} along k; no fast kernel",
    ),
)

torch.serialization.add_safe_globals([NormalFloatTensor])
