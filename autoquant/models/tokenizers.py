"""Find and load tokenizers; never run code that comes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoquant.errors import ModelError, first_line
from autoquant.files import check_size

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)


def has_tokenizer(folder: Path) -> bool:
    """Check whether the folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES) or any(
        folder.glob("*.tiktoken")
    )


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer from a folder or from a `tokenizer.json`.

    Raises:
        ModelError: There is none, or transformers cannot read it.
    """
    place = Path(path).expanduser().absolute()
    if not place.exists() or (place.is_dir() and not has_tokenizer(place)):
        raise ModelError(
            f"there is no tokenizer at {path}: give a folder that holds a tokenizer.json, or that"
            " file"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        for file in place.glob("*.json") if place.is_dir() else [place]:
            check_size(file)
        if place.is_dir():
            return AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        return PreTrainedTokenizerFast(tokenizer_file=str(place))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise ModelError(
            f"cannot read the tokenizer {place} ({first_line(error)}): download or save it again"
        ) from error
