"""Open `nn.MultiheadAttention` up into linears that are seen, replaced and kept one by one.

PyTorch computes it as one function, in which nobody sees its linears. An opened one calls each of
them where somebody looks or has replaced a weight. Otherwise it computes as it did, so the
unquantized model is as fast as before, also in fused paths of `nn.TransformerEncoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import has_torch_function

from autoquant.models.loaded import UNFIT

_PACKED = "in_proj_weight"
_APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OUT = "out_proj"


class OpenedAttention(nn.MultiheadAttention):
    """An attention whose linears are calls of their own. Its parameters keep their names.

    The one weight of query, key and value stays one where these are one tensor, since one product
    is faster.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what `nn.MultiheadAttention` does, for all of its arguments."""
        if not self._is_looked_at():
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        q, k, v = (self._batch_first(x, query.dim()) for x in self._projected(query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        q, k, v = (_heads(x, self.num_heads) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        # The hint only saves the mask: PyTorch too takes it where nothing else is masked or shown.
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else _mask(attn_mask, key_padding_mask, q, k.shape[2])
        y, shown = self._attended(q, k, v, mask, hinted, need_weights)
        y = y.transpose(1, 2).flatten(2)
        if query.dim() == 2:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        y = self.out_proj(y)
        if shown is None:
            return y, None
        shown = shown.mean(1) if average_attn_weights else shown
        return y, shown.squeeze(0) if query.dim() == 2 else shown

    def _is_looked_at(self) -> bool:
        """Check whether a mode watches, a weight is quantized, or the linear module has a hook.

        Or whether the weights are apart: PyTorch's own takes longer then, and has no fused path.
        """
        out = self.out_proj
        if self.in_proj_weight is None:
            return True
        weights = (*_in_weights(self), out.weight)
        if out._forward_hooks or out._forward_pre_hooks or _is_any_quantized(weights):
            return True
        return not torch.compiler.is_compiling() and has_torch_function(weights)

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return query, key and value after their linears: one for all if they are one tensor."""
        weights, bias, inputs = _in_weights(self), self.in_proj_bias, (query, key, value)
        if len(weights) == 1:
            if query is key and key is value:
                return F.linear(query, weights[0], bias).chunk(3, -1)
            weights = weights[0].chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _batch_first(self, x: torch.Tensor, dimensions: int) -> torch.Tensor:
        """Return `[batch, tokens, width]`."""
        if dimensions == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _attended(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return values `[batch, heads, tokens, width]`, and weights if they are needed."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        return weights @ v, weights


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Return `[batch, heads, tokens, width]` of `[batch, tokens, heads * width]`."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _mask(
    attention: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, keys: int
) -> torch.Tensor | None:
    """Return what is added to the scores `[batch, heads, queries, keys]`, or None."""
    added = None
    if attention is not None:
        if attention.dim() == 3:
            attention = attention.view(len(q), -1, *attention.shape[1:])
        added = _as_addend(attention, q.dtype)
    if padding is not None:
        padding = _as_addend(padding.reshape(len(q), 1, 1, -1), q.dtype)
        added = padding if added is None else added + padding
    if added is None:
        return None
    return F.pad(added, (0, keys - added.shape[-1]))  # keys that the module adds are not masked


def _as_addend(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def is_attention(part: nn.Module) -> bool:
    """Check for an attention that can be opened: PyTorch's own, with no other forward pass."""
    return type(part) is nn.MultiheadAttention and "forward" not in vars(part)


def open_attentions(module: nn.Module, names: Collection[str] | None = None) -> None:
    """Open each attention in place. Others stay as they are.

    Args:
        names: Only those with a weight or linear of these names, and with the weights apart that
            are apart there. None for all, as they are.
    """
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        own = [prefix + leaf for leaf in (_PACKED, *_APART, _OUT)]
        if is_attention(part) and (names is None or any(name in names for name in own)):
            part.__class__ = OpenedAttention
        if isinstance(part, OpenedAttention) and names is not None and own[1] in names:
            _part(part)


def opened_names(module: nn.Module) -> list[str]:
    """Return the names of the weights before opened attentions."""
    return [
        f"{name}.{leaf}" if name else leaf
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, OpenedAttention)
        for leaf in (_PACKED, *_APART)
        if part._parameters[leaf] is not None
    ]


def parted_weight(part: nn.Module, leaf: str) -> torch.Tensor | None:
    """Return the weight that an attention would have under a name if its weight were parted."""
    packed = part._parameters.get(_PACKED)
    if packed is None or leaf not in _APART or not _can_open(part):
        return None
    return packed.detach().chunk(3)[_APART.index(leaf)]


def part_crossed(module: nn.Module, run: Callable[[], Any]) -> None:
    """Part the weight of opened attentions whose query, key and value are not one tensor.

    Args:
        run: Makes one forward pass. If it fails, attentions are judged by where they stand: in an
            `nn.TransformerDecoderLayer`.
    """
    parts = list(module.modules())
    packed = {part for part in parts if isinstance(part, OpenedAttention)}
    packed = {part for part in packed if part._parameters[_PACKED] is not None}
    if not packed:
        return
    decoders = [part for part in parts if isinstance(part, nn.TransformerDecoderLayer)]
    crossed: set[nn.Module] = {part.multihead_attn for part in decoders}

    def note(part: nn.Module, args: Any, kwargs: Any) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        if given.get("query") is not given.get("key") or given["key"] is not given.get("value"):
            crossed.add(part)

    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in packed]
    with suppress(*UNFIT), torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    for part in packed & crossed:
        _part(part)


def unfuse_encoders(module: nn.Module) -> None:
    """Keep PyTorch's encoders from computing quantized layers as one function, in place.

    They would not see all overrides of tensors, and none where they are compiled. The settings are
    those by which they do without it themselves.
    """
    encoders = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    for part in module.modules():
        if isinstance(part, encoders) and _is_any_quantized(part.parameters()):
            part.activation_relu_or_gelu = 0
            part.use_nested_tensor = False


def _is_any_quantized(weights: Iterable[torch.Tensor]) -> bool:
    return any(type(weight) is not nn.Parameter for weight in weights)


def _can_open(part: nn.Module) -> bool:
    return is_attention(part) or isinstance(part, OpenedAttention)


def _in_weights(part: nn.Module) -> Sequence[torch.Tensor]:
    """Return an attention's one weight `[3 n, n]`, or those of query, key and value."""
    weights = (part._parameters[name] for name in (_PACKED, *_APART))
    return [weight for weight in weights if weight is not None]


def _part(part: nn.Module) -> None:
    """Part the weight `[3 n, n]` into those of query, key and value, without a copy."""
    packed = part._parameters[_PACKED]
    if packed is None:
        return
    for name, weight in zip(_APART, packed.detach().chunk(3), strict=True):
        part._parameters[name] = nn.Parameter(weight, requires_grad=False)
    part._parameters[_PACKED] = None
    part._qkv_same_embed_dim = False  # type: ignore[assignment]
