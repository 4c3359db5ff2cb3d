"""Norms of a few rows on a GPU, in one kernel each, with the addition before it.

A norm of one token has too little to do for a GPU: it is waited for. The compiler's kernel reads its row twice, this one once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn

MOST_ROWS, MOST_COLUMNS = 16, 16384

_DEVICES = ("cuda",)
_WARPS = 8


@torch.library.custom_op("autoquant::rms_norm", mutates_args=(), device_types="cuda")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x `[..., n]`, each row over the root of its mean square, times weight `[n]`."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, None, out, eps)
    return out


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@rms_norm.register_kernel("cpu")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = x.float()
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.library.custom_op("autoquant::add_rms_norm", mutates_args=(), device_types="cuda")
def add_rms_norm(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + other, and `rms_norm` of that; both `[..., n]`."""
    x, other = x.contiguous(), other.contiguous()
    summed, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, other, weight, summed, out, eps)
    return summed, out


@add_rms_norm.register_fake
def _(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@add_rms_norm.register_kernel("cpu")
def _(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    summed = x + other
    return summed, rms_norm(summed, weight, eps)


def _launch(
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    summed: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
) -> None:
    from triton import next_power_of_2

    from autoquant.profiler.norm_kernels import normalize

    width = x.shape[-1]
    with torch.cuda.device(x.device):
        normalize[(x.numel() // width,)](
            *(x, x if other is None else other, weight, out if summed is None else summed, out, eps),
            WIDTH=width,
            COLUMNS=next_power_of_2(width),
            ADDS=other is not None,
            num_warps=_WARPS,
        )


def use_own_norms(module: nn.Module) -> None:
    """Have norms like Llama's computed by `rms_norm` where they get a few rows in compiled code on a GPU, in place."""
    for norm in module.modules():
        if _is_like_llamas(norm):
            norm.forward = _Norm(norm, norm.forward)


class _Norm:
    """Stands for a norm's forward pass."""

    def __init__(self, norm: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._norm, self._forward = norm, forward

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, weight = hidden_states, self._norm.weight
        width = x.shape[-1]
        of_tokens = x.dim() <= 3  # norms of heads are better joined with what turns them
        few = of_tokens and x.numel() <= MOST_ROWS * width and width <= MOST_COLUMNS
        alike = x.device.type in _DEVICES and x.dtype == weight.dtype and not torch.is_grad_enabled()
        if few and alike and torch.compiler.is_compiling():
            y: torch.Tensor = rms_norm(x, weight, self._norm.variance_epsilon)
            return y
        return self._forward(x)


def _is_like_llamas(norm: nn.Module) -> bool:
    """Whether its class computes what Llama's norm does: transformers gives each model a class of its own."""
    if not type(norm).__name__.endswith("RMSNorm") or not type(norm).__module__.startswith("transformers.models."):
        return False
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return _code(type(norm)) == _code(LlamaRMSNorm)


def _code(kind: type[nn.Module]) -> tuple[Any, ...]:
    code: CodeType = kind.forward.__code__
    return code.co_code, code.co_names, code.co_consts, code.co_varnames


def join_additions(graph: torch.fx.GraphModule) -> None:
    """Let norms make the sums that they are of, which the compiler cannot join with them."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for norm in list(graph.graph.nodes):
        if norm.target is not torch.ops.autoquant.rms_norm.default or not _is_sum(norm.args[0]):
            continue
        addition, *rest = norm.args
        if any(order.get(user, -1) < order[norm] for user in addition.users):
            continue
        with graph.graph.inserting_before(norm):
            made = graph.graph.call_function(
                torch.ops.autoquant.add_rms_norm.default, (*addition.args, *rest), norm.kwargs
            )
            summed, normal = (graph.graph.call_function(operator.getitem, (made, place)) for place in (0, 1))
        norm.replace_all_uses_with(normal)
        graph.graph.erase_node(norm)
        addition.replace_all_uses_with(summed)
        graph.graph.erase_node(addition)
    graph.recompile()


def _is_sum(node: Any) -> bool:
    """Whether this is the sum of two tensors of one shape and dtype."""
    if not isinstance(node, torch.fx.Node) or node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return False
    values = [value.meta.get("val") for value in (node, *node.args) if isinstance(value, torch.fx.Node)]
    alike = {(value.shape, value.dtype) for value in values if isinstance(value, torch.Tensor)}
    return len(values) == 3 and len(alike) == 1
