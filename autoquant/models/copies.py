"""Copy a module without its weights, and find the module inside of wrappers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.models.streaming import stream_of, without_stream


def shallow_copy(module: nn.Module) -> nn.Module:
    """Copy the module's structure. Parameters and buffers are the original's own tensors.

    The copy of a streamed module is not streamed. Its weights are where they rest.
    """
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    if stream_of(module) is not None:
        return without_stream(module, tensors)
    return copy.deepcopy(module, tensors | _made_anew(module))


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
        raise ModelError(
            f"cannot copy {type(module).__name__}, and each plan is applied to a copy"
            f" ({first_line(error)}): take out of it what copy.deepcopy cannot copy"
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


def _made_anew(module: nn.Module) -> dict[int, torch.Tensor]:
    """Return what modules computed from their weights and keep, which PyTorch does not copy.

    Weight norm and pruning do so: they make a weight anew in each call.
    """
    kept = (value for part in module.modules() for value in vars(part).values())
    made = (value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf)
    return {id(value): value.detach() for value in made}


def not_compiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or `module` if it wrapped none."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else not_compiled(inner)


def unwrapped(
    module: nn.Module,
    adapters: str = "merge them first, model = model.merge_and_unload()",
    *,
    with_lora: bool = False,
) -> nn.Module:
    """Return the module inside of `torch.compile`, data parallelism and PEFT's LoRA.

    Args:
        adapters: What to do with adapters that cannot stay.
        with_lora: Those of LoRA can.

    Raises:
        ModelError: It has adapters beside its weights that cannot stay.
    """
    inner = _without_wrappers(module)
    if {_peft_kind(part) for part in inner.modules()} - {"", "lora" if with_lora else ""}:
        raise ModelError(
            f"{type(inner).__name__} has adapters of PEFT beside its weights: {adapters}"
        )
    return inner


def _without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside of `torch.compile`, data parallelism and PEFT's LoRA model."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = not_compiled(module)
    while True:
        if isinstance(inner, parallel):
            inner = not_compiled(inner.module)
        elif _peft_kind(inner) == "model" and str(getattr(inner, "peft_type", "")).endswith("LORA"):
            base: Any = inner
            inner = not_compiled(base.get_base_model())
        else:
            return inner


def adapter_parameters(module: nn.Module) -> set[int]:
    """Return the identities of the weights of PEFT's adapters, which stay as they are."""
    found: set[int] = set()
    for layer in module.modules():
        base = layer._modules.get("base_layer")
        if base is not None and _peft_kind(layer) == "lora":
            own = {id(parameter) for parameter in base.parameters()}
            found |= {id(parameter) for parameter in layer.parameters()} - own
    return found


def _peft_kind(part: nn.Module) -> str:
    """Return the tuner that a class of PEFT belongs to, "model" beside tuners, or ""."""
    package, *path = type(part).__module__.split(".")
    if package != "peft":
        return ""
    return path[1] if path[0] == "tuners" and len(path) > 1 else "model"
