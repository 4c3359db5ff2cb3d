"""Hugging Face causal language models: folders, the hub, tokenizers. Never runs code that comes with a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.hints import did_you_mean_path
from autoquant.models.content import DtypeTally, content_hash
from autoquant.models.loaded import LoadedModel, max_positions, model_kind, settle
from autoquant.models.quiet import no_progress_bars, some
from autoquant.models.request import Request
from autoquant.models.targets import dtype_name, resolve_dtype

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
_DOWNLOADED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
# Fields of config.json that change when a model is saved or moved without being another model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_folder(folder: Path, request: Request, path: str) -> LoadedModel:
    """Load a causal LM saved with `save_pretrained`. `path` is what the source says the model is.

    Raises:
        ModelError: A file is missing, truncated or of another kind, or the model is no causal LM.
    """
    if request.model_factory is not None:
        raise ModelError(f"{folder} is a folder, and --model-factory goes with a file of weights: leave it out")
    config = _read_config(folder)
    files = _weight_files(folder)
    tally = DtypeTally()
    architecture = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest = content_hash(tally.watch(_stored_tensors(files)), architecture)
    stored = tally.main()
    if stored not in _PLAIN_DTYPES:
        form = "no floating-point weights" if stored is None else f"weights of {dtype_name(stored)}"
        raise ModelError(f"{folder} holds {form}: give the model before it was quantized")
    words = load_tokenizer(request.tokenizer) if request.tokenizer is not None else _own_tokenizer(folder)
    module = pretrained(folder, resolve_dtype(request.dtype, request.device, stored))
    module = settle(module.to(request.device))
    return LoadedModel(
        module=module,
        content_hash=digest,
        source=request.source("huggingface", path),
        tokenizer=words,
        kind=model_kind(module, request.device, may_be_lm=True),
        example_inputs=None,
        max_positions=max_positions(module),
        stored_dtype=dtype_name(stored),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(_no_config(folder))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path} ({first_line(error)}): download or save it again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path} names no model_type, so it is not the config.json of a Hugging Face model")
    if "quantization_config" in config:
        raise ModelError(f"{folder} holds an already quantized model: give the model before it was quantized")
    return config


def _no_config(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty: give a folder that save_pretrained() wrote, or a model file"
    models = [name for name in names if (folder / name / "config.json").is_file()]
    if models:
        return f"{folder} has no config.json: give the model's own folder, {folder / models[0]}"
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if weights:
        return f"{folder} has {weights[0]} but no config.json: put the model's config.json beside it"
    files = [name for name in names if name.endswith((".pt", ".pth", ".pt2"))]
    if files:
        return f"{folder} has no config.json: give the model file itself, {folder / files[0]}"
    return f"{folder} holds no model (no config.json): give a folder that save_pretrained() wrote, or a model file"


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, each opened once to see that it is whole."""
    if (folder / _WEIGHTS).is_file():
        files = [folder / _WEIGHTS]
    elif (folder / _INDEX).is_file():
        files = [folder / name for name in _shards(folder / _INDEX)]
    elif any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder} holds its weights as pickles (.bin): save them as safetensors with save_pretrained()"
        )
    else:
        raise ModelError(f"{folder} has a config.json but no {_WEIGHTS} (or {_INDEX}): download or save it again")
    for path in files:
        check_safetensors(path)
    return files


def _shards(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read {index} ({first_line(error)}): download or save it again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise ModelError(f"{index.parent} lacks {some(missing) or 'weights'} of {index.name}: download it again")
    return names


def check_safetensors(path: Path) -> None:
    """See that the header can be read and fits the file's length.

    Raises:
        ModelError: It does not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is truncated, damaged or no safetensors file ({first_line(error)}): download or save it again"
        ) from error


def _stored_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in files:
        with safe_open(str(path), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                yield name, opened.get_tensor(name)


def pretrained(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """The unquantized model of a folder, on the CPU.

    Args:
        dtype: None for the one that `config.json` names, or the weights have.

    Raises:
        ModelError: transformers cannot load it, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    try:
        with no_progress_bars():
            module, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(
            f"transformers cannot load {folder} as a causal language model: {first_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"transformers made no torch module of {folder}: give a causal language model")
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {some(missing)} of {type(module).__name__}: download or save the model again"
        )
    return module


def _own_tokenizer(folder: Path) -> Any:
    if not has_tokenizer(folder):
        raise ModelError(f"{folder} has no tokenizer (no tokenizer.json): put it there, or give one with --tokenizer")
    return load_tokenizer(str(folder))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer from a folder or from a `tokenizer.json`.

    Raises:
        ModelError: There is none, or transformers cannot read it.
    """
    place = Path(path).expanduser().absolute()
    if not place.exists() or (place.is_dir() and not has_tokenizer(place)):
        raise ModelError(f"there is no tokenizer at {path}: give a folder that holds a tokenizer.json, or that file")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if place.is_dir():
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        return PreTrainedTokenizerFast(tokenizer_file=str(place))
    except Exception as error:
        raise ModelError(
            f"cannot read the tokenizer {place} ({first_line(error)}): download or save it again"
        ) from error


def download(name: str) -> Path:
    """Fetch a model from the hub (or find it in the hub's cache) and return its folder.

    Raises:
        ModelError: The hub cannot be reached, or has no such model, or it is not open to this user.
    """
    from huggingface_hub import snapshot_download

    try:
        with no_progress_bars():
            return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder here{did_you_mean_path(name)} nor a model that can be fetched from the"
            f" hub ({first_line(error)}): check the spelling and the network, or give a folder"
        ) from error
