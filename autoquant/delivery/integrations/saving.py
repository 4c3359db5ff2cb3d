"""Teach a loaded transformers model to save itself, and to stay whole when it is moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autoquant.delivery import checkpoint
from autoquant.delivery.manifest import MANIFEST
from autoquant.delivery.shards import names_of_files
from autoquant.errors import CheckpointError
from autoquant.files import move_whole, scratch_folder
from autoquant.runtime.prepare import prepare

_TAKEN = ("max_shard_size", "token")  # push_to_hub gives the first; it is ignored


def settle_loaded(model: Any, manifest: Mapping[str, Any]) -> nn.Module:
    """Settle a transformers model that has its quantized weights.

    Afterwards `save_pretrained` and `push_to_hub` write a folder that can be loaded again, and the
    model can be moved to another device and cast.

    Returns:
        The same model, changed in place.
    """
    from autoquant.delivery.integrations.quantizer import AutoquantConfig, AutoquantQuantizer

    config = AutoquantConfig(format_version=manifest["format_version"])
    model.config.quantization_config = config
    model.config.dtype = getattr(torch, manifest["dtype"])
    model.hf_quantizer = AutoquantQuantizer(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.save_pretrained = partial(_save, model, manifest)
    model._apply = partial(_apply, model, manifest)
    # transformers refuses these for quantized models; here, quantized weights keep their dtype.
    model.float = partial(_cast, model, torch.float32)
    model.half = partial(_cast, model, torch.float16)
    return cast(nn.Module, model)


def _save(
    model: Any,
    manifest: Mapping[str, Any],
    save_directory: str | os.PathLike[str],
    *,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """Write the model as `autoquant apply` does, for `autoquant.load` and `from_pretrained`.

    Raises:
        CheckpointError: An option is not supported, or the folder cannot be written.
    """
    if unknown := ", ".join(sorted(set(options) - set(_TAKEN))):
        raise CheckpointError(
            f"a model that autoquant quantized cannot be saved with {unknown}: leave it out"
        )
    folder = Path(save_directory)
    if is_main_process:
        with checkpoint.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_all(model, manifest, folder)
    if push_to_hub:
        model.push_to_hub(repo_id or folder.name, token=options.get("token"))


def _write_all(model: Any, manifest: Mapping[str, Any], folder: Path) -> None:
    """Write into a scratch folder first, so that a failure leaves the old files."""
    with scratch_folder(folder / MANIFEST) as scratch:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(scratch)
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        checkpoint.write_module(model, manifest, scratch)
        written = {path.name for path in scratch.iterdir()}
        # Without its manifest the folder is refused, so none is read that is half of another model.
        (folder / MANIFEST).unlink(missing_ok=True)
        there = names_of_files(path.name for path in folder.iterdir())
        for name in there - written:
            (folder / name).unlink()
        for name in (*sorted(written - {MANIFEST}), MANIFEST):
            move_whole(scratch / name, folder / name)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast all that is not quantized."""
    return model.to(dtype)


def _apply(
    model: Any, manifest: Mapping[str, Any], function: Callable[..., Any], recurse: bool = True
) -> Any:
    """Move or cast the model, and join its weights again after a move.

    Moving gives each weight its own memory, also those that are computed as one.
    """
    before = model.device
    type(model)._apply(model, function, recurse)
    if model.device != before and model.device.type != "meta":
        checkpoint.join_again(model, manifest)
        prepare(model)
    return model
