"""The files of a Hugging Face folder: its configuration, and whether it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoquant.errors import ModelError, first_line
from autoquant.files import read_json_object
from autoquant.models import weights
from autoquant.models.identity import adapter_in, has_adapter
from autoquant.models.request import ModelRequest
from autoquant.models.tokenizers import has_tokenizer

CONFIG = "config.json"
TOKENIZER_ADVICE = "put the model's tokenizer there, or give one with --tokenizer FOLDER"


def has_config(folder: Path) -> bool:
    """Check whether the folder holds the configuration of a Hugging Face model."""
    try:
        return "model_type" in read_json_object(folder / CONFIG)
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `config.json` of a folder.

    Raises:
        ModelError: It is missing, unreadable, of another kind, or of a quantized model.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(_no_config(folder))
    try:
        config = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path} ({first_line(error)}): download or save it again"
        ) from error
    if "model_type" not in config:
        raise ModelError(
            f"{path} names no model_type, so it is not the config.json of a Hugging Face model"
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{folder} holds an already quantized model: give the model before it was quantized"
        )
    return config


def _no_config(folder: Path) -> str:
    if has_adapter(folder):
        return adapter_in(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty: give a folder that save_pretrained() wrote, or a model file"
    models = [name for name in names if (folder / name / "config.json").is_file()]
    if models:
        return f"{folder} has no config.json: give the model's own folder, {folder / models[0]}"
    if files := [name for name in names if name.endswith((".safetensors", ".bin"))]:
        files_to_add = CONFIG if has_tokenizer(folder) else f"{CONFIG} and tokenizer.json"
        return (
            f"{folder} has {files[0]} but no config.json: put the model's {files_to_add} beside it"
        )
    files = [name for name in names if name.endswith((".pt", ".pth", ".pt2"))]
    if files:
        return f"{folder} has no config.json: give the model file itself, {folder / files[0]}"
    return (
        f"{folder} holds no model (no config.json): give a folder that save_pretrained() wrote, or"
        " a model file"
    )


def check_complete(folder: Path, request: ModelRequest, *, tokenizer: bool = True) -> None:
    """Refuse a folder that lacks weights or a tokenizer, and name everything that is missing.

    Args:
        tokenizer: Its model needs one.
    """
    lacks, advice = [], []
    if not weights.any_files(folder):
        lacks.append(weights.BEST)
        advice.append(_other_weights(folder))
    if tokenizer and not has_tokenizer(folder) and request.tokenizer is None:
        lacks.append("tokenizer.json")
        advice.append(TOKENIZER_ADVICE)
    if lacks:
        raise ModelError(
            f"{folder} has a config.json but no {' and no '.join(lacks)}: {', and '.join(advice)}"
        )


def _other_weights(folder: Path) -> str:
    found = [
        path
        for pattern in ("*.pt", "*.pth", "*.safetensors", "*.bin")
        for path in sorted(folder.glob(pattern))
    ]
    whole = [path for path in found if "-of-" not in path.name]
    return (
        f"give the file of weights itself, {whole[0]}"
        if whole
        else "download or save the model again"
    )
