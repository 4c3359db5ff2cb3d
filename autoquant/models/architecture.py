"""Make a model's module without its weights, to put saved ones into it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError
from autoquant.models import factory, pretrained
from autoquant.models.quiet import current_folder_importable, quiet
from autoquant.models.trust import NO_TRUST, Trust, named_factory


def build_architecture(
    source: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype,
    *,
    meta: bool,
    trust: Trust = NO_TRUST,
) -> nn.Module:
    """Make the module that a source describes, with arbitrary weights.

    Args:
        source: A `ModelSource` as a mapping.
        folder: Holds the `config.json` of a Hugging Face model.
        meta: Make it on the meta device, where it takes no memory.
        trust: The code that the user named, instead of the source's.

    Raises:
        TrustError: It is made by code that the user did not name.
        ModelError: It cannot be made from what is there.
    """
    place = torch.device("meta") if meta else nullcontext()
    if source["kind"] == "huggingface":
        with quiet(), place:
            return pretrained.from_config(folder, dtype, trust.trust_remote_code)
    if source["kind"] == "state_dict" and source.get("model_factory"):
        spec = named_factory(source, trust)
        with current_folder_importable(), place:
            return factory._call(factory.factory_of(spec), spec)
    raise ModelError(
        f"the architecture of a model that came as {source['kind']} is not saved with it: call"
        " autoquant.load(folder, model) with a module of it"
    )


def without_values(module: nn.Module) -> bool:
    """Check whether any tensor of the module is still on the meta device."""
    return factory._on_meta(module)
