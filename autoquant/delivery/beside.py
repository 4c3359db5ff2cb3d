"""Keep what lies beside the weights of a model: configuration, tokenizer, templates, processors.

A list of the files that matter would miss the next one. So everything is copied but weights, what
training leaves, and databases.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from autoquant.errors import CheckpointError
from autoquant.models import LoadedModel
from autoquant.models.families import EMBEDDER_FILE
from autoquant.models.folder import has_config
from autoquant.models.hub import download
from autoquant.models.tokenizers import load_tokenizer

_FOLDERS = ("additional_chat_templates",)
_LEFT_OUT = (
    ".*",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pt2",
    "*.ckpt",
    "*.gguf",
    "*.onnx*",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.index.json",
    "*.pyc",
    "*.db*",
    "*.sqlite*",
    "*.log",
    "*.tfevents*",
    "trainer_state.json",
    "autoquant.json",
)
_CODE = ("*.py",)
_CONFIGURATION = ("config.json", "generation_config.json", "*processor*config.json")
_TOKENIZER = (
    "*token*",
    "vocab*",
    "merges*",
    "chat_template*",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*",
)
_MODULE_FOLDER = re.compile(r"\d+_\w+")
_LARGEST_UNKNOWN_BYTES = 64 << 20
_LINE = "A line, 行, of 123 words; then\n\n\ttwo  more."


def copy_beside(loaded: LoadedModel, folder: Path) -> bool:
    """Copy everything of a Hugging Face model but its weights.

    The files of its tokenizer are left out if the user gave another one. Of files beside a single
    file of weights, only those with known names are copied: others may be anything.

    Returns:
        Whether the model is one of transformers, so that there was something to copy.
    """
    source = source_folder(loaded)
    if source is None:
        return False
    is_folder = not Path(loaded.source.path).is_file()
    left_out = (
        *_LEFT_OUT,
        *(() if loaded.source.tokenizer is None else _TOKENIZER),
        *(() if loaded.source.trust_remote_code else _CODE),
    )
    for path in _files(source):
        name = path.relative_to(source)
        known = _matches(name, (*_CONFIGURATION, *_TOKENIZER))
        small = is_folder and path.stat().st_size <= _LARGEST_UNKNOWN_BYTES
        of_module = small and _MODULE_FOLDER.fullmatch(name.parts[0]) is not None
        if of_module or ((known or small) and not _matches(name, left_out)):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    return True


def source_folder(loaded: LoadedModel) -> Path | None:
    """Return the Hugging Face folder that a model came from, or None."""
    if loaded.source.kind not in ("huggingface", "state_dict"):
        return None
    path = Path(loaded.source.path)
    if not path.exists():
        return download(loaded.source.path)
    here = path.parent if path.is_file() else path
    return here if has_config(here) else None


def _matches(name: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(str(name), pattern) for pattern in patterns)


def module_folders(source: Path) -> list[str]:
    """Return the folders of a sentence embedder's further modules, such as `1_Pooling`."""
    with suppress(OSError, ValueError):
        listed = json.loads((source / EMBEDDER_FILE).read_text(encoding="utf-8"))
        names = [str(each.get("path", "")) for each in listed if isinstance(each, dict)]
        return [name for name in names if _MODULE_FOLDER.fullmatch(name)]
    return []


def _files(source: Path) -> Iterator[Path]:
    for place in (source, *(source / name for name in (*_FOLDERS, *module_folders(source)))):
        if place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if path.is_file())


def check_beside(loaded: LoadedModel, again: nn.Module, folder: Path) -> None:
    """Check that tokenizer and generation settings of a copy are those of its source.

    Raises:
        CheckpointError: One differs; the message says which.
    """
    differ = []
    if loaded.tokenizer is not None and _is_saved(loaded):
        before, after = _tokens(loaded.tokenizer), _tokens(load_tokenizer(str(folder)))
        differ += [name for name in before if before[name] != after.get(name)]
    before, after = _generation(loaded.module), _generation(again)
    differ += [name for name in before | after if before.get(name) != after.get(name)]
    if differ:
        raise CheckpointError(
            f"the copy in {folder} has other tokens or generation settings than the model"
            f" ({', '.join(differ)}); please report this"
        )


def _is_saved(loaded: LoadedModel) -> bool:
    return source_folder(loaded) is not None or loaded.source.tokenizer is not None


def _tokens(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer makes of a line with all its special tokens, and its templates."""
    special = list(getattr(tokenizer, "all_special_tokens", []))
    added = list(getattr(tokenizer, "get_added_vocab", dict)())
    line = _LINE + " ".join(dict.fromkeys([*special, *added]))
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "padding_side")
    facts = {name: getattr(tokenizer, name, None) for name in names}
    return facts | {"token ids": list(tokenizer(line, verbose=False)["input_ids"])}


def _generation(module: nn.Module) -> dict[str, Any]:
    settings: Any = getattr(module, "generation_config", None)
    fields: dict[str, Any] = settings.to_dict() if hasattr(settings, "to_dict") else {}
    fields.pop("transformers_version", None)
    # False and None mean the same there: which of them it is depends on how the model was made.
    return {name: value for name, value in fields.items() if value not in (None, False)}
