"""The tensors of a checkpoint, written to files of bounded size and read from them.

What torchao can describe lies in safetensors files, the rest (kernel-specific packings) in files of
`torch.save`. A writer holds the tensors of one file of each kind. Tensors that need several files
have an index, `model.safetensors.index.json`, as Hugging Face names it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from autoquant.candidates.flat import move_tensor, same_bits, stored_bytes
from autoquant.devices import backend
from autoquant.errors import CheckpointError, ModelError, first_line
from autoquant.files import check_stored
from autoquant.models.fitting import gib
from autoquant.models.threads import in_threads
from autoquant.models.weights import files

SAFETENSORS = "model.safetensors"
INDEX = f"{SAFETENSORS}.index.json"
PACKED = "packed.pt"
SHARD_BYTES = 1 << 30
"""Tensors that take more go to several files. A writer holds so many, and their bytes again."""

_SAFETENSORS_SHARD = "model-{number:05d}-of-{count:05d}.safetensors"
_PACKED_SHARD = "packed-{number:05d}-of-{count:05d}.pt"
_CANDIDATES = "autoquant.candidates"
_MOVED_CLASSES = {
    f"{_CANDIDATES}.int4_gemlite_tensor.Int4GemliteTensor": f"{_CANDIDATES}.formats.int4_gemlite",
    f"{_CANDIDATES}.int4_tiled_tensor.Int4TiledTensor": f"{_CANDIDATES}.formats.int4_tiled",
    f"{_CANDIDATES}.low_bit.BitPlaneTensor": f"{_CANDIDATES}.formats.low_bit",
}
"""Names of classes that earlier versions wrote into `packed.pt`, with their modules of today."""


class ShardWriter:
    """Writes tensors to files as they come.

    Args:
        folder: An existing folder without files of a checkpoint.
        check: Read each file back, and compare its tensors bit for bit.

    Attributes:
        packed: The names of the files that hold packings.
        packings: The types of the packings, by name.
    """

    def __init__(self, folder: Path, *, check: bool = False) -> None:
        self.packed: list[str] = []
        self.packings: set[str] = set()
        plain = _Kind(SAFETENSORS, _SAFETENSORS_SHARD, write_safetensors, _map_safetensors)
        opaque = _Kind(PACKED, _PACKED_SHARD, _write_packed, _map_packed)
        self._readable, self._opaque = _Files(folder, plain, check), _Files(folder, opaque, check)
        self._folder = folder

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor. It is in a file at the end, or once others fill a file with it."""
        if _fits_safetensors(name, tensor):
            self._readable.add(name, tensor)
        else:
            self.packings.add(type(tensor).__name__)
            self._opaque.add(name, move_tensor(tensor, "cpu"))

    def finish(self) -> None:
        """Write what is left, and give all files their names."""
        self._readable.finish()
        if self._opaque.held:
            self._opaque.finish()
        self.packed = self._opaque.names
        _write_index(self._folder, self._readable)


class PlainWriter:
    """Writes plain tensors to safetensors files as they come, and reads each file back.

    Args:
        folder: An existing folder without files of a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        kind = _Kind(SAFETENSORS, _SAFETENSORS_SHARD, _write_plain, _map_plain)
        self._folder, self._files = folder, _Files(folder, kind, check=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor. It is in a file at the end, or once others fill a file with it."""
        self._files.add(name, tensor.cpu())

    def finish(self, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write what is left, and give all files their names.

        Args:
            metadata: Texts that the header of every file gets.
        """
        self._files.finish()
        _write_index(self._folder, self._files)
        for name in self._files.names if metadata else ():
            _describe(self._folder / name, metadata)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of file.

    Attributes:
        only: The name of a file that is the only one.
        each: The name of one of several files.
        mapped: Returns the tensors of a file, without copies where that can be.
    """

    only: str
    each: str
    write: Callable[[Mapping[str, torch.Tensor], Path], None]
    mapped: Callable[[Path], dict[str, torch.Tensor]]


class _Files:
    """Files of one kind, as many as the tensors need.

    Attributes:
        held: Tensors that are in no file yet.
        names: The files written so far; after `finish`, as they stay.
    """

    def __init__(self, folder: Path, kind: _Kind, check: bool) -> None:
        self.held: dict[str, torch.Tensor] = {}
        self.names: list[str] = []
        self.total_bytes = 0
        self._held_bytes = 0
        self._folder, self._kind, self._check = folder, kind, check

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = stored_bytes(tensor)
        if self.held and self._held_bytes + size > SHARD_BYTES:
            self._flush()
        self.held[name] = tensor
        self._held_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        self._flush()
        count = len(self.names)
        for number, name in enumerate(self.names):
            final = self._kind.each.format(number=number + 1, count=count)
            if count == 1:
                final = self._kind.only
            (self._folder / name).rename(self._folder / final)
            self.names[number] = final

    def _flush(self) -> None:
        path = self._folder / f"{self._kind.only}.{len(self.names)}"
        self._kind.write(self.held, path)
        self.names.append(path.name)
        again = self._kind.mapped(path) if self._check else {}
        for name in again:
            if not same_bits(move_tensor(self.held[name], "cpu"), again[name]):
                raise CheckpointError(
                    f"what was written of {name} into {self._folder} is not what was read back;"
                    " please report this"
                )
        self.held, self._held_bytes = {}, 0


def _write_index(folder: Path, files: _Files) -> None:
    """Write which file holds which tensor, if there are several."""
    from safetensors import safe_open

    if len(files.names) <= 1:
        return
    places: dict[str, str] = {}
    for name in files.names:
        with safe_open(folder / name, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), name)
    index = {"metadata": {"total_size": files.total_bytes}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def read_tensors(
    folder: Path, packed: Sequence[str] | None, device: str
) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by name, on a device.

    Args:
        packed: Names of the files with packings; None for the one that may be there.

    Raises:
        CheckpointError: A file is missing or damaged, or the tensors do not fit the device.
    """
    if packed is None:
        packed = [PACKED] if (folder / PACKED).exists() else []
    tensors: dict[str, torch.Tensor] = {}
    try:
        readable = files(folder)
        _check_room(folder, [*readable, *(folder / name for name in packed)], device)
        for path in readable:
            tensors |= read_safetensors(path, device)
        for name in packed:
            tensors |= _read_packed(folder / name, device)
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{folder} does not fit into the memory of {device}: free some, or use another device"
        ) from error
    except CheckpointError:
        raise
    except ModelError as error:
        raise CheckpointError(f"cannot read {folder} ({error}): apply the plan again") from error
    except Exception as error:  # what the readers of two libraries raise has no common base
        raise CheckpointError(
            f"cannot read {folder}, which is damaged ({first_line(error)}): apply the plan again"
        ) from error
    return tensors


def _check_room(folder: Path, paths: Sequence[Path], device: str) -> None:
    """Refuse what is larger than the memory that is free, before it is read."""
    backend(device).keep_to_limit()
    room_bytes = backend(device).room_bytes()
    needed = sum(path.stat().st_size for path in paths)
    if room_bytes is not None and needed > room_bytes:
        raise CheckpointError(
            f"{folder} takes {gib(needed)}, and {device} has {gib(room_bytes)} of memory free: free"
            " some, use another device, or apply a smaller plan"
        )


def names_of_files(names: Iterable[str]) -> set[str]:
    """Return those of the names that files of tensors of a checkpoint have."""
    return {
        name
        for name in names
        if name in (SAFETENSORS, INDEX, PACKED)
        or (name.startswith("model-") and name.endswith(".safetensors"))
        or (name.startswith("packed-") and name.endswith(".pt"))
    }


def _fits_safetensors(name: str, tensor: torch.Tensor) -> bool:
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES

    if type(tensor) is torch.Tensor:
        return True
    # torchao splits a subclass's name at its last dot
    return type(tensor).__name__ in ALLOWED_TENSORS_SUBCLASSES and "." in name


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to one file."""
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    dotted = {name if "." in name else f".{name}": tensor for name, tensor in tensors.items()}
    flat, metadata = flatten_tensor_state_dict(dotted)
    save_file(_apart(flat), path, metadata={**metadata, "format": "pt"})


def _write_plain(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(_apart(tensors), path, metadata={"format": "pt"})


def _describe(path: Path, metadata: Mapping[str, str]) -> None:
    """Put more metadata into the header of a safetensors file.

    The header is JSON after its length in 8 bytes, little-endian, and the tensors follow it.
    """
    whole = path.with_suffix(".described")
    with path.open("rb") as file, whole.open("wb") as out:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"] |= metadata
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as safetensors aligns it
        out.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, out)
    whole.replace(path)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, each in memory of its own: safetensors shares none."""
    apart: dict[str, torch.Tensor] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        storage = whole.untyped_storage()
        shares = storage.data_ptr() in stored or storage.nbytes() > whole.nbytes
        apart[name] = whole.clone() if shares else whole
        stored.add(storage.data_ptr())
    return apart


def read_safetensors(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata, stored, place = file.metadata(), file.keys(), backend(device)
        mapped = map(file.get_tensor, stored)
        copied = in_threads(place.upload, mapped, place.upload_threads)  # and aligned
        flat = dict(zip(stored, copied, strict=True))
    return _unflattened(flat, metadata, path)


def _map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return _unflattened(_map_plain(path), file.metadata(), path)


def _map_plain(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def _unflattened(
    flat: dict[str, torch.Tensor], metadata: Mapping[str, str], path: Path
) -> dict[str, torch.Tensor]:
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    tensors, rest = unflatten_tensor_state_dict(flat, metadata)
    if rest:
        names = ", ".join(list(rest)[:3])
        raise CheckpointError(f"{path} holds tensors nobody described: {names}")
    return {name.removeprefix("."): tensor for name, tensor in tensors.items()}


def _write_packed(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(dict(tensors), file)


def _read_packed(path: Path, device: str) -> dict[str, torch.Tensor]:
    return {name: move_tensor(tensor, device) for name, tensor in _load(path, mmap=False).items()}


def _map_packed(path: Path) -> dict[str, torch.Tensor]:
    return _load(path, mmap=True)


def _load(path: Path, *, mmap: bool) -> dict[str, torch.Tensor]:
    check_stored(path)
    with torch.serialization.safe_globals(_moved_classes()):
        packed: dict[str, torch.Tensor] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mmap
        )
    return packed


def _moved_classes() -> list[Any]:
    """Return each class of `_MOVED_CLASSES` with its earlier name, as `torch.load` takes them."""
    classes = []
    for old_name, module in _MOVED_CLASSES.items():
        class_name = old_name.rpartition(".")[2]
        classes.append((getattr(import_module(module), class_name), old_name))
    return classes
