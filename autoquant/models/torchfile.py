"""State dicts (`.safetensors`, `.pt`, `.pth`) and pickled modules. A pickle is run only where the user trusts it."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.models.content import DtypeTally, content_hash, module_architecture
from autoquant.models.factory import build
from autoquant.models.huggingface import check_safetensors, load_tokenizer
from autoquant.models.loaded import LoadedModel, SourceKind, max_positions, model_kind, settle
from autoquant.models.quiet import current_folder_importable
from autoquant.models.request import Request
from autoquant.models.targets import dtype_name, resolve_dtype

_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_safetensors(path: Path, request: Request) -> LoadedModel:
    """Load a state dict kept as safetensors into the module that the factory makes.

    Raises:
        ModelError: No factory was given, the file is damaged, or the two do not fit.
    """
    from safetensors.torch import load_file

    check_safetensors(path)
    _need_factory(path, request)
    return _load_state(path, load_file(path), request)


def load_torch_file(path: Path, request: Request) -> LoadedModel:
    """Load a file that `torch.save` wrote: a state dict with a factory, or, where trusted, a pickled module.

    Raises:
        ModelError: It is neither, or it holds code and is not trusted (nothing in it is run then).
    """
    value = _read(path, trust=request.trust_pickle)
    if isinstance(value, torch.jit.ScriptModule):
        raise ModelError(_torchscript(path))
    if isinstance(value, nn.Module):
        if request.model_factory is not None:
            raise ModelError(f"{path} holds a whole module: leave out --model-factory")
        return _load_pickled(path, value, request)
    state = _state_dict(value)
    if state is None:
        raise ModelError(f"{path} holds a {type(value).__name__}, not a state dict: save model.state_dict() instead")
    _need_factory(path, request)
    return _load_state(path, state, request)


def _need_factory(path: Path, request: Request) -> None:
    if request.model_factory is None:
        raise ModelError(
            f"{path} is a state dict, weights without a model: give --model-factory package.module:callable that"
            " returns the module to load them into"
        )


def _load_state(path: Path, state: Mapping[str, Any], request: Request) -> LoadedModel:
    assert request.model_factory is not None
    tally = DtypeTally()
    module = build(request.model_factory, state, path)
    tensors = ((name, value) for name, value in state.items() if isinstance(value, torch.Tensor))
    digest = content_hash(tally.watch(tensors), module_architecture(module))
    stored = tally.main() or torch.float32
    target = resolve_dtype(request.dtype, request.device, stored)
    if request.dtype == "auto":
        _cast_unstored_buffers(module, state, target)
    else:
        module.to(target)
    return _finish(path, module, digest, stored, "state_dict", request)


def _cast_unstored_buffers(module: nn.Module, state: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Cast what the factory computed and the file does not hold; what the file holds stays as stored."""
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        if name not in state and buffer.is_floating_point():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(dtype)


def _load_pickled(path: Path, module: nn.Module, request: Request) -> LoadedModel:
    tally = DtypeTally()
    state = ((name, value) for name, value in module.state_dict().items() if isinstance(value, torch.Tensor))
    digest = content_hash(tally.watch(state), module_architecture(module))
    stored = tally.main() or torch.float32
    if request.dtype != "auto":
        module.to(resolve_dtype(request.dtype, request.device, stored))
    return _finish(path, module, digest, stored, "pickle", request)


def _finish(
    path: Path, module: nn.Module, digest: str, stored: torch.dtype, source: SourceKind, request: Request
) -> LoadedModel:
    words = load_tokenizer(request.tokenizer) if request.tokenizer is not None else None
    settle(module.to(request.device))
    may_be_lm = words is not None or request.model_factory is not None
    return LoadedModel(
        module=module,
        content_hash=digest,
        source=request.source(source, str(path)),
        tokenizer=words,
        kind=model_kind(module, request.device, may_be_lm=may_be_lm),
        example_inputs=None,
        max_positions=max_positions(module),
        stored_dtype=dtype_name(stored),
    )


def _state_dict(value: object) -> Mapping[str, Any] | None:
    """`value`, or what it holds under one of the usual names, where that is a state dict."""
    if not isinstance(value, Mapping):
        return None
    for inner in (value, *(value.get(name) for name in _WRAPPERS)):
        if isinstance(inner, Mapping) and all(isinstance(name, str) for name in inner):
            tensors = [isinstance(item, torch.Tensor) for name, item in inner.items() if "_extra_state" not in name]
            if tensors and all(tensors):
                return inner
    return None


def _read(path: Path, *, trust: bool) -> Any:
    """What the file holds. Without `trust` only tensors and plain containers are ever made of it."""
    is_zip = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        if is_zip and _is_torchscript(path):
            raise ModelError(_torchscript(path)) from error
        if not _is_pickle(path, is_zip=is_zip):
            raise ModelError(_unreadable(path, error)) from error
        if not trust:
            # Other errors than this one are those of a damaged file.
            refused = isinstance(error, pickle.UnpicklingError)
            raise ModelError(_untrusted(path) if refused else _damaged(path, error)) from error
    return _unpickle(path)


def _unpickle(path: Path) -> Any:
    """Run the pickle: only for a file that the user trusts."""
    try:
        with current_folder_importable():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ModelError(
            f"cannot unpickle {path} ({first_line(error)}): its classes must be importable, in the versions it was"
            " saved with; or save a state dict and give --model-factory"
        ) from error


def _is_pickle(path: Path, *, is_zip: bool) -> bool:
    """Whether the file is a pickle, or a torch file around one, judged without running it."""
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                return _parses(archive.read(name))
        with path.open("rb") as file:
            starts = file.read(1) == pickle.PROTO
            file.seek(0)
            return starts and _parses(file)
    except (OSError, StopIteration, zipfile.BadZipFile):
        return False


def _parses(data: bytes | IO[bytes]) -> bool:
    try:
        for _ in pickletools.genops(data):
            pass
    except (ValueError, IndexError, OverflowError, MemoryError):
        return False
    return True


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _torchscript(path: Path) -> str:
    return f"{path} holds TorchScript, which cannot be changed layer by layer: save a state dict or an exported program"


def _untrusted(path: Path) -> str:
    return (
        f"{path} holds pickled code, which can run anything on loading; save a state dict and give --model-factory,"
        " export it with torch.export.save, or pass --trust-pickle if you trust its author"
    )


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is truncated or damaged ({first_line(error)}): download or save it again"


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path):
            return _damaged(path, error)
    return f"{path} is not a file that torch.save wrote: give a state dict, a .safetensors file or an exported program"
