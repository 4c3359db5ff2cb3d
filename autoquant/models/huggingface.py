"""Load models of Hugging Face. Their own code only runs if the user trusts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.devices import backend
from autoquant.errors import ModelError
from autoquant.models import code, weights
from autoquant.models.content import DtypeTally, content_hash
from autoquant.models.factory import tied_names
from autoquant.models.families import CAUSAL_LM, Family
from autoquant.models.fitting import fits
from autoquant.models.folder import (
    CONFIG,
    TOKENIZER_ADVICE,
    check_complete,
    has_config,
    read_config,
)
from autoquant.models.identity import check_class, check_names, left_over
from autoquant.models.kinds import embedding_rows, model_kind
from autoquant.models.loaded import LoadedModel, is_encoder_decoder, max_positions, settle
from autoquant.models.names import is_computed, renamed, without_aliases
from autoquant.models.outputs import CHECK_TOKENS
from autoquant.models.placing import moved
from autoquant.models.plausible import check_size
from autoquant.models.pretrained import filled, from_config, made
from autoquant.models.quiet import some
from autoquant.models.reader import Reader, on
from autoquant.models.remembered import FileDigests
from autoquant.models.request import ModelRequest
from autoquant.models.shown import show_linears
from autoquant.models.stand_in import largest_plan_bytes
from autoquant.models.streaming import Stream
from autoquant.models.targets import dtype_name, resolve_dtype
from autoquant.models.tokenizers import has_tokenizer, tokenizer_of
from autoquant.models.weights import tensors_of

# Fields of config.json that change when a model is saved or moved without being another model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_MOST_OF_HEADS = 16
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_folder(folder: Path, request: ModelRequest, path: str) -> LoadedModel:
    """Load a model that `save_pretrained` wrote.

    Args:
        path: How the source names the model.

    Raises:
        TrustError: The model needs code that the folder brings, which is not trusted.
        ModelError: A file is missing, truncated or of another kind, or the model is of a kind that
            is not known.
    """
    config = read_config(folder)
    family = check_class(config, folder)
    check_complete(folder, request, tokenizer=family.needs_tokenizer)
    request = _with_checked_code(folder, request)
    files = weights.files(folder)
    digests = FileDigests(files)
    if files[0].suffix == ".bin":
        state = weights.read_bins(files)
        return _from_state(state, config, folder, request, path, digests, strict=False)
    tally = DtypeTally()
    check_names(config, weights.names(files), folder)
    architecture = _architecture(config, folder, trust_remote_code=request.trust_remote_code)
    # Mapped, not read: the largest come first, so that no thread has one left in the end.
    tensors = digests.watch(tally.watch(weights.read_safetensors(files)))
    tensors.sort(key=lambda item: item[1].nbytes, reverse=True)
    digest = digests.content_hash(tensors, architecture)
    stored = _plain_dtype(tally, str(folder))
    words = _tokenizer(request, folder)
    dtype = resolve_dtype(request.dtype, request.device, stored)
    streamed = not fits(*_sizes(files, dtype), request.device)
    if streamed:
        _check_in_place(folder, dtype, stored, request)
    module, left = made(folder, dtype, request.trust_remote_code)
    notes = []
    if left:
        computed = [
            name
            for name, value in weights.read_safetensors(files)
            if name in left and is_computed(name, value, module)
        ]
        others = [name for name in left if name not in computed]
        notes += _left_notes(folder, folder, others, module, family)
        if computed:
            notes.append(_computed(folder, computed, module))
    made_by = _Made(folder, family, request, path)
    return made_by.finish(module, digest, stored, words, notes, streamed=streamed)


def _sizes(files: list[Path], dtype: torch.dtype) -> tuple[int, int]:
    """Return the elements of the weights, and their bytes in a dtype."""
    elements, _ = weights.counts(files)
    return elements, elements * dtype.itemsize


def _check_in_place(
    folder: Path, dtype: torch.dtype, stored: torch.dtype, request: ModelRequest
) -> None:
    """Refuse a cast of weights that there is no room for.

    Raises:
        ModelError: The weights are stored in another dtype.
    """
    if dtype == stored:
        return
    raise ModelError(
        f"{folder} does not fit into the memory of {request.device} with room to search it, and is"
        f" then read in place, as {dtype_name(stored)}: leave out --dtype, or save it in"
        f" {dtype_name(dtype)} first"
    )


def load_beside(
    state: Mapping[str, Any], path: Path, request: ModelRequest, digests: FileDigests
) -> LoadedModel:
    """Load a state dict that was saved by hand beside the model's config.json.

    Args:
        digests: Of the file that `state` was read from.

    Raises:
        ModelError: The configuration is no causal LM's, the weights do not fit it, or there is no
            tokenizer.
    """
    config = read_config(path.parent)
    family = check_class(config, path.parent)
    if family.needs_tokenizer and not has_tokenizer(path.parent) and request.tokenizer is None:
        raise ModelError(f"{path.parent} has no tokenizer.json: {TOKENIZER_ADVICE}")
    request = _with_checked_code(path.parent, request)
    return _from_state(state, config, path.parent, request, str(path), digests, strict=True)


def _from_state(
    state: Mapping[str, Any],
    config: dict[str, Any],
    folder: Path,
    request: ModelRequest,
    path: str,
    digests: FileDigests,
    *,
    strict: bool,
) -> LoadedModel:
    """Make the model that the configuration describes and put `state` into it.

    Args:
        path: How the source names the model: the file, or its folder.
        strict: Say that the weights are another model's if none of them has a place in it.
    """
    tensors = dict(digests.watch(tensors_of(state)))
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
            f"{folder / CONFIG} ties {some(different)}, but they differ in {path}: set"
            " tie_word_embeddings to false there"
        )
    if strict and not any(name in wanted for name in own):
        raise ModelError(
            f"{path} has none of the weights of {type(skeleton).__name__}, which the config.json"
            " beside it describes: give --model-factory package.module:callable that returns the"
            " module that they are of, or its own config.json"
        )
    tally = DtypeTally()
    digest = digests.content_hash(
        tally.watch(own.items()),
        _architecture(config, folder, trust_remote_code=request.trust_remote_code),
    )
    stored = _plain_dtype(tally, path)
    words = _tokenizer(request, folder)
    module, left = filled(
        skeleton, own, resolve_dtype(request.dtype, request.device, stored), folder, path
    )
    family = check_class(config, folder)
    notes = _left_notes(path, folder, left, module, family)
    notes += [_computed(path, computed, module)] if computed else []
    return _Made(folder, family, request, path).finish(module, digest, stored, words, notes)


def _computed(place: str | Path, names: list[str], module: nn.Module) -> str:
    return f"left out of {place}: {some(names)}: {type(module).__name__} computes these itself"


def _left_notes(
    place: str | Path, folder: Path, names: list[str], module: nn.Module, family: Family
) -> list[str]:
    """Return a note on weights that a model has no place for: those of heads of another task.

    Raises:
        ModelError: They are of another model.
    """
    if not names:
        return []
    base = f"{getattr(module, 'base_model_prefix', '')}."
    inner = [name for name in names if name.startswith(base) and "pooler." not in name]
    if (
        family is CAUSAL_LM
        or inner
        or (family.judged_by == "vectors" and len(names) > _MOST_OF_HEADS)
    ):
        raise left_over(place, folder, names, type(module).__name__)
    return [f"left out of {place}: {some(names)}: {type(module).__name__} has no place for these"]


def _tokenizer(request: ModelRequest, folder: Path) -> Any:
    """Return the tokenizer of a folder, or None if it has none, which was found to be right."""
    if request.tokenizer is None and not has_tokenizer(folder):
        return None
    return tokenizer_of(request, folder)


@dataclass(frozen=True, slots=True)
class _Made:
    """Where a module was made from.

    Attributes:
        path: How the source names it.
    """

    folder: Path
    family: Family
    request: ModelRequest
    path: str

    def finish(
        self,
        module: nn.Module,
        digest: str,
        stored: torch.dtype,
        words: Any,
        notes: list[str],
        *,
        streamed: bool = False,
    ) -> LoadedModel:
        request = self.request
        settle(module)
        if streamed:
            stream = Stream(module, request.device)
            if (room_bytes := backend(request.device).room_bytes()) is not None:
                stream.most_plan_bytes = largest_plan_bytes(stream, room_bytes)
        else:
            moved(module, request.device)
        show_linears(module)
        reader, inputs = None, None
        if self.family.judged_by == "perplexity":
            kind = model_kind(module, request.device, may_be_lm=True)
            positions = max_positions(module)
        else:
            kind = "encoder_decoder" if is_encoder_decoder(module) else "module"
            if request.sample_inputs is None or kind == "encoder_decoder":
                reader = Reader(module, self.folder, words)
                inputs = on(reader.made_up(0, 1, CHECK_TOKENS), request.device)
            positions = None if reader is None else reader.max_tokens
        return LoadedModel(
            module=module,
            content_hash=digest,
            source=request.source("huggingface", self.path),
            tokenizer=words,
            kind=kind,
            vocabulary=embedding_rows(module, request.device),
            example_inputs=inputs,
            max_positions=positions,
            stored_dtype=dtype_name(stored),
            notes=tuple(notes),
            family=self.family,
            reader=reader,
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
    architecture = _architecture(read_config(folder), folder, trust_remote_code=False)
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
