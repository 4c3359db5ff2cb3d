"""Attention for one token over a static cache, for models of transformers.

PyTorch's attention copies keys and values for each query head that shares them, reads the whole
cache even if little of it is filled, and starts six kernels. `token_attention` reads what the mask
shows, once, in two kernels, or on a CPU in one. `use_token_attention` has a model use it in
compiled steps of one token. Anything else stays as it was: kernels that are launched one by one
cost more time on the host than they save. `token_attention_codes` does the same over a cache that
holds codes, see `autoquant.runtime.generate.kv_codes`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from autoquant.candidates.kernels.cpu_source import cpu_kernels_work
from autoquant.candidates.kernels.operators import define_operator
from autoquant.runtime.generate.kv_codes import Codes

IMPLEMENTATION = "autoquant"
"""What transformers calls this attention."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CPU_DTYPES, _CPU_COLUMNS = (torch.bfloat16, torch.float32), 16
_MOST_COLUMNS, _MOST_GROUP = 256, 64
_BLOCK_BYTES, _MOST_BLOCK = 16384, 128
"""Of keys or values that a program reads at a time, and positions."""
_FEWEST = 16
"""Rows and columns that tensor cores take."""
_PROGRAMS_OF_A_PROCESSOR, _PROGRAMS_OVER_FLOAT8, _MOST_SPLITS = 3, 2, 64
"""`python studies/models/kv_cache/settings.py` measures these on a GPU."""
_ADDED_COLUMNS = 64
_WARPS = 4


def _on_gpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    with torch.cuda.device(q.device):
        return _launch(q, k, v, mask, scale, processors)


def _codes_on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    v: torch.Tensor,
    v_scales: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    float8: bool,
) -> torch.Tensor:
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    if float8:
        k, v = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
    with torch.cuda.device(q.device):
        return _launch(q, k, v, mask, scale, processors, (k_scales, v_scales))


def _empty(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _empty_of_codes(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scales: torch.Tensor,
    v: torch.Tensor,
    v_scales: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    float8: bool,
) -> torch.Tensor:
    return _empty(q, k, v, mask, scale)


token_attention = define_operator("token_attention", _on_gpu, _empty)
"""Maps (q, k, v, mask, scale) to softmax(q k' scale) v for one token, `[b, h, 1, d_v]`.

A head that sees nothing gives zeros.

Args:
    q: `[b, h, 1, d]`, with k `[b, h_kv, L, d]` and v `[b, h_kv, L, d_v]` of any strides; h_kv
        divides h, d and d_v are at most 256. On a CPU, see `token_attention.cpp`, columns lie side
        by side, in multiples of 16.
    mask: Which positions are seen: bool `[b or 1, h or 1, 1, L]`, or None for all.
"""

token_attention_codes = define_operator("token_attention_codes", _codes_on_gpu, _empty_of_codes)
"""Maps (q, k, k_scales, v, v_scales, mask, scale, float8) to what `token_attention` gives.

Args:
    k, v: Codes as int8, or the bits of float8 (e4m3), of any strides.
    k_scales, v_scales: Of each position, float32 `[b, h_kv, L]`, contiguous.
"""


def splits_of(
    groups: int, blocks: int, processors: int, of_a_processor: int = _PROGRAMS_OF_A_PROCESSOR
) -> int:
    """Return how many programs share the blocks of one head of keys, of `groups` heads in all."""
    return max(1, min(blocks, _MOST_SPLITS, of_a_processor * processors // groups))


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    processors: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    from triton import cdiv, next_power_of_2

    from autoquant.runtime.generate.attention_kernels import add_up, attend

    (b, h, _, d), (_, h_kv, length, d_v) = q.shape, v.shape
    columns, v_columns = (max(_FEWEST, next_power_of_2(width)) for width in (d, d_v))
    block = min(_MOST_BLOCK, _BLOCK_BYTES // k.element_size() // max(columns, v_columns))
    float8 = k.dtype == torch.float8_e4m3fn
    programs = _PROGRAMS_OVER_FLOAT8 if float8 else _PROGRAMS_OF_A_PROCESSOR
    splits = splits_of(b * h_kv, cdiv(length, block), processors, programs)
    out = q.new_empty(b, h, 1, d_v)
    parts = q.new_empty((b * h, splits, d_v) if splits > 1 else 0, dtype=torch.float32)
    sums = q.new_empty((b * h, 2, splits) if splits > 1 else 0, dtype=torch.float32)
    shown = q if mask is None else mask.expand(b, -1, 1, length).view(torch.uint8)
    mask_head = shown.stride(1) if shown.shape[1] > 1 else 0
    # The kernel takes powers of two, which devices have an instruction for: hence log2(e).
    attend[b * h_kv, splits](
        *(q, k, v, *(scales or (q, q)), shown, out, parts, sums),
        *(scale * math.log2(math.e), h_kv, length, splits),
        *(q.stride(0), q.stride(1), q.stride(3), *k.stride(), *v.stride()),
        *(shown.stride(0), mask_head, shown.stride(3)),
        WIDTH=d,
        V_WIDTH=d_v,
        GROUP=h // h_kv,
        COLUMNS=columns,
        V_COLUMNS=v_columns,
        ROWS=max(_FEWEST, next_power_of_2(h // h_kv)),
        BLOCK=block,
        ALONE=splits == 1,
        MASKS=0 if mask is None else 2 if mask.shape[1] > 1 else 1,
        CODES=scales is not None,
        FLOAT8=float8,
        num_warps=_WARPS,
    )
    if splits > 1:
        added = min(v_columns, _ADDED_COLUMNS)
        add_up[b * h, cdiv(d_v, added)](
            *(parts, sums, out, splits),
            V_WIDTH=d_v,
            COLUMNS=added,
            ROWS=next_power_of_2(splits),
        )
    return out


def use_token_attention(model: nn.Module) -> str | None:
    """Have a causal language model of transformers attend with `token_attention`.

    Return why it cannot, or None.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return "it is no model of transformers"
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == IMPLEMENTATION:
        return None
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}, not sdpa"
    # The text model's class tells, as in transformers: others inherit their attention from it.
    owners = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config is config
    ]
    if not all(owner._can_set_attn_implementation() for owner in owners):
        return "its attention is not one that transformers lets others replace"
    _register()
    config._attn_implementation = IMPLEMENTATION
    return None


def is_used(model: nn.Module) -> bool:
    """Check whether a model attends with `token_attention`."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    return bool(text._attn_implementation == IMPLEMENTATION)


def takes_codes(dtype: torch.dtype, keys: Codes, values: Codes) -> bool:
    """Check whether `token_attention_codes` reads codes for a query of a dtype."""
    widths = keys.codes.shape[-1], values.codes.shape[-1]
    if keys.codes.device.type == "cuda":
        return dtype in _DTYPES and max(widths) <= _MOST_COLUMNS
    whole = all(width % _CPU_COLUMNS == 0 for width in widths)
    return dtype in _CPU_DTYPES and whole and max(widths) <= _MOST_COLUMNS and cpu_kernels_work()


def _register() -> None:
    """Tell transformers of this attention; masks are those of sdpa."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Codes,
    value: torch.Tensor | Codes,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' `sdpa_attention_forward` does: `[b, tokens, h, d_v]`."""
    if isinstance(key, Codes) and isinstance(value, Codes):
        if _takes(query, key.codes, value.codes, attention_mask, dropout, others):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            made: torch.Tensor = token_attention_codes(
                *(query, key.codes, key.scales, value.codes, value.scales),
                *(attention_mask, scale, key.kind == "float8"),
            )
            return made.transpose(1, 2), None
        key, value = key.numbers(query.dtype), value.numbers(query.dtype)
    assert isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)  # both, or neither
    if not _takes(query, key, value, attention_mask, dropout, others):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return attended
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return token_attention(query, key, value, attention_mask, scale).transpose(1, 2), None


def has_kernels(device_type: str) -> bool:
    """Check whether there are kernels of `token_attention` for a kind of device."""
    return device_type == "cuda" or (device_type == "cpu" and cpu_kernels_work())


def _gpu_takes(q: torch.Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in _DTYPES


def _cpu_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Check what `token_attention.cpp` asks for: columns in whole vectors, side by side."""
    whole = all(each.shape[-1] % _CPU_COLUMNS == 0 and each.stride(-1) == 1 for each in (q, k, v))
    return q.device.type == "cpu" and q.dtype in _CPU_DTYPES and whole and cpu_kernels_work()


_CHANGES = ("position_bias", "softcap", "s_aux", "sinks", "cache", "output_attentions")
"""Arguments that change what is computed, of which `token_attention` knows nothing."""


def _takes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> bool:
    """Check whether `token_attention` computes this."""
    one_token = q.shape[2] == 1 and (_gpu_takes(q) or _cpu_takes(q, k, v))
    kept = k.dtype == v.dtype and k.dtype in (q.dtype, torch.int8)  # numbers, or codes
    same = kept and q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0
    small = (
        max(q.shape[-1], v.shape[-1]) <= _MOST_COLUMNS and q.shape[1] <= _MOST_GROUP * k.shape[1]
    )
    shown = mask is None or (
        mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[0] in (1, q.shape[0])
        and mask.shape[1] in (1, q.shape[1])
        and mask.shape[2:] == (1, k.shape[2])
    )
    trains = dropout > 0 or (torch.is_grad_enabled() and q.requires_grad)
    plain = all(others.get(name) is None or others[name] is False for name in _CHANGES)
    return (
        torch.compiler.is_compiling()
        and one_token
        and same
        and small
        and shown
        and not trains
        and plain
    )
