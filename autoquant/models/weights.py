"""Read files of weights: safetensors, and those of torch.save. No code in them is run."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autoquant.errors import ModelError, first_line
from autoquant.files import check_stored, read_json_object, stays_inside
from autoquant.models.quiet import some

BEST = "model.safetensors"
# What the weights of a folder are kept in, whole or in several files, the best form first.
_FORMS = ((BEST, f"{BEST}.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def any_files(folder: Path) -> bool:
    """Check whether the folder holds weights as `save_pretrained` names them."""
    return any((folder / name).is_file() for names in _FORMS for name in names)


def files(folder: Path) -> list[Path]:
    """Return the files of the model: safetensors, or else pickled tensors.

    Each safetensors file is opened once to check that it is whole.

    Raises:
        ModelError: One is missing or damaged, or lies in another folder.
    """
    for whole, index in _FORMS:
        if (folder / whole).is_file():
            found = [folder / whole]
        elif (folder / index).is_file():
            found = [folder / name for name in _shards(folder / index)]
        else:
            continue
        for path in found:
            if path.suffix == ".safetensors":
                check_safetensors(path)
        return found
    raise ModelError(f"{folder} has no {BEST}: download or save the model again")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in read_json_object(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"cannot read {index} ({first_line(error)}): download or save it again"
        ) from error
    if outside := [name for name in names if not stays_inside(name)]:
        raise ModelError(
            f"{index} names weights of another folder ({some(outside)}): put them beside it, and"
            " name them there"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ModelError(
            f"{index.parent} lacks {some(missing) or 'weights'} of {index.name}: download it again"
        )
    return names


def check_safetensors(path: Path) -> None:
    """Check that the header can be read and fits the file's length.

    Raises:
        ModelError: It does not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is truncated, damaged or no safetensors file ({first_line(error)}): download"
            " or save it again"
        ) from error


def names(paths: Iterable[Path]) -> list[str]:
    """Return the names of the tensors in safetensors files, which are not read."""
    from safetensors import safe_open

    found: list[str] = []
    for path in paths:
        with safe_open(str(path), framework="pt") as opened:
            found += opened.keys()
    return found


def read_safetensors(paths: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of each tensor."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(str(path), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)


def counts(paths: Iterable[Path]) -> tuple[int, int]:
    """Return how many elements, and how many tensors, safetensors files hold."""
    from safetensors import safe_open

    elements = tensors = 0
    for path in paths:
        with safe_open(str(path), framework="pt") as opened:
            names = opened.keys()
            tensors += len(names)
            elements += sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    return elements, tensors


def integers(paths: Iterable[Path]) -> list[str]:
    """Return the names of the tensors that safetensors files store as integers."""
    from safetensors import safe_open

    found: list[str] = []
    for path in paths:
        with safe_open(str(path), framework="pt") as opened:
            found += [
                name
                for name in opened.keys()  # noqa: SIM118  not a mapping
                if opened.get_slice(name).get_dtype().startswith(("I", "U"))
            ]
    return found


def read_bins(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the state dict that `pytorch_model*.bin` files hold together.

    Raises:
        ModelError: One is damaged, or holds more than tensors; then nothing in it is run.
    """
    state: dict[str, Any] = {}
    for path in paths:
        try:
            part = state_dict_of(read_tensors(path))
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{path} holds pickled code, which is not run: save the model as safetensors with"
                " save_pretrained()"
            ) from error
        except Exception as error:
            raise ModelError(damaged(path, error)) from error
        if part is None:
            raise ModelError(f"{path} holds no state dict: download or save the model again")
        state |= part
    return state


def read_tensors(path: Path) -> Any:
    """Return what a file of torch.save holds, on the CPU.

    Raises what torch raises for a file that holds more than tensors, and ValueError for one whose
    entries would take more memory than the file has.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        check_stored(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def state_dict_of(value: object) -> Mapping[str, Any] | None:
    """Return the state dict that `value` is or holds under a usual name, or None."""
    if not isinstance(value, Mapping):
        return None
    for inner in (value, *(value.get(name) for name in _WRAPPERS)):
        if isinstance(inner, Mapping) and all(isinstance(name, str) for name in inner):
            tensors = [
                isinstance(item, torch.Tensor)
                for name, item in inner.items()
                if "_extra_state" not in name
            ]
            if tensors and all(tensors):
                return inner
    return None


def tensors_of(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a state dict, which may hold other values, too."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield name, value


def damaged(path: Path, error: Exception) -> str:
    """Say that a file cannot be read to its end."""
    return f"{path} is truncated or damaged ({first_line(error)}): download or save it again"
