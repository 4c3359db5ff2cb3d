"""Load state dicts and pickled modules. A pickle only runs if the user trusts it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.models import weights
from autoquant.models.casting import cast
from autoquant.models.content import DtypeTally, content_hash, module_architecture
from autoquant.models.factory import build
from autoquant.models.folder import has_config
from autoquant.models.huggingface import load_beside
from autoquant.models.kinds import embedding_rows, model_kind
from autoquant.models.loaded import LoadedModel, main_dtype, max_positions, settle
from autoquant.models.missing import class_reads_tokens, missing, weights_read_tokens
from autoquant.models.names import renamed
from autoquant.models.pickled import is_pickle, pickled_class
from autoquant.models.placing import moved
from autoquant.models.quiet import current_folder_importable
from autoquant.models.remembered import FileDigests
from autoquant.models.request import ModelRequest, SourceKind
from autoquant.models.shown import show_linears
from autoquant.models.targets import dtype_name, resolve_dtype
from autoquant.models.tokenizers import has_tokenizer, tokenizer_of
from autoquant.models.weights import (
    check_safetensors,
    damaged,
    read_tensors,
    state_dict_of,
    tensors_of,
)

_SAVE_PRETRAINED = "save it with save_pretrained() and give that folder"
_EXPORT = "export the module, torch.export.save(torch.export.export(module, inputs), 'model.pt2')"
_PUT_BESIDE = (
    "put the model's config.json and tokenizer.json beside it, if it is one of transformers"
)
# The outermost class in the pickle of a state dict.
_CONTAINERS = ("", "collections.OrderedDict")


def load_safetensors(path: Path, request: ModelRequest) -> LoadedModel:
    """Load a state dict in a safetensors file; see `load_torch_file`.

    Raises:
        ModelError: There is no model to load it into, the file is damaged, or the two do not fit.
    """
    from safetensors.torch import load_file

    check_safetensors(path)
    digests = FileDigests([path])
    return _load_state(path, load_file(path), request, digests)


def load_torch_file(path: Path, request: ModelRequest) -> LoadedModel:
    """Load a file that torch.save wrote: a state dict or, if trusted, a pickled module.

    A state dict goes into the module that the factory makes. Without a factory, it goes into the
    model that a config.json beside it describes.

    Raises:
        ModelError: It is neither, or lacks something. Or it holds code and is not trusted; then
            nothing in it is run.
    """
    # What the file's code made may be other tensors the next time.
    digests = FileDigests([] if request.trust_pickle else [path])
    value = _read(path, request)
    if isinstance(value, torch.jit.ScriptModule):
        raise ModelError(_torchscript(path))
    if isinstance(value, nn.Module):
        if request.model_factory is not None:
            raise ModelError(f"{path} holds a whole module: leave out --model-factory")
        return _load_pickled(path, value, request)
    state = state_dict_of(value)
    if state is None:
        raise ModelError(
            f"{path} holds a {type(value).__name__}, not a state dict: save model.state_dict()"
            " instead"
        )
    return _load_state(path, state, request, digests)


def load_folder(folder: Path, request: ModelRequest) -> LoadedModel:
    """Load the weights of a Hugging Face folder into the module that the factory makes.

    Raises:
        ModelError: The folder has no weights, or they do not fit the module.
    """
    assert request.model_factory is not None  # folders without one are `huggingface`'s
    files = weights.files(folder)
    digests = FileDigests(files)
    is_bin = files[0].suffix == ".bin"
    state = weights.read_bins(files) if is_bin else dict(weights.read_safetensors(files))
    return _load_into_factory(request.model_factory, folder, state, request, digests)


def _load_state(
    path: Path, state: Mapping[str, Any], request: ModelRequest, digests: FileDigests
) -> LoadedModel:
    if request.model_factory is not None:
        return _load_into_factory(request.model_factory, path, state, request, digests)
    if has_config(path.parent):
        return load_beside(state, path, request, digests)
    reads_tokens = weights_read_tokens(state)
    raise missing(
        request,
        f"{path} is a state dict, weights without a model",
        factory=True,
        reads_tokens=reads_tokens,
        instead=_PUT_BESIDE if reads_tokens else _EXPORT,
    )


def _load_into_factory(
    factory: str,
    path: Path,
    state: Mapping[str, Any],
    request: ModelRequest,
    digests: FileDigests,
) -> LoadedModel:
    tally = DtypeTally()
    digests.watch(tensors_of(state))
    module = build(factory, state, path)
    tensors = tally.watch(tensors_of(renamed(state, module)))
    digest = digests.content_hash(tensors, module_architecture(module))
    return _finish(path, module, digest, tally.main(), "state_dict", request)


def _load_pickled(path: Path, module: nn.Module, request: ModelRequest) -> LoadedModel:
    tally = DtypeTally()
    tensors = tally.watch(tensors_of(module.state_dict()))
    digest = content_hash(tensors, module_architecture(module))
    return _finish(path, module, digest, tally.main(), "pickle", request)


def _finish(
    path: Path,
    module: nn.Module,
    digest: str,
    stored: torch.dtype | None,
    source: SourceKind,
    request: ModelRequest,
) -> LoadedModel:
    """Cast, move and describe a module.

    Args:
        path: The file, or the folder of several.
        stored: The dtype that most stored weights have, or None if they are no floats.
    """
    words = tokenizer_of(request, path if path.is_dir() and has_tokenizer(path) else None)
    stored = stored or torch.float32
    show_linears(settle(moved(module, request.device)))
    as_stored = main_dtype(module) or stored
    target = resolve_dtype(request.dtype, request.device, as_stored)
    notes = cast(module, target, request.device, request.sample_inputs)
    may_be_lm = words is not None or request.model_factory is not None
    return LoadedModel(
        module=module,
        content_hash=digest,
        source=request.source(source, str(path)),
        tokenizer=words,
        kind=model_kind(module, request.device, may_be_lm=may_be_lm),
        vocabulary=embedding_rows(module, request.device),
        example_inputs=None,
        max_positions=max_positions(module),
        stored_dtype=dtype_name(stored),
        notes=tuple(notes),
    )


def _read(path: Path, request: ModelRequest) -> Any:
    """Return what the file holds. Without trust, only tensors and plain containers are made."""
    is_zip = zipfile.is_zipfile(path)
    try:
        return read_tensors(path)
    except Exception as error:
        if is_zip and _is_torchscript(path):
            raise ModelError(_torchscript(path)) from error
        if not is_pickle(path, is_zip=is_zip):
            raise ModelError(_unreadable(path, error)) from error
        if not request.trust_pickle:
            # Other errors than this one are those of a damaged file.
            if not isinstance(error, pickle.UnpicklingError):
                raise ModelError(damaged(path, error)) from error
            raise _untrusted(path, error, request, is_zip=is_zip) from error
    return _unpickle(path)


def _unpickle(path: Path) -> Any:
    """Run the pickle. Only for a file that the user trusts."""
    try:
        with current_folder_importable():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ModelError(
            f"cannot unpickle {path} ({first_line(error)}): its classes must be importable, in the"
            " versions it was saved with; or save a state dict and give --model-factory"
        ) from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def _torchscript(path: Path) -> str:
    name = repr(path.name)
    return (
        f"{path} holds TorchScript, whose layers cannot be replaced one by one: give what it was"
        " made of, as torch.export.save(torch.export.export(module, inputs), 'model.pt2'), or its"
        f" weights, as torch.save(torch.jit.load({name}).state_dict(), 'weights.pt'), with"
        " --model-factory package.module:callable"
    )


def _untrusted(path: Path, error: Exception, request: ModelRequest, *, is_zip: bool) -> ModelError:
    """Make the error for an untrusted pickle.

    It names what else the model will need, as far as that is known without running the pickle.
    """
    kind = pickled_class(path, is_zip=is_zip)
    is_state = kind in _CONTAINERS
    refused = re.search(r"GLOBAL (\S+)", str(error))
    name = (refused[1] if refused else "") if is_state else kind
    named = f" ({name})" if name else ""
    problem = f"{path} holds pickled code{named}, which can run anything on loading"
    if is_state:
        beside = has_config(path.parent)
        if beside and has_tokenizer(path.parent):
            request = replace(request, tokenizer=str(path.parent))
        return missing(
            request,
            problem,
            trust=True,
            factory=not beside,
            reads_tokens=True if beside else None,
            instead="save the state dict alone, torch.save(model.state_dict(), 'weights.pt')",
        )
    return missing(
        request,
        problem,
        trust=True,
        reads_tokens=class_reads_tokens(kind),
        instead=_SAVE_PRETRAINED if class_reads_tokens(kind) else _EXPORT,
    )


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path):
            return damaged(path, error)
    return (
        f"{path} is not a file that torch.save wrote: give a state dict, a .safetensors file or an"
        " exported program"
    )
