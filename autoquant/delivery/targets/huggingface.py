"""What targets share that are folders of transformers: which models, the configuration, reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.delivery.beside import check_beside, copy_beside, source_folder
from autoquant.delivery.targets.base import Contents
from autoquant.errors import CheckpointError, PlanError, first_line
from autoquant.files import read_json_object
from autoquant.models import LoadedModel, weights
from autoquant.models.factory import tied_names
from autoquant.models.loaded import settle
from autoquant.models.quiet import no_progress_bars, quiet, some
from autoquant.models.trust import Trust

_TIED = "tie_word_embeddings"


def check_folder_model(loaded: LoadedModel, target: str) -> None:
    """Refuse a model that is no language model of transformers, or whose files name it otherwise.

    Engines find weights by the names of the files, which transformers converts for some models.

    Raises:
        PlanError: It is one.
    """
    folder = source_folder(loaded)
    if loaded.kind != "causal_lm" or folder is None:
        raise PlanError(
            f"{target} is for language models of transformers with their config.json:"
            " `autoquant apply` writes this one"
        )
    files = weights.files(folder)
    if files[0].suffix != ".safetensors":
        return
    stored = set(weights.names(files))
    known = set(stored)
    for names in tied_names(loaded.module):
        if not stored.isdisjoint(names):
            known.update(names)
    if unknown := [name for name in loaded.module.state_dict() if name not in known]:
        raise PlanError(
            f"{folder} names its weights otherwise than transformers does in memory"
            f" ({some(unknown)} of the model are not in the files), and engines go by the names of"
            " the files: `autoquant apply` writes this one"
        )


def write_beside(contents: Contents, settings: Mapping[str, Any], folder: Path) -> None:
    """Write configuration, tokenizer and all else that lies beside the weights.

    Args:
        settings: The `quantization_config`.
    """
    loaded = contents.loaded
    copy_beside(loaded, folder)
    if loaded.source.tokenizer and loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    fields = read_json_object(path)
    fields.pop("torch_dtype", None)  # older name of `dtype`
    fields |= {"dtype": contents.dtype, "quantization_config": dict(settings)}
    if contents.unties:
        fields[_TIED] = False
        for part in fields.values():
            if isinstance(part, dict) and _TIED in part:
                part[_TIED] = False
    path.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def read_folder(folder: Path, loaded: LoadedModel, trust: Trust) -> nn.Module:
    """Return the model that transformers makes of a folder.

    Raises:
        CheckpointError: transformers cannot load it, or its tokenizer or settings are others.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), no_progress_bars():
            module = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, loaded.dtype),
                local_files_only=True,
                trust_remote_code=trust.trust_remote_code,
            )
    except Exception as error:  # what the readers of several libraries raise has no common base
        raise CheckpointError(
            f"transformers cannot load what was written ({first_line(error, with_type=True)});"
            " please report this"
        ) from error
    again = settle(module.to(loaded.device))
    check_beside(loaded, again, folder)
    return again
