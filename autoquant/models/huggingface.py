"""Load Hugging Face causal language models. Their own code only runs if the user trusts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.errors import ModelError, first_line
from autoquant.files import read_json_object
from autoquant.hints import did_you_mean_path
from autoquant.models import code, weights
from autoquant.models.content import DtypeTally, content_hash
from autoquant.models.factory import tied_names
from autoquant.models.identity import adapter_in, check_class, check_names, has_adapter, left_over
from autoquant.models.kinds import embedding_rows, model_kind
from autoquant.models.loaded import LoadedModel, max_positions, settle
from autoquant.models.names import is_computed, renamed, without_aliases
from autoquant.models.plausible import check_size
from autoquant.models.quiet import no_progress_bars, some
from autoquant.models.request import ModelRequest
from autoquant.models.targets import dtype_name, resolve_dtype
from autoquant.models.tokenizers import has_tokenizer, tokenizer_of

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_WRONG_CONFIG = "download or save the model again, with the config.json that belongs to it"
_TOKENIZER_ADVICE = "put the model's tokenizer there, or give one with --tokenizer FOLDER"
_DOWNLOADED = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
# Fields of config.json that change when a model is saved or moved without being another model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_folder(folder: Path, request: ModelRequest, path: str) -> LoadedModel:
    """Load a causal LM that `save_pretrained` wrote.

    Args:
        path: How the source names the model.

    Raises:
        TrustError: The model needs code that the folder brings, which is not trusted.
        ModelError: A file is missing, truncated or of another kind, or the model is no causal LM.
    """
    config = _read_config(folder)
    check_class(config, folder)
    _check_complete(folder, request)
    request = _with_checked_code(folder, request)
    files = weights.files(folder)
    if files[0].suffix == ".bin":
        return _from_state(weights.read_bins(files), config, folder, request, path, strict=False)
    tally = DtypeTally()
    check_names(config, weights.names(files), folder)
    architecture = _architecture(config, folder, trust_remote_code=request.trust_remote_code)
    digest = content_hash(tally.watch(weights.read_safetensors(files)), architecture)
    stored = _plain_dtype(tally, str(folder))
    words = tokenizer_of(request, folder)
    dtype = resolve_dtype(request.dtype, request.device, stored)
    module, left = _pretrained(folder, dtype, request.trust_remote_code)
    notes = []
    if left:
        computed = [
            name
            for name, value in weights.read_safetensors(files)
            if name in left and is_computed(name, value, module)
        ]
        if others := [name for name in left if name not in computed]:
            raise left_over(folder, folder, others, type(module).__name__)
        notes.append(_computed(folder, computed, module))
    return _finish(module, digest, stored, words, request, path, notes)


def load_beside(state: Mapping[str, Any], path: Path, request: ModelRequest) -> LoadedModel:
    """Load a state dict that was saved by hand beside the model's config.json.

    Raises:
        ModelError: The configuration is no causal LM's, the weights do not fit it, or there is no
            tokenizer.
    """
    config = _read_config(path.parent)
    check_class(config, path.parent)
    if not has_tokenizer(path.parent) and request.tokenizer is None:
        raise ModelError(f"{path.parent} has no tokenizer.json: {_TOKENIZER_ADVICE}")
    request = _with_checked_code(path.parent, request)
    return _from_state(state, config, path.parent, request, str(path), strict=True)


def has_config(folder: Path) -> bool:
    """Check whether the folder holds the configuration of a Hugging Face model."""
    try:
        return "model_type" in read_json_object(folder / _CONFIG)
    except (OSError, ValueError):
        return False


def _from_state(
    state: Mapping[str, Any],
    config: dict[str, Any],
    folder: Path,
    request: ModelRequest,
    path: str,
    *,
    strict: bool,
) -> LoadedModel:
    """Make the model that the configuration describes and put `state` into it.

    Args:
        path: How the source names the model: the file, or its folder.
        strict: Say that the weights are another model's if none of them has a place in it.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    check_size(folder, sum(value.numel() for value in tensors.values()), len(tensors))
    with torch.device("meta"):
        skeleton = from_config(folder, torch.float32, request.trust_remote_code)
    wanted = skeleton.state_dict()
    named = renamed(tensors, skeleton, getattr(skeleton, "base_model_prefix", ""))
    computed = [
        name
        for name, value in named.items()
        if name not in wanted and is_computed(name, value, skeleton)
    ]
    kept = {name: value for name, value in named.items() if name not in computed}
    own, different = without_aliases(kept, tied_names(skeleton))
    if different:
        raise ModelError(
            f"{folder / _CONFIG} ties {some(different)}, but they differ in {path}: set"
            " tie_word_embeddings to false there"
        )
    if strict and not any(name in wanted for name in own):
        raise ModelError(
            f"{path} has none of the weights of {type(skeleton).__name__}, which the config.json"
            " beside it describes: give --model-factory package.module:callable that returns the"
            " module that they are of, or its own config.json"
        )
    tally = DtypeTally()
    digest = content_hash(
        tally.watch(own.items()),
        _architecture(config, folder, trust_remote_code=request.trust_remote_code),
    )
    stored = _plain_dtype(tally, path)
    words = tokenizer_of(request, folder)
    module, left = _filled(
        skeleton, own, resolve_dtype(request.dtype, request.device, stored), folder, path
    )
    if left:
        raise left_over(path, folder, left, type(module).__name__)
    notes = [_computed(path, computed, module)] if computed else []
    return _finish(module, digest, stored, words, request, path, notes)


def _computed(place: str | Path, names: list[str], module: nn.Module) -> str:
    return f"left out of {place}: {some(names)}: {type(module).__name__} computes these itself"


def _finish(
    module: nn.Module,
    digest: str,
    stored: torch.dtype,
    words: Any,
    request: ModelRequest,
    path: str,
    notes: list[str],
) -> LoadedModel:
    module = settle(module.to(request.device))
    return LoadedModel(
        module=module,
        content_hash=digest,
        source=request.source("huggingface", path),
        tokenizer=words,
        kind=model_kind(module, request.device, may_be_lm=True),
        vocabulary=embedding_rows(module, request.device),
        example_inputs=None,
        max_positions=max_positions(module),
        stored_dtype=dtype_name(stored),
        notes=tuple(notes),
    )


def _with_checked_code(folder: Path, request: ModelRequest) -> ModelRequest:
    """Check what the folder names, and the hash of its code if that is trusted. Nothing is run."""
    code.check_folder(folder, trust_remote_code=request.trust_remote_code)
    if not request.trust_remote_code:
        return request
    others = [] if request.tokenizer is None else [Path(request.tokenizer).expanduser()]
    return code.with_checked_code(request, folder, *others)


def hash_as_saved(module: nn.Module) -> str | None:
    """Return the content's hash of a model as its folder has it, but with the module's weights.

    None if the module does not know its folder, or the folder has other names.
    """
    folder = Path(str(getattr(module, "name_or_path", "")))
    if not has_config(folder) or not (folder / weights.BEST).is_file():
        return None
    state, names = module.state_dict(), weights.names(weights.files(folder))
    if any(name not in state for name in names):
        return None
    architecture = _architecture(_read_config(folder), folder, trust_remote_code=False)
    return content_hash(((name, state[name]) for name in names), architecture)


def _architecture(
    config: dict[str, Any], folder: Path, *, trust_remote_code: bool
) -> dict[str, Any]:
    """Return what a model is beside its weights: its configuration, and code that is run."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    run = code.code_hash(folder) if trust_remote_code else ""
    return kept | {"code": run} if run else kept


def _plain_dtype(tally: DtypeTally, place: str) -> torch.dtype:
    stored = tally.main()
    if stored not in _PLAIN_DTYPES:
        form = "no floating-point weights" if stored is None else f"weights of {dtype_name(stored)}"
        raise ModelError(f"{place} holds {form}: give the model before it was quantized")
    return stored


def _check_complete(folder: Path, request: ModelRequest) -> None:
    """Refuse a folder that lacks weights or a tokenizer, and name everything that is missing."""
    lacks, advice = [], []
    if not weights.any_files(folder):
        lacks.append(weights.BEST)
        advice.append(_other_weights(folder))
    if not has_tokenizer(folder) and request.tokenizer is None:
        lacks.append("tokenizer.json")
        advice.append(_TOKENIZER_ADVICE)
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
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
        files_to_add = _CONFIG if has_tokenizer(folder) else f"{_CONFIG} and tokenizer.json"
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


def _pretrained(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[nn.Module, list[str]]:
    """Return the causal LM of a folder, and names of weights that it has no place for."""
    from transformers import AutoModelForCausalLM

    stored = weights.files(folder)
    if stored[0].suffix == ".safetensors":
        check_size(folder, *weights.counts(stored))

    def load(**options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **_attention_here(folder, trust_remote_code),
            **options,
        )

    return _loaded(load, dtype, folder, trust_remote_code=trust_remote_code)


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
    return _pretrained(folder, dtype or "auto", trust_remote_code)[0]


def check_served(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder that transformers should not read by itself.

    Raises:
        TrustError: It has code fetched from the hub, which is not trusted.
        ModelError: It names files of other folders, or a file of weights is damaged.
    """
    code.check_folder(folder, trust_remote_code=trust_remote_code)
    weights.files(folder)


def _filled(
    skeleton: nn.Module, state: Mapping[str, Any], dtype: torch.dtype, folder: Path, place: str
) -> tuple[nn.Module, list[str]]:
    """Return the same for a model filled with `state`, which came from `place`."""
    kind: Any = type(skeleton)

    def load(**options: Any) -> Any:
        return kind.from_pretrained(None, config=skeleton.config, state_dict=dict(state), **options)

    module, left = _loaded(load, dtype, place)
    give_generation_config(module, folder)
    return module, left


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
            f"transformers cannot load {place} as a causal language model: {first_line(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"transformers made no torch module of {place}: give a causal language model"
        )
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
    """Make the causal LM that the folder's `config.json` describes, with arbitrary weights.

    Raises:
        TrustError: It needs code that the folder brings, which is not trusted.
        ModelError: transformers knows no such causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    code.check_folder(folder, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        config = _attention_here(folder, trust_remote_code).get("config", config)
        # Without a word on it, transformers would ask at the terminal.
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        code.refuse_needed_code(folder, error, trust_remote_code)
        raise ModelError(
            f"transformers cannot build the model of {folder / _CONFIG} as a causal language model:"
            f" {first_line(error)}"
        ) from error
    give_generation_config(module, folder)
    return module


def _attention_here(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Return the configuration with PyTorch's own attention, if its own is not installed here."""
    from transformers import AutoConfig
    from transformers.utils import is_flash_attn_2_available

    fields = read_json_object(folder / _CONFIG)
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


def download(name: str, *, with_code: bool = False) -> Path:
    """Return a model's folder in the hub's cache; fetch the model first if needed.

    Args:
        with_code: Also fetch its Python files.

    Raises:
        ModelError: The hub cannot be reached, has no such model, or does not let this user have it.
    """
    from huggingface_hub import snapshot_download

    wanted = [*_DOWNLOADED, "*.py"] if with_code else _DOWNLOADED
    try:
        with no_progress_bars():
            folder = Path(snapshot_download(name, allow_patterns=wanted))
            if weights.any_files(folder):
                return folder
            return Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder here{did_you_mean_path(name)} nor a model that can be"
            f" fetched from the hub ({first_line(error)}): check the spelling and the network, or"
            " give a folder"
        ) from error
