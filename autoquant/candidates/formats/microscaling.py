"""Weights in small blocks along k that share a scale: mxfp8, mxfp4 and nvfp4.

- mxfp8 and mxfp4 (OCP Microscaling Formats specification v1.0): 32 numbers, e4m3 or e2m1, share a
  power of two (e8m0). The scale is rounded up, as in NVIDIA's cuBLAS and in torchao's inference
  configuration, so that no number saturates by more than a rounding step.
- nvfp4 (NVIDIA, Blackwell): 16 e2m1 numbers share an e4m3 scale. The whole tensor has one float32
  scale, its largest magnitude over 448 * 6.

The scales lie in the order that Blackwell's tensor cores read: 128 x 4 tiles, padded with zeros
(cuBLAS manual, "1D block scaling factors layout"). The stored tensors are torchao's own `MXTensor`
and `NVFP4Tensor`, so torchao runs them too. Elsewhere the numbers are multiplied in floating
point, which is as exact and not faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import (
    f4_unpacked_to_f32,
    f32_to_f4_unpacked,
    unpack_uint4,
)
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs, _to_mx_rceil
from torchao.prototype.mx_formats.nvfp4_tensor import (
    NVFP4Tensor,
    QuantizeTensorToNVFP4Kwargs,
    nvfp4_quantize,
    per_tensor_amax_to_scale,
)
from torchao.prototype.mx_formats.utils import from_blocked
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from autoquant.candidates.base import A16, ACTIVATION_ROUNDING, Format, Kernel, LinearFunction
from autoquant.candidates.neutral import NeutralWeight
from autoquant.records import LinearShape

Rounding = Callable[[torch.Tensor], torch.Tensor]

MX_BLOCK = 32
NVFP4_BLOCK = 16
BLACKWELL = (10, 0)
_SMALLEST_AMAX = 1e-12
_MX_ROUNDING = ScaleCalculationMode.RCEIL


def _quantize_mx(weight: torch.Tensor, elements: torch.dtype) -> torch.Tensor:
    activations = QuantizeTensorToMXKwargs(
        elem_dtype=elements,
        block_size=MX_BLOCK,
        scaling_mode=_MX_ROUNDING,
        kernel_preference=KernelPreference.AUTO,
        is_swizzled_scales=True,
    )
    stored = MXTensor.to_mx(
        weight.detach().contiguous(),
        elements,
        MX_BLOCK,
        scaling_mode=_MX_ROUNDING,
        kernel_preference=KernelPreference.AUTO,
        act_quant_kwargs=activations,
        is_swizzled_scales=True,
    )
    return cast(torch.Tensor, stored)


def _quantize_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach().contiguous()
    activations = QuantizeTensorToNVFP4Kwargs(
        block_size=NVFP4_BLOCK, is_swizzled_scales=True, use_dynamic_per_tensor_scale=True
    )
    stored = NVFP4Tensor.to_nvfp4(
        weight,
        NVFP4_BLOCK,
        per_tensor_scale=_tensor_scale(weight),
        is_swizzled_scales=True,
        act_quant_kwargs=activations,
    )
    return cast(torch.Tensor, stored)


def _tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """Return nvfp4's float32 scale `[]` of a whole tensor, which is never 0."""
    return cast(
        torch.Tensor, per_tensor_amax_to_scale(x.abs().amax().float().clamp(min=_SMALLEST_AMAX))
    )


def _round_mx(x: torch.Tensor, elements: torch.dtype) -> torch.Tensor:
    """Return x `[..., k]` rounded as mx blocks are, in x's dtype.

    torchao's `to_mx` gives the same numbers, but its e8m0 scales do not compile for CPUs in PyTorch
    2.13.
    """
    blocks = x.float().reshape(-1, x.shape[-1] // MX_BLOCK, MX_BLOCK)
    largest = 448.0 if elements == torch.float8_e4m3fn else 6.0
    exponent, scaled = _to_mx_rceil(blocks, blocks.abs().amax(-1, keepdim=True), largest)
    narrow: torch.Tensor = (
        scaled.to(elements) if elements == torch.float8_e4m3fn else f32_to_f4_unpacked(scaled)
    )
    return (_widen(narrow) * _power_of_two(exponent)).reshape(x.shape).to(x.dtype)


def _round_nvfp4(x: torch.Tensor) -> torch.Tensor:
    """Return x `[..., k]` rounded as nvfp4 blocks under one scale are, in x's dtype."""
    numbers, tensor_scale = _split_nvfp4(x)
    return (numbers * tensor_scale).reshape(x.shape).to(x.dtype)


def _split_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x `[..., k]` as float32 `[m, k]` of nvfp4 numbers, and the scale to multiply by."""
    tensor_scale = _tensor_scale(x)
    scale, packed = nvfp4_quantize(_rows(x).float(), NVFP4_BLOCK, tensor_scale)
    return _nvfp4_numbers(packed, scale), tensor_scale


def _nvfp4_numbers(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 `[m, k]` of elements `[m, k / 2]` times block scales `[m, k / 16]`.

    The products have 6 significant bits, so bfloat16 holds them.
    """
    blocks = _widen(unpack_uint4(packed)).reshape(*scale.shape, NVFP4_BLOCK)
    return (blocks * scale.float().unsqueeze(-1)).flatten(-2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return x `[..., k]` as contiguous `[m, k]`, as torchao requires."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _widen(numbers: torch.Tensor) -> torch.Tensor:
    """Return e4m3, or e2m1 in the low bits of uint8, as float32."""
    return (
        cast(torch.Tensor, f4_unpacked_to_f32(numbers))
        if numbers.dtype == torch.uint8
        else numbers.float()
    )


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Return the float32 value of an e8m0 byte."""
    return torch.exp2(exponent.float() - 127)


def _dequantize_mx(stored: torch.Tensor) -> torch.Tensor:
    weight = cast(MXTensor, stored)
    n, k = weight.shape
    # The detour through int32 leaves the view to ATen: the compiler cannot read e8m0 on a CPU.
    exponent = from_blocked(weight.scale.view(torch.int32).view(torch.uint8), n, k // MX_BLOCK)
    packed = weight.elem_dtype == torch.float4_e2m1fn_x2
    numbers = _widen(unpack_uint4(weight.qdata) if packed else weight.qdata)
    return (numbers.reshape(n, -1, MX_BLOCK) * _power_of_two(exponent).unsqueeze(-1)).reshape(n, k)


def _neutral_mx(stored: torch.Tensor) -> NeutralWeight:
    weight = cast(MXTensor, stored)
    n, k = weight.shape
    packed = weight.elem_dtype == torch.float4_e2m1fn_x2
    return NeutralWeight(
        codes=unpack_uint4(weight.qdata) if packed else weight.qdata,
        bits=4 if packed else 8,
        scale=from_blocked(weight.scale.view(torch.uint8), n, k // MX_BLOCK),
        group=MX_BLOCK,
    )


def _neutral_nvfp4(stored: torch.Tensor) -> NeutralWeight:
    weight = cast(NVFP4Tensor, stored)
    n, k = weight.shape
    return NeutralWeight(
        codes=unpack_uint4(weight.qdata),
        bits=4,
        scale=from_blocked(weight.scale, n, k // NVFP4_BLOCK),
        group=NVFP4_BLOCK,
        tensor_scale=cast(torch.Tensor, weight.per_tensor_scale),
    )


def _unscaled_nvfp4(weight: NVFP4Tensor) -> torch.Tensor:
    """Return the weight's numbers, float32 `[n, k]`, without its `per_tensor_scale`."""
    n, k = weight.shape
    return _nvfp4_numbers(weight.qdata, from_blocked(weight.scale, n, k // NVFP4_BLOCK))


def _dequantize_nvfp4(stored: torch.Tensor) -> torch.Tensor:
    weight = cast(NVFP4Tensor, stored)
    return _unscaled_nvfp4(weight) * cast(torch.Tensor, weight.per_tensor_scale)


def _product_mx(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rounding: Rounding | None = None,
) -> torch.Tensor:
    """Multiply in x's dtype, which holds every mx number."""
    return F.linear(
        x if rounding is None else rounding(x), _dequantize_mx(weight).to(x.dtype), bias
    )


def _product_nvfp4(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, rounded: bool = False
) -> torch.Tensor:
    """Multiply in x's dtype, and apply the tensors' scales afterwards, as hardware does.

    bfloat16 could not hold the numbers times their scale.
    """
    stored = cast(NVFP4Tensor, weight)
    rows, scale = _rows(x), cast(torch.Tensor, stored.per_tensor_scale)
    if rounded:
        rows, x_scale = _split_nvfp4(x)
        scale = scale * x_scale
    y = F.linear(rows.to(x.dtype), _unscaled_nvfp4(stored).to(x.dtype)).float() * scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _scaled_mm_mx(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x.contiguous(), weight, bias)


def _scaled_mm_nvfp4(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = NVFP4Tensor.to_nvfp4(
        _rows(x), NVFP4_BLOCK, per_tensor_scale=_tensor_scale(x), is_swizzled_scales=True
    )
    return F.linear(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


_BLOCK_SCALED = ("cuda",)
"""Kinds of device that PyTorch has block-scaled products for."""


def _no_hardware(device_type: str) -> str | None:
    """Return why the device has no tensor cores for scaled blocks, or None."""
    if device_type not in _BLOCK_SCALED:
        return "block-scaled products are for CUDA"
    needed = "needs a GPU of compute capability 10.0 (Blackwell)"
    if not torch.cuda.is_available():
        return f"{needed}; there is none here"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) >= BLACKWELL else f"{needed}; this is sm_{major}{minor}"


def _scaled_mm_unsupported(
    shape: LinearShape, _m: int, device_type: str, *, dtypes: tuple[str, ...], k_step: int
) -> str | None:
    if reason := _no_hardware(device_type):
        return reason
    if shape.dtype not in dtypes:
        return f"gives {' or '.join(dtypes)}, not {shape.dtype}"
    if shape.n % 16 or shape.k % k_step:
        return f"needs n divisible by 16 and k by {k_step}, not {shape.n}x{shape.k}"
    return None


def _unsupported(shape: LinearShape, _m: int, _device_type: str, *, block: int) -> str | None:
    if shape.dtype not in ("bfloat16", "float32"):
        return f"torchao makes blocks of bfloat16 and float32 weights, not of {shape.dtype}"
    if shape.k % block:
        return f"k={shape.k} is not divisible by the block size {block}"
    return None


def _format(
    values: str,
    description: str,
    *,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    dequantize: Callable[[torch.Tensor], torch.Tensor],
    neutral: Callable[[torch.Tensor], NeutralWeight],
    tensor_type: type[torch.Tensor],
    block: int,
    kernels: tuple[Kernel, ...],
) -> Format:
    return Format(
        id=f"{values}/swizzled",
        quantize=quantize,
        dequantize=dequantize,
        neutral=neutral,
        tensor_type=tensor_type,
        unsupported=functools.partial(_unsupported, block=block),
        by_default=lambda device_type: _no_hardware(device_type) is None,
        kernels=kernels,
        description=description,
    )


def _kernels(
    values: str,
    *,
    product: LinearFunction,
    emulated: LinearFunction,
    scaled_mm: LinearFunction,
    arithmetic: str,
    scaled_mm_dtypes: tuple[str, ...],
) -> tuple[Kernel, ...]:
    numerics = f"a-{values}"
    return (
        Kernel(
            id="dequantize-matmul",
            numerics=A16,
            linear=product,
            description="dequantize the weight, then the float product",
        ),
        Kernel(
            id="scaled-mm",
            numerics=numerics,
            linear=scaled_mm,
            arithmetic=arithmetic,
            unsupported=functools.partial(
                _scaled_mm_unsupported, dtypes=scaled_mm_dtypes, k_step=32
            ),
            description=f"activation rounded to {values}, block-scaled product in hardware",
        ),
        Kernel(
            id="emulated",
            numerics=numerics,
            linear=emulated,
            description=(
                f"activation rounded to {values}, then the float product: what the hardware "
                "computes, slower"
            ),
        ),
    )


def _mx_format(values: str, elements: torch.dtype, description: str) -> Format:
    rounding = functools.partial(_round_mx, elements=elements)
    ACTIVATION_ROUNDING[f"a-{values}"] = rounding
    kernels = _kernels(
        values,
        product=_product_mx,
        emulated=functools.partial(_product_mx, rounding=rounding),
        scaled_mm=_scaled_mm_mx,
        arithmetic="float8" if elements == torch.float8_e4m3fn else "float4",
        scaled_mm_dtypes=("bfloat16",),  # the result that torchao asks for, of any activation
    )
    return _format(
        values,
        description,
        quantize=functools.partial(_quantize_mx, elements=elements),
        dequantize=_dequantize_mx,
        neutral=_neutral_mx,
        tensor_type=MXTensor,
        block=MX_BLOCK,
        kernels=kernels,
    )


def _nvfp4_format() -> Format:
    ACTIVATION_ROUNDING["a-nvfp4"] = _round_nvfp4
    kernels = _kernels(
        "nvfp4",
        product=_product_nvfp4,
        emulated=functools.partial(_product_nvfp4, rounded=True),
        scaled_mm=_scaled_mm_nvfp4,
        arithmetic="float4",
        scaled_mm_dtypes=("bfloat16", "float32"),
    )
    return _format(
        "nvfp4",
        "float4 e2m1 weights, a float8 scale for every 16 along k and a float32 one for all",
        quantize=_quantize_nvfp4,
        dequantize=_dequantize_nvfp4,
        neutral=_neutral_nvfp4,
        tensor_type=NVFP4Tensor,
        block=NVFP4_BLOCK,
        kernels=kernels,
    )


FORMATS = (
    _mx_format(
        "mxfp8", torch.float8_e4m3fn, "float8 e4m3 weights, a power of two for every 32 along k"
    ),
    _mx_format(
        "mxfp4", torch.float4_e2m1fn_x2, "float4 e2m1 weights, a power of two for every 32 along k"
    ),
    _nvfp4_format(),
)
