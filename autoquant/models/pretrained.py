"""Have transformers make the module of a folder. The folder's code only runs if it is trusted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.files import read_json_object
from autoquant.models import code, weights
from autoquant.models.families import CAUSAL_LM, class_names, family_of
from autoquant.models.folder import CONFIG
from autoquant.models.plausible import check_size
from autoquant.models.quiet import no_progress_bars, quiet, some

_GENERATION_CONFIG = "generation_config.json"
_WRONG_CONFIG = "download or save the model again, with the config.json that belongs to it"


def pretrained(
    folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool = False
) -> nn.Module:
    """Return the unquantized model of a folder, on the CPU.

    Args:
        dtype: None for the one that `config.json` names, or the weights have.

    Raises:
        TrustError: The model needs code that the folder brings, which is not trusted.
        ModelError: transformers cannot load it, or weights are missing.
    """
    check_served(folder, trust_remote_code=trust_remote_code)
    return made(folder, dtype or "auto", trust_remote_code)[0]


def auto_class(folder: Path) -> Any:
    """Return the class of transformers that makes the model of a folder from its `config.json`."""
    import transformers

    family = family_of(read_json_object(folder / CONFIG), folder) or CAUSAL_LM
    return getattr(transformers, family.auto)


def _without_pooler(folder: Path) -> dict[str, bool]:
    """Return how to leave out the pooler of a bare model whose folder has no weights for it.

    Sentence embedders are often saved so: they read the last hidden states.
    """
    import transformers

    config = read_json_object(folder / CONFIG)
    family = family_of(config, folder)
    if family is None or family.judged_by != "vectors":
        return {}
    files = weights.files(folder) if weights.any_files(folder) else []
    if not files or files[0].suffix != ".safetensors":
        return {}
    names = weights.names(files)
    (model, *_) = (*class_names(family, str(config.get("model_type"))), "")
    takes = signature(getattr(transformers, model, dict.__init__)).parameters
    lacks = "add_pooling_layer" in takes and not any("pooler." in name for name in names)
    return {"add_pooling_layer": False} if lacks else {}


def check_served(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder that transformers should not read by itself.

    Raises:
        TrustError: It has code fetched from the hub, which is not trusted.
        ModelError: It names files of other folders, a file of weights is damaged, or what
            quantized it is unknown.
    """
    code.check_folder(folder, trust_remote_code=trust_remote_code)
    weights.files(folder)
    _check_quantizer(folder)


def _check_quantizer(folder: Path) -> None:
    """Refuse a quantized model that transformers would load as if it were not."""
    from transformers.quantizers.auto import AutoHfQuantizer

    with quiet(), suppress(OSError, ValueError, TypeError):  # the loader reports these
        settings = read_json_object(folder / CONFIG).get("quantization_config")
        if isinstance(settings, dict) and not AutoHfQuantizer.supports_quant_method(settings):
            raise ModelError(
                f"{folder / CONFIG} says that the weights are quantized by"
                f" {settings['quant_method']!r}, which transformers does not know and would leave"
                " out: give the model before it was quantized, or take quantization_config out if"
                " its weights are plain"
            )


def made(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[nn.Module, list[str]]:
    """Return the model of a folder, and names of weights that it has no place for."""
    stored = weights.files(folder)
    integers: list[str] = []
    if stored[0].suffix == ".safetensors":
        check_size(folder, *weights.counts(stored))
        integers = weights.integers(stored)

    loader = auto_class(folder)

    def load(**options: Any) -> Any:
        return loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **_attention_here(folder, trust_remote_code),
            **_without_pooler(folder),
            **options,
        )

    module, left = _loaded(load, dtype, folder, trust_remote_code=trust_remote_code)
    _check_floats(module, integers, folder)
    return module, left


def filled(
    skeleton: nn.Module, state: Mapping[str, Any], dtype: torch.dtype, folder: Path, place: str
) -> tuple[nn.Module, list[str]]:
    """Return the same for a model filled with `state`, which came from `place`."""
    kind: Any = type(skeleton)

    def load(**options: Any) -> Any:
        return kind.from_pretrained(None, config=skeleton.config, state_dict=dict(state), **options)

    module, left = _loaded(load, dtype, place)
    _check_floats(module, [name for name in state if not state[name].is_floating_point()], place)
    give_generation_config(module, folder)
    return module, left


def _check_floats(module: nn.Module, integers: Collection[str], place: str | Path) -> None:
    """Refuse integers that transformers took for floating-point weights of the same value.

    Args:
        integers: Names of the tensors that are stored as integers.
    """
    if getattr(module, "hf_quantizer", None) is not None:  # which may unpack them
        return
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in integers and parameter.is_floating_point():
            raise ModelError(
                f"{place} has integers for {name}, which are no weights: download or save the"
                " model again, or give it before it was quantized"
            )


def _loaded(
    load: Callable[..., Any],
    dtype: torch.dtype | str,
    place: str | Path,
    *,
    trust_remote_code: bool = True,
) -> tuple[nn.Module, list[str]]:
    """Return what `load` makes, and the names of weights that it has no place for.

    Args:
        trust_remote_code: False if the folder at `place` might need code that `load` does not run.
    """
    try:
        with no_progress_bars():
            module, report = load(
                dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        code.refuse_needed_code(Path(place), error, trust_remote_code)
        raise ModelError(
            f"transformers cannot load {place} as the model of its config.json:"
            f" {_reason(error, Path(place))}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"transformers made no torch module of {place}: give a model of PyTorch")
    name = type(module).__name__
    if mismatched := sorted(report["mismatched_keys"]):
        key, stored, wanted = mismatched[0]
        raise ModelError(
            f"{place} has {key} of {list(stored)}, {name} of its config.json {list(wanted)}:"
            f" {_WRONG_CONFIG}"
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"the weights in {place} lack {some(missing)} of {name}: {_WRONG_CONFIG}")
    return module, sorted(report["unexpected_keys"])


def from_config(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """Make the model that the folder's `config.json` describes, with arbitrary weights.

    Raises:
        TrustError: It needs code that the folder brings, which is not trusted.
        ModelError: transformers knows no such model.
    """
    from transformers import AutoConfig

    code.check_folder(folder, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        config = _attention_here(folder, trust_remote_code).get("config", config)
        # Without a word on it, transformers would ask at the terminal.
        module: nn.Module = auto_class(folder).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **_without_pooler(folder)
        )
    except Exception as error:
        code.refuse_needed_code(folder, error, trust_remote_code)
        raise ModelError(
            f"transformers cannot build the model of {folder / CONFIG}: {_reason(error, folder)}"
        ) from error
    give_generation_config(module, folder)
    return module


def _reason(error: Exception, folder: Path) -> str:
    """Return why transformers makes no model, with the field that names what it lacks."""
    if isinstance(error, KeyError):
        with suppress(OSError, ValueError):
            for field, value in read_json_object(folder / CONFIG).items():
                if error.args == (value,):
                    return (
                        f"{CONFIG} has {value!r} for {field}, which transformers does not know:"
                        " correct it there, or update transformers"
                    )
    return first_line(error)


def _attention_here(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return the configuration with PyTorch's own attention, if its own is not installed here."""
    from transformers import AutoConfig
    from transformers.utils import is_flash_attn_2_available

    fields = read_json_object(folder / CONFIG)
    asked = [str(fields.get(name)) for name in ("attn_implementation", "_attn_implementation")]
    if is_flash_attn_2_available() or not any(name.startswith("flash") for name in asked):
        return {}
    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )
    config._attn_implementation = "sdpa"
    return {"config": config}


def give_generation_config(module: nn.Module, folder: Path) -> None:
    """Give the model the folder's `generation_config.json`, if there is one."""
    from transformers import GenerationConfig

    path = folder / _GENERATION_CONFIG
    if not path.is_file():
        return
    try:
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"cannot read {path} ({first_line(error)}): download or save it again"
        ) from error
