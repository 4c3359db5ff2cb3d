"""Teach a loaded transformers model to save itself, and to stay whole when it is moved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autoquant.errors import CheckpointError
from autoquant.export import checkpoint
from autoquant.export.kernel_check import check_kernels
from autoquant.runtime.prepare import prepare

_TAKEN = ("max_shard_size", "token")  # push_to_hub gives the first; it is ignored


def settle_loaded(model: Any, manifest: Mapping[str, Any]) -> nn.Module:
    """Settle a transformers model that has its quantized weights; prepare it and check its kernels.

    Afterwards `save_pretrained` and `push_to_hub` write a folder that can be loaded again, and the
    model can be moved to another device.

    Returns:
        The same model, changed in place.

    Raises:
        KernelError: A kernel computes something else here than its weight stores.
    """
    from autoquant.export.integrations.quantizer import AutoquantConfig, AutoquantQuantizer

    config = AutoquantConfig(format_version=manifest["format_version"])
    model.config.quantization_config = config
    model.config.dtype = getattr(torch, manifest["dtype"])
    model.hf_quantizer = AutoquantQuantizer(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.save_pretrained = partial(_save, model, manifest)
    model._apply = partial(_apply, model, manifest)
    check_kernels(prepare(model))
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_all(model, manifest, folder)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    if push_to_hub:
        model.push_to_hub(repo_id or folder.name, token=options.get("token"))


def _write_all(model: Any, manifest: Mapping[str, Any], folder: Path) -> None:
    """Write into a scratch folder first, so that a failure leaves the old files."""
    scratch = Path(tempfile.mkdtemp(prefix=".saving.", dir=folder))
    try:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(scratch)
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        checkpoint.write_module(model, manifest, scratch)
        written = list(scratch.iterdir())
        for path in written:
            os.replace(path, folder / path.name)
        if checkpoint.PACKED not in {path.name for path in written}:
            (folder / checkpoint.PACKED).unlink(missing_ok=True)  # of an earlier model
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
