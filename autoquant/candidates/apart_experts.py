"""Compute the experts of transformers from the tensors inside their quantized weights.

transformers gives its modules of experts one interface: `forward` takes the hidden states with the
experts of each token and their shares, and flags say what the experts compute. An eager call of
such a module works with quantized weights as it is. But compiled code would unwrap and guard them
on every call, and it cannot look into a loop whose steps depend on the router. So the module gets
a forward pass of its own, in which each product is one operator.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from autoquant.candidates.experts import ExpertsOperand, ExpertsWeight, multiply_experts

_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts")


def take_experts_apart(owner: nn.Module) -> None:
    """Give a module of experts its own forward pass if weights of it are quantized, in place."""
    weights = [each.data for each in owner.parameters(recurse=False)]
    if not any(isinstance(weight, ExpertsWeight) for weight in weights):
        return
    if not isinstance(owner, ApartExperts):
        if not _has_interface(owner):
            return
        owner.__class__ = _class_for(type(owner))
    cast(ApartExperts, owner).take_apart()


def _has_interface(owner: nn.Module) -> bool:
    """Check for transformers' interface of experts, all of them on one device."""
    flags = all(hasattr(owner, flag) for flag in _FLAGS)
    return flags and not getattr(owner, "_is_expert_parallel", False)


class ApartExperts(nn.Module):
    """A module of experts that multiplies with the tensors inside its weights.

    Attributes:
        operands: Of its quantized weights, by their names.
    """

    operands: dict[str, ExpertsOperand]

    def take_apart(self) -> None:
        """Find the operands of the weights."""
        self.operands = {
            name: ExpertsOperand(parameter.data)
            for name, parameter in self.named_parameters(recurse=False)
            if isinstance(parameter.data, ExpertsWeight)
        }

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of each token's experts, weighted by their shares.

        Args:
            hidden_states: `[tokens, width]`.
            top_k_index: The experts of each token `[tokens, k]`.
            top_k_weights: Their shares `[tokens, k]`.
        """
        module = cast(Any, self)
        each = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        numbers = torch.arange(module.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True).to(torch.int32)
        name = "gate_up_proj" if module.has_gate else "up_proj"
        y = self._product(name, hidden_states[order // each], experts, ends)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._product("down_proj", y, experts, ends)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        in_order = torch.empty_like(y)
        in_order[order] = y
        summed = in_order.view(-1, each, y.shape[-1]).sum(dim=1)
        return summed.to(hidden_states.dtype)

    def _product(
        self, name: str, x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """Return the product of sorted rows with each expert's weight, and its bias."""
        module = cast(Any, self)
        if torch.compiler.is_compiling() and name in self.operands:
            y = self.operands[name].product(x, ends)
        elif (weight := self._present(name)) is not None:
            y = multiply_experts(x, weight, ends)  # with its present numbers and route
        else:  # a function mode watches, or the weight is not quantized
            weight = getattr(module, name)
            turned = weight if module.is_transposed else weight.transpose(-2, -1)
            y = F.grouped_mm(x.to(weight.dtype), turned, offs=ends)
        return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y

    def _present(self, name: str) -> ExpertsWeight | None:
        """Return the quantized weight, if it is still in place and no function mode watches."""
        weight = self._parameters.get(name)
        watched = torch._C._len_torch_function_stack()
        return weight if isinstance(weight, ExpertsWeight) and not watched else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.take_apart()
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what restores it from its own class, which can be imported."""
        state = {name: value for name, value in self.__dict__.items() if name != "operands"}
        return _restored, (type(self).__mro__[2], state)


def _restored(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    owner = kind.__new__(kind)
    owner.__dict__.update(state)
    take_experts_apart(owner)
    return owner


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_for(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _classes:
        _classes[kind] = type(kind.__name__, (ApartExperts, kind), {"__module__": kind.__module__})
    return _classes[kind]
