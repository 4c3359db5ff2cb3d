"""Load any model that a user may have."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.devices import backend
from autoquant.errors import ModelError
from autoquant.hints import did_you_mean_path
from autoquant.models import exported, hub, huggingface, torchfile
from autoquant.models.casting import cast, forward_pass
from autoquant.models.code import with_checked_file
from autoquant.models.content import DtypeTally, content_hash, module_architecture
from autoquant.models.copies import own_copy, unwrapped
from autoquant.models.kinds import embedding_rows, model_kind
from autoquant.models.loaded import LoadedModel, device_of, main_dtype, max_positions, settle
from autoquant.models.named import example_inputs
from autoquant.models.quiet import quiet
from autoquant.models.request import ModelPath, ModelRequest, ModelSource, SampleInputs
from autoquant.models.shown import show_as_run, show_linears
from autoquant.models.targets import dtype_name, resolve_device, resolve_dtype
from autoquant.models.tokenizers import load_tokenizer

_log = logging.getLogger(__name__)

_FORMS = "a Hugging Face folder, or a .safetensors, .pt, .pth, .pt2, .bin or .ckpt file"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FILE_SUFFIXES = (".pt", ".pth", ".pt2", ".safetensors", ".bin", ".gguf", ".onnx", ".ckpt", ".json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_request(request: ModelRequest) -> LoadedModel:
    """Load a model, or describe a live module.

    Raises:
        ModelError: The model cannot be read; the message says why and what to do, in one line.
    """
    if isinstance(request.model, nn.Module):
        return from_module(
            request.model,
            device=request.device,
            dtype=request.dtype,
            tokenizer=request.tokenizer,
            sample_inputs=request.sample_inputs,
        )
    started = time.monotonic()
    backend(request.device).keep_to_limit()
    with quiet():
        loaded = _with_inputs(_read(request), request.sample_inputs)
    _log.info(
        "loaded %s in %.1f s: %s, %s on %s, content %s",
        request.name,
        time.monotonic() - started,
        loaded.kind,
        loaded.dtype,
        request.device,
        loaded.content_hash,
    )
    return loaded


def load_model(
    model: ModelPath,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    model_factory: str | None = None,
    tokenizer: str | None = None,
    trust_pickle: bool = False,
    sample_inputs: SampleInputs = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model from a folder, a file or the hub, ready to run.

    Arguments are described at `autoquant.models.request.ModelRequest`.

    Raises:
        ModelError: The model cannot be read; the message says why and what to do, in one line.
        DeviceError: The device is not there.
        WorkloadError: The dtype is unknown.
    """
    return load_request(
        ModelRequest(
            model=model,
            dtype=dtype,
            device=device,
            model_factory=model_factory,
            tokenizer=tokenizer,
            trust_pickle=trust_pickle,
            sample_inputs=sample_inputs,
            trust_remote_code=trust_remote_code,
        )
    )


def _read(request: ModelRequest) -> LoadedModel:
    path = Path(request.name).expanduser().absolute()
    if path.is_dir() and request.model_factory is not None:
        return torchfile.load_folder(path, request)
    if path.is_dir():
        return huggingface.load_folder(path, request, str(path))
    if path.is_file():
        return _load_file(path, request)
    if path.exists() or not _may_be_on_hub(request.name):
        raise ModelError(
            f"there is no model at {request.name}{did_you_mean_path(path)}: give {_FORMS}"
        )
    folder = hub.download(request.name, with_code=request.trust_remote_code)
    return huggingface.load_folder(folder, request, request.name)


def _may_be_on_hub(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not name.endswith(_FILE_SUFFIXES)


def _load_file(path: Path, request: ModelRequest) -> LoadedModel:
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty: download or save it again")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return torchfile.load_safetensors(path, request)
    if request.trust_pickle:
        request = with_checked_file(request, path)
    if suffix == ".pt2" or (suffix in _TORCH_SUFFIXES and exported.is_exported(path)):
        return exported.load_exported(path, request)
    if suffix in _TORCH_SUFFIXES:
        return torchfile.load_torch_file(path, request)
    raise ModelError(f"{path} is not a kind of model file that can be read: give {_FORMS}")


def _with_inputs(loaded: LoadedModel, sample_inputs: SampleInputs) -> LoadedModel:
    """Give a model the inputs that the user named, in place of those that its file holds.

    Linears that depend on how it runs on them are shown.
    """
    if sample_inputs is not None:
        inputs = example_inputs(sample_inputs, loaded.device, main_dtype(loaded.module))
        loaded = replace(loaded, example_inputs=inputs)
    if loaded.kind != "causal_lm":
        run = forward_pass(loaded.module, loaded.example_inputs, loaded.device)
        show_as_run(loaded.module, run)
    return loaded


def from_module(
    module: nn.Module,
    *,
    device: str | None = None,
    dtype: str = "auto",
    tokenizer: Any | None = None,
    sample_inputs: SampleInputs = None,
) -> LoadedModel:
    """Take a live module: a copy of it with the same weights, in eval mode and without gradients.

    The caller's module stays as it is. `torch.compile` and data parallelism around it are left out,
    and so is PEFT's model around adapters of LoRA.

    Arguments are described at `autoquant.models.request.ModelRequest`.

    Args:
        device: Where the copy runs; None for where the module is.
        dtype: The dtype to cast the weights of the copy to; auto for no cast.
        tokenizer: With one, a module that takes token ids is recognised as a language model.

    Raises:
        ModelError, DeviceError, WorkloadError: As for `load_model`.
    """
    place = device_of(module) if device is None else resolve_device(device)
    resolve_dtype(dtype, place, torch.float32)  # a typo is refused before anything is copied
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            "the weights of a scripted or traced module cannot be replaced: give the module that it"
            " was made of"
        )
    module = own_copy(unwrapped(module, with_lora=True))
    tally = DtypeTally()
    state = module.state_dict().items()
    tensors = ((name, value) for name, value in state if isinstance(value, torch.Tensor))
    digest = content_hash(tally.watch(tensors), module_architecture(module))
    stored = tally.main() or torch.float32
    path = os.fspath(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else None
    with quiet():
        words = tokenizer if path is None else load_tokenizer(path)
        show_linears(settle(module.to(place)))
        notes = (
            []
            if dtype == "auto"
            else cast(module, resolve_dtype(dtype, place, stored), place, sample_inputs)
        )
        kind = model_kind(module, place, may_be_lm=words is not None)
    loaded = LoadedModel(
        module=module,
        content_hash=digest,
        source=ModelSource(kind="live", tokenizer=path),
        tokenizer=words,
        kind=kind,
        vocabulary=embedding_rows(module, place),
        example_inputs=None,
        max_positions=max_positions(module),
        stored_dtype=dtype_name(stored),
        notes=tuple(notes),
    )
    return _with_inputs(loaded, sample_inputs)
