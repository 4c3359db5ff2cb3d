"""Identify a model by a hash of its tensors and its architecture, not of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoquant.errors import ModelError
from autoquant.models.targets import dtype_name
from autoquant.models.threads import in_threads

DIGEST_VERSION = 1
"""Of what `tensor_digest` returns. Digests that another version made are not used."""

_CHUNK_BYTES = 64 * 2**20
_HASH_LENGTH = 16


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """Hash the dtype, shape and bytes of a tensor, not its name.

    Raises:
        ModelError: It has no plain values.
    """
    hasher = hashlib.sha256(f"{dtype_name(tensor.dtype)}:{tuple(tensor.shape)}:".encode())
    if is_traceable_wrapper_subclass(tensor):
        inner, context = tensor.__tensor_flatten__()
        hasher.update(f"{type(tensor).__qualname__}:{without_addresses(str(context))}".encode())
        for attribute in sorted(inner):
            digest = tensor_digest(f"{name}.{attribute}", getattr(tensor, attribute))
            hasher.update(digest.encode())
        return hasher.hexdigest()
    for chunk in _chunks(name, tensor.detach()):
        hasher.update(chunk.numpy().data)
    return hasher.hexdigest()


def content_hash(
    tensors: Iterable[tuple[str, torch.Tensor]],
    architecture: Mapping[str, Any] | str,
    digest: Callable[[str, torch.Tensor], str] = tensor_digest,
) -> str:
    """Hash every tensor and the architecture to 16 hex digits.

    A tensor counts with its name, dtype, shape and bytes, the architecture with its canonical JSON.

    Args:
        tensors: In any order and from any device. They are read once, by as many threads as PyTorch
            uses: one thread takes them one at a time, several take no more than two each.
        digest: Returns what `tensor_digest` does, and may know it already.

    Raises:
        ModelError: A tensor has no plain values: it is meta, sparse or of a deprecated dtype.
    """

    def named_digest(item: tuple[str, torch.Tensor]) -> tuple[str, str]:
        return item[0], digest(*item)

    digests = sorted(in_threads(named_digest, tensors, torch.get_num_threads()))
    total = hashlib.sha256()
    total.update(
        json.dumps(architecture, sort_keys=True, separators=(",", ":"), default=str).encode()
    )
    for name, value in digests:
        total.update(f"\0{name}\0{value}".encode())
    return total.hexdigest()[:_HASH_LENGTH]


def _chunks(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor's bytes as uint8 tensors of at most 64 MiB on the CPU."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise ModelError(
            f"cannot read the values of {name}: give the model with ordinary (dense) weights"
        )
    if tensor.numel() == 0:
        return
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        yield flat[start : start + _CHUNK_BYTES].cpu()


def module_architecture(module: torch.nn.Module) -> dict[str, str]:
    """Describe a module for its hash: its class and its printed form, without addresses."""
    kind = type(module)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "module": without_addresses(str(module)),
    }


def without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


class DtypeTally:
    """Counts elements by floating dtype while tensors stream past."""

    def __init__(self) -> None:
        self._counts: dict[torch.dtype, int] = {}

    def watch(
        self, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Count `tensors` and pass them on."""
        for name, tensor in tensors:
            if tensor.is_floating_point():
                self._counts[tensor.dtype] = self._counts.get(tensor.dtype, 0) + tensor.numel()
            yield name, tensor

    def main(self) -> torch.dtype | None:
        """Return the dtype that most floating elements have, or None without any."""
        return max(self._counts, key=lambda dtype: self._counts[dtype], default=None)
