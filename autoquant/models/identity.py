"""Check that a Hugging Face folder is the model that it would be loaded as.

transformers makes a causal language model of many a folder that holds something else: with tied
embeddings no weight is missing. So the class that its configuration names decides.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from autoquant.errors import ModelError
from autoquant.models.families import (
    CAUSAL_LM,
    EMBEDDER_FILE,
    Family,
    class_names,
    family_of,
    named_classes,
)
from autoquant.models.quiet import some

_ADAPTER = "adapter_config.json"


def own_loss(place: str | Path, name: str) -> str:
    """Say how to search a model of no kind that is loaded without code.

    Args:
        place: Its folder or file.
        name: Its class.
    """
    return (
        f"search it by a loss of your own, `autoquant search {shlex.quote(str(place))}"
        " --model-factory my_code:build --sample-inputs my_code:inputs --quality my_code:loss`,"
        f" where build returns the {name}"
    )


def check_class(config: Mapping[str, Any], folder: Path) -> Family:
    """Return the family of what a folder holds, by the class that its `config.json` names.

    Raises:
        ModelError: It is of none that can be loaded, or the folder holds an adapter.
    """
    if has_adapter(folder):
        raise ModelError(adapter_in(folder))
    family = family_of(config, folder)
    if family is not None:
        return family
    import transformers

    named, causal = named_classes(config), class_names(CAUSAL_LM, str(config["model_type"]))
    name = named[0] if named else f"model of type {config['model_type']}"
    if named and not hasattr(transformers, name) and causal:
        raise ModelError(
            f"{folder} holds a {name} (architectures in its config.json), which transformers does"
            f" not know: if it is a {causal[0]}, write that there instead, or else"
            f" {own_loss(folder, name)}"
        )
    raise ModelError(
        f"{folder} holds a {name} (see its config.json), which is of no kind that is loaded without"
        f" code of yours: {own_loss(folder, name)}"
    )


def check_names(config: Mapping[str, Any], names: Collection[str], folder: Path) -> None:
    """Check that weights whose class is not named are not those of a model without a head.

    Raises:
        ModelError: They are: with tied embeddings, any head would do.
    """
    import transformers

    causal = [*class_names(CAUSAL_LM, str(config["model_type"])), ""][0]
    base = getattr(getattr(transformers, causal, None), "base_model_prefix", "")
    if (
        named_classes(config)
        or (folder / EMBEDDER_FILE).is_file()
        or not base
        or any(name.startswith(f"{base}.") for name in names)
    ):
        return
    raise ModelError(
        f"the weights in {folder} are those of a bare model, without a head, and its config.json"
        f" names no class: if it is a {causal}, write that into architectures there, or else"
        f" {own_loss(folder, 'bare model')}"
    )


def left_over(place: str | Path, folder: Path, names: Iterable[str], name: str) -> ModelError:
    """Make the error for weights that a model of class `name` has no place for."""
    return ModelError(
        f"{place} has {some(list(names))}, which {name} of its config.json does not, so it is"
        f" another model: give the config.json that belongs to it, or {own_loss(folder, 'module')}"
    )


def adapter_in(folder: Path) -> str:
    """Say what to do with a folder that holds an adapter."""
    return (
        f"{folder} holds an adapter ({_ADAPTER}), which is trained beside a model: merge the two,"
        " model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
    )


def has_adapter(folder: Path) -> bool:
    """Check whether the folder holds an adapter of PEFT."""
    return (folder / _ADAPTER).is_file()
