"""Find and load tokenizers. Code that comes with them only runs if the user trusts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoquant.errors import ModelError, first_line
from autoquant.files import check_size
from autoquant.models.code import refuse_needed_code
from autoquant.models.plausible import check_labels
from autoquant.models.request import ModelRequest

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


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer from a folder or from a `tokenizer.json`.

    Raises:
        TrustError: It needs code that the folder brings, which is not trusted.
        ModelError: There is none, or transformers cannot read it.
    """
    place = Path(path).expanduser().absolute()
    if not place.exists() or (place.is_dir() and not has_tokenizer(place)):
        raise ModelError(
            f"there is no tokenizer at {path}: give a folder that holds a tokenizer.json, or that"
            " file"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_labels(place / "config.json")
    try:
        for file in place.glob("*.json") if place.is_dir() else [place]:
            check_size(file)
        if place.is_dir():
            words = AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:
            words = PreTrainedTokenizerFast(tokenizer_file=str(place))
        words("")  # settings of another type than they should have are found by use only
        return words
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        refuse_needed_code(place, error, trust_remote_code)
        wrong = _unreadable_config(place) or f"the tokenizer {place}"
        raise ModelError(
            f"cannot read {wrong} ({first_line(error)}): download or save it again"
        ) from error


def _unreadable_config(place: Path) -> Path | None:
    """Return the `config.json` of a folder if that cannot be read: tokenizers look into it, too."""
    from transformers import AutoConfig

    path = place / "config.json"
    if not path.is_file():
        return None
    try:
        AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception:  # noqa: BLE001 - whatever is wrong with it
        return path
    return None


def tokenizer_of(request: ModelRequest, own: Path | None = None) -> Any:
    """Return the tokenizer that the user named, else that of the model's own folder, or None.

    Raises:
        ModelError: As for `load_tokenizer`.
    """
    place = request.tokenizer if request.tokenizer is not None else own
    if place is None:
        return None
    return load_tokenizer(str(place), trust_remote_code=request.trust_remote_code)
