"""A GGUF of a language model: the names of its tensors, their numbers, the order of their rows.

Names come from the package gguf. Converters write the rows of some tensors in another order, such
as those of Llama's queries and keys. That order is not assumed by architecture: of those that
converters use, the one is taken by which the numbers are the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoquant.errors import PlanError, first_line

_PLAIN = ("F32", "F16", "BF16")


class GgufFile:
    """A GGUF that was opened. Its tensors are read when they are asked for.

    Attributes:
        tensors: The tensors of the package gguf, by name.
        architecture: E.g. `llama`.

    Raises:
        PlanError: There is no such file, or its model is in several files or is not known.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        if not path.is_file():
            raise PlanError(f"{path} is no file; give a GGUF of the unquantized model")
        try:
            self.reader = gguf.GGUFReader(path)
            self.tensors: dict[str, Any] = {each.name: each for each in self.reader.tensors}
            self.architecture = str(self._field("general.architecture"))
        except Exception as error:  # what a damaged file leads to has no common base
            reason = first_line(error, with_type=True)
            raise PlanError(f"{path} cannot be read as a GGUF ({reason})") from error
        if int(self._field("split.count") or 1) > 1:
            raise PlanError(
                f"{path} is one of several files: merge them by `llama-gguf-split --merge` first"
            )
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise PlanError(
                f"{path} has the architecture {self.architecture!r}, which the installed gguf does"
                " not know: pip install --upgrade gguf"
            )
        count = int(self._field(f"{self.architecture}.block_count") or 0)
        self._names = gguf.get_tensor_name_map(known[self.architecture], count)

    def _field(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def name_of(self, name: str) -> str | None:
        """Return what a weight of the model is called in a GGUF, whether it is there or not."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight",))
        return found

    def is_plain(self, tensor: str) -> bool:
        """Check that a tensor is not quantized."""
        return self.tensors[tensor].tensor_type.name in _PLAIN

    def numbers(self, tensor: str) -> torch.Tensor:
        """Return the float32 numbers of a tensor, `[n, k]` of a matrix."""
        import gguf

        found = self.tensors[tensor]
        numbers = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        scale = tensor.removesuffix(".weight") + ".scale"
        if found.tensor_type.name == "NVFP4" and scale in self.tensors:
            numbers = numbers * torch.from_numpy(self.tensors[scale].data.copy())
        return numbers

    def order_of(self, numbers: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return how the rows of a weight lie in a file.

        Args:
            numbers: Of the model, `[n, k]`.
            stored: Of the file, `[n, k]`.

        Returns:
            Row numbers `[n]` by which stored is numbers[order], and how far it is from that,
            relative to the numbers.
        """
        size = numbers.norm().clamp(min=1e-30)
        found = None
        for order in self._orders(len(numbers)):
            error = float((stored - numbers[order]).norm() / size)
            if found is None or error < found[1]:
                found = order, error
            if error == 0:
                break
        assert found is not None
        return found

    def _orders(self, rows: int) -> Iterator[torch.Tensor]:
        """Yield the orders of rows that converters use.

        Rotary embeddings turn pairs of rows of a head. They are half a head apart in transformers,
        and neighbours for some architectures of llama.cpp.
        """
        same = torch.arange(rows)
        yield same
        for key in ("head_count", "head_count_kv"):
            found = self._field(f"{self.architecture}.attention.{key}")
            for heads in sorted({found} if isinstance(found, int) else set(found or ())):
                if heads and rows % (2 * heads) == 0:
                    yield same.reshape(heads, 2, -1).transpose(1, 2).reshape(-1)
