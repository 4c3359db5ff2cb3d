"""Check that a Hugging Face folder is the causal language model that it would be loaded as.

transformers makes a causal language model of many a folder that holds something else: with tied
embeddings no weight is missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from autoquant.errors import ModelError
from autoquant.models.quiet import some

_EMBEDDER = "modules.json"
_ADAPTER = "adapter_config.json"


def own_loss(place: str | Path, name: str) -> str:
    """Say how to search a model that is no causal language model.

    Args:
        place: Its folder or file.
        name: Its class.
    """
    return (
        f"search it by a loss of your own, `autoquant search {shlex.quote(str(place))}"
        " --model-factory my_code:build --sample-inputs my_code:inputs --quality my_code:loss`,"
        f" where build returns the {name}"
    )


def check_class(config: Mapping[str, Any], folder: Path) -> None:
    """Check that the class that `config.json` names is the one that would be loaded.

    A class that comes with code of its own is left to the loader.

    Raises:
        ModelError: It is another one, or the folder holds a sentence embedder or an adapter.
    """
    if has_adapter(folder):
        raise ModelError(adapter_in(folder))
    import transformers

    named, loaded = _named(config), _causal_class(config)
    name = named[0] if named else f"model of type {config['model_type']}"
    if (folder / _EMBEDDER).is_file():
        raise ModelError(
            f"{folder} holds a sentence embedder ({_EMBEDDER}), not a causal language model:"
            f" {own_loss(folder, name)}"
        )
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}) and loaded not in named:
        return
    if loaded in named or (loaded and not named):
        return
    if named and not hasattr(transformers, name) and loaded:
        raise ModelError(
            f"{folder} holds a {name} (architectures in its config.json), which transformers does"
            f" not know: if it is a {loaded}, write that there instead, or else"
            f" {own_loss(folder, name)}"
        )
    raise ModelError(
        f"{folder} holds a {name} (see its config.json), not a causal language model:"
        f" {own_loss(folder, name)}"
    )


def check_names(config: Mapping[str, Any], names: Collection[str], folder: Path) -> None:
    """Check that weights whose class is not named are not those of a model without a head.

    Raises:
        ModelError: They are: with tied embeddings, any head would do.
    """
    import transformers

    loaded = _causal_class(config)
    base = getattr(getattr(transformers, loaded or "", None), "base_model_prefix", "")
    if _named(config) or not base or any(name.startswith(f"{base}.") for name in names):
        return
    raise ModelError(
        f"the weights in {folder} are those of a bare model, without a head, and its config.json"
        f" names no class: if it is a {loaded}, write that into architectures there, or else"
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


def _named(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures") or []
    return [str(name) for name in named] if isinstance(named, list) else [str(named)]


def _causal_class(config: Mapping[str, Any]) -> str | None:
    """Return the class that transformers has for a causal language model of this type, or None."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config["model_type"]))
    return None if found is None else str(found)
