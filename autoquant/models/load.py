"""`load_model`, `from_module` and `take_model`: any model a user may have, as a `LoadedModel`."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError
from autoquant.hints import did_you_mean_path
from autoquant.models import exported, huggingface, torchfile
from autoquant.models.content import DtypeTally, content_hash, module_architecture
from autoquant.models.loaded import LoadedModel, ModelSource, main_dtype, max_positions, model_kind, settle
from autoquant.models.named import make_inputs
from autoquant.models.quiet import quiet
from autoquant.models.request import Request
from autoquant.models.targets import dtype_name, resolve_device, resolve_dtype

_log = logging.getLogger(__name__)

SampleInputs = Sequence[Any] | Mapping[str, Any] | str | None
"""Arguments of one forward pass, positional or by name, or `package.module:callable` that returns them."""

_FORMS = "a Hugging Face folder, or a .safetensors, .pt, .pth, .pt2, .bin or .ckpt file"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FILE_SUFFIXES = (".pt", ".pth", ".pt2", ".safetensors", ".bin", ".gguf", ".onnx", ".ckpt", ".json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    model_factory: str | None = None,
    tokenizer: str | None = None,
    trust_pickle: bool = False,
    sample_inputs: SampleInputs = None,
) -> LoadedModel:
    """Load a model from a folder, a file or the hub, ready to run.

    Args:
        model: A Hugging Face causal-LM folder or a name on the hub (`org/name`); a state dict (`.safetensors`, `.pt`, `.pth`,
            `.bin`, `.ckpt`) beside the `config.json` of such a model, or that `model_factory` makes a module for; an exported
            program (`.pt2`, `.pt`); a pickled module (`.pt`).
        dtype: auto (as stored), fp32, bf16, fp16 or fast16; see `resolve_dtype`.
        device: auto, cpu, cuda, cuda:INDEX or mps.
        model_factory: `package.module:callable` that returns the module; looked for in the current directory too.
        tokenizer: A tokenizer folder or a `tokenizer.json`; a Hugging Face folder brings its own.
        trust_pickle: Allow the file to run code on loading. Without it no code in any model file is ever run.
        sample_inputs: The arguments of one forward pass, a tuple or a dict, or `package.module:callable` that returns them.

    Raises:
        ModelError: The model cannot be read; the message says why and what to do, in one line.
        DeviceError: The device is not there.
        WorkloadError: The dtype is unknown.
    """
    device = resolve_device(device)
    resolve_dtype(dtype, "cpu", torch.float32)  # a misspelt dtype should not wait for the weights
    request = Request(
        name=os.fspath(model),
        dtype=dtype,
        device=device,
        model_factory=model_factory,
        tokenizer=tokenizer,
        trust_pickle=trust_pickle,
        sample_inputs=sample_inputs,
    )
    started = time.monotonic()
    with quiet():
        loaded = _load(request)
        _give_inputs(loaded, sample_inputs)
    _log.info(
        "loaded %s in %.1f s: %s, %s on %s, content %s",
        *(model, time.monotonic() - started, loaded.kind, loaded.dtype, device, loaded.content_hash),
    )
    return loaded


def take_model(
    model: str | os.PathLike[str] | nn.Module,
    *,
    dtype: str,
    device: str,
    model_factory: str | None,
    tokenizer: Any | None,
    trust_pickle: bool,
    sample_inputs: SampleInputs = None,
) -> LoadedModel:
    """Load a model from where it is, or take a live module as it is.

    Raises:
        ModelError, DeviceError, WorkloadError: As for `load_model`.
    """
    if isinstance(model, nn.Module):
        loaded = from_module(model, device=device, dtype=None if dtype == "auto" else dtype, tokenizer=tokenizer)
        _give_inputs(loaded, sample_inputs)
        return loaded
    return load_model(
        model,
        dtype=dtype,
        device=device,
        model_factory=model_factory,
        tokenizer=tokenizer,
        trust_pickle=trust_pickle,
        sample_inputs=sample_inputs,
    )


def _load(request: Request) -> LoadedModel:
    path = Path(request.name).expanduser().absolute()
    if path.is_dir():
        return huggingface.load_folder(path, request, str(path))
    if path.is_file():
        return _load_file(path, request)
    if path.exists() or not _may_be_on_hub(request.name):
        raise ModelError(f"there is no model at {request.name}{did_you_mean_path(path)}: give {_FORMS}")
    return huggingface.load_folder(huggingface.download(request.name), request, request.name)


def _may_be_on_hub(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not name.endswith(_FILE_SUFFIXES)


def _load_file(path: Path, request: Request) -> LoadedModel:
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty: download or save it again")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return torchfile.load_safetensors(path, request)
    if suffix == ".pt2" or (suffix in _TORCH_SUFFIXES and exported.is_exported(path)):
        return exported.load_exported(path, request)
    if suffix in _TORCH_SUFFIXES:
        return torchfile.load_torch_file(path, request)
    raise ModelError(f"{path} is not a kind of model file that can be read: give {_FORMS}")


def _give_inputs(loaded: LoadedModel, sample_inputs: SampleInputs) -> None:
    """Let the model's example inputs be those given, or what the callable named returns."""
    if isinstance(sample_inputs, str):
        loaded.example_inputs = make_inputs(sample_inputs, loaded.device, main_dtype(loaded.module))
    elif sample_inputs is not None:
        loaded.example_inputs = dict(sample_inputs) if isinstance(sample_inputs, Mapping) else tuple(sample_inputs)


def from_module(
    module: nn.Module, *, device: str | None = None, dtype: str | None = None, tokenizer: Any | None = None
) -> LoadedModel:
    """Take a live module as it is.

    The module itself is used, not a copy: it is put in eval mode and its parameters stop requiring gradients. It is
    moved only where `device` is given and cast only where `dtype` is given (names as in `load_model`), both in place.

    Args:
        tokenizer: A tokenizer object, or the path of a tokenizer folder or `tokenizer.json`. With one, a module that
            takes token ids is recognised as a language model.

    Raises:
        ModelError, DeviceError, WorkloadError: As for `load_model`.
    """
    tally = DtypeTally()
    state = ((name, value) for name, value in module.state_dict().items() if isinstance(value, torch.Tensor))
    digest = content_hash(tally.watch(state), module_architecture(module))
    stored = tally.main() or torch.float32
    place = resolve_device(device) if device is not None else _device_of(module)
    target = resolve_dtype(dtype or "auto", place, stored)
    path = os.fspath(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else None
    with quiet():
        words = huggingface.load_tokenizer(path) if path is not None else tokenizer
        if device is not None:
            module.to(place)
        if dtype not in (None, "auto"):
            module.to(target)
        settle(module)
        kind = model_kind(module, place, may_be_lm=words is not None)
    return LoadedModel(
        module=module,
        content_hash=digest,
        source=ModelSource(kind="live", tokenizer=path),
        tokenizer=words,
        kind=kind,
        example_inputs=None,
        max_positions=max_positions(module),
        stored_dtype=dtype_name(stored),
    )


def _device_of(module: nn.Module) -> str:
    for tensor in (*module.parameters(), *module.buffers()):
        return str(tensor.device)
    return "cpu"
