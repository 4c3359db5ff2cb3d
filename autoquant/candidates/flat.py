"""Take a tensor subclass apart into plain tensors, rebuild it and move it, nested ones too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Instructions for rebuilding a tensor from plain ones.

    Attributes:
        kind: The tensor's type, or None for a plain tensor.
        names: Names of the tensors inside.
        inner: Instructions for each of these.
        context: The type's own data.
    """

    kind: Any = None
    names: tuple[str, ...] = ()
    inner: tuple[Rebuild, ...] = ()
    context: Any = None
    size: torch.Size | None = None
    stride: tuple[int, ...] | None = None


def flatten_tensor(tensor: torch.Tensor) -> tuple[list[torch.Tensor], Rebuild]:
    """Return the plain tensors inside `tensor`, in order, and how to rebuild it."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor], Rebuild()
    names, context = tensor.__tensor_flatten__()
    parts: list[torch.Tensor] = []
    inner = []
    for name in names:
        inside, rebuild = flatten_tensor(getattr(tensor, name))
        parts.extend(inside)
        inner.append(rebuild)
    kind = type(tensor)
    return parts, Rebuild(kind, tuple(names), tuple(inner), context, tensor.size(), tensor.stride())


def unflatten_tensor(rebuild: Rebuild, parts: list[torch.Tensor]) -> torch.Tensor:
    """Undo `flatten_tensor` with other plain tensors of the same shapes."""
    tensor, used = _unflatten(rebuild, parts, 0)
    if used != len(parts):
        raise ValueError(f"{len(parts)} tensors given, {used} needed")
    return tensor


def _unflatten(rebuild: Rebuild, parts: list[torch.Tensor], start: int) -> tuple[torch.Tensor, int]:
    if rebuild.kind is None:
        return parts[start], start + 1
    inner = {}
    for name, inside in zip(rebuild.names, rebuild.inner, strict=True):
        inner[name], start = _unflatten(inside, parts, start)
    make = rebuild.kind.__tensor_unflatten__
    return make(inner, rebuild.context, rebuild.size, rebuild.stride), start


def move_tensor(
    tensor: torch.Tensor, device: torch.device | str, *, copy: bool = False
) -> torch.Tensor:
    """Return the same tensor on `device`, moving its plain tensors one by one.

    torchao's subclasses cannot be moved inside an operator of another subclass: they treat the move
    as a view, so that the result has the memory of the tensor it came from.

    Args:
        copy: Copy tensors that are on `device` already.
    """
    parts, rebuild = flatten_tensor(tensor)
    return unflatten_tensor(rebuild, [part.to(device, copy=copy) for part in parts])


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the plain tensors inside `tensor`."""
    return sum(part.nbytes for part in flatten_tensor(tensor)[0])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Check whether two tensors of one type are equal, bit for bit."""
    parts, others = flatten_tensor(one)[0], flatten_tensor(other)[0]
    return len(parts) == len(others) and all(map(_same_bits, parts, others))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_as_bytes(one), _as_bytes(other))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
