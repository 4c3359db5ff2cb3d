"""Copy a module without its weights, and find the module inside of wrappers."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from autoquant.errors import ModelError, first_line
from autoquant.models.streaming import stream_of, without_stream


def shallow_copy(module: nn.Module) -> nn.Module:
    """Copy the module's structure. Parameters and buffers are the original's own tensors.

    The copy of a streamed module is not streamed. Its weights are where they rest.
    """
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    if stream_of(module) is not None:
        return without_stream(module, tensors)
    return copy.deepcopy(module, tensors)


def own_copy(module: nn.Module) -> nn.Module:
    """Copy a caller's module. Nothing that is done to the copy changes the caller's.

    The copy computes with the caller's weights, which take no memory again. Buffers are its own,
    and nothing in it is compiled.

    Raises:
        ModelError: The module holds something that cannot be copied.
    """
    try:
        copied = shallow_copy(module)
    except Exception as error:
        fault = _made_anew(module) or (
            f"({first_line(error)}): take out of it what copy.deepcopy cannot copy"
        )
        raise ModelError(
            f"cannot copy {type(module).__name__}, and each plan is applied to a copy {fault}"
        ) from error
    own: dict[int, torch.Tensor] = {}
    for part in list(copied.modules()):
        for name, child in part._modules.items():
            part._modules[name] = None if child is None else not_compiled(child)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in own:
                    own[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
                part._parameters[name] = own[id(parameter)]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = own.setdefault(id(buffer), buffer.detach().clone())
    return copied


def _made_anew(module: nn.Module) -> str:
    """Say which layer makes a weight anew in each call, and how to keep it; empty if none does."""
    for path, layer in module.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                name, remove = hook._tensor_name, "prune.remove"
            elif isinstance(hook, WeightNorm):
                name, remove = hook.name, "remove_weight_norm"
            else:
                continue
            return (
                f"(layer {path or type(layer).__name__} makes its {name} anew in each call): keep"
                f" it first, torch.nn.utils.{remove}(layer, {name!r}), in every such layer"
            )
    return ""


def not_compiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or `module` if it wrapped none."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else not_compiled(inner)


def unwrapped(
    module: nn.Module, adapters: str = "merge them first, model = model.merge_and_unload()"
) -> nn.Module:
    """Return the module inside of `torch.compile` and of data parallelism.

    Args:
        adapters: What to do with adapters.

    Raises:
        ModelError: It has adapters beside its weights.
    """
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = not_compiled(module)
    while isinstance(inner, parallel):
        inner = not_compiled(inner.module)
    if any(type(part).__module__.partition(".")[0] == "peft" for part in inner.modules()):
        raise ModelError(
            f"{type(inner).__name__} has adapters of PEFT beside its weights: {adapters}"
        )
    return inner
