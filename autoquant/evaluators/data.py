"""Evaluation text from the `datasets` library: a local file or folder, or a name on the hub.

Rows are streamed, and only as many as are asked for. Code that comes with a dataset never runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autoquant.errors import TextError, first_line
from autoquant.evaluators.reading import check_lines, row_pieces
from autoquant.hints import did_you_mean, did_you_mean_path

GRAMMAR = "NAME[:CONFIG][:SPLIT][:COLUMN]"
_READERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
    ".md": ("text", {}),
}
_LINES = ("json", "csv", "text")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLITS = ("test", "validation", "train")
_COLUMNS = ("text", "content", "messages")
_PIECE_CHARACTERS = 20_000
_HUB_TIMEOUT_S = 10.0
_SHUFFLED_ROWS = 5000
Kind = TypeVar("Kind", bound=str)


@dataclass(frozen=True, slots=True)
class DataName:
    """A dataset as users write it, `NAME[:CONFIG][:SPLIT][:COLUMN]`.

    Attributes:
        place: Path of a file or folder, or a name on the hub.
        parts: The rest, in order. A part that is left out or empty takes its default.
    """

    place: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, name: str) -> DataName:
        """Parse a name. The place is the longest prefix that is a path, or ends at a colon."""
        words = name.split(":")
        for count in range(len(words), 0, -1):
            if Path(":".join(words[:count])).expanduser().exists():
                return cls(":".join(words[:count]), tuple(words[count:]))
        return cls(words[0], tuple(words[1:]))

    @property
    def path(self) -> Path:
        return Path(self.place).expanduser()

    @property
    def is_local(self) -> bool:
        return bool(self.place) and self.path.exists()

    def __str__(self) -> str:
        return ":".join((self.place, *self.parts))

    def absolute(self) -> str:
        """Return the name with an absolute path, so that it works from any folder."""
        place = str(self.path.resolve()) if self.is_local else self.place
        return str(DataName(place, self.parts))


def check_data(name: str) -> None:
    """Check that such a dataset may exist, without reading it.

    Raises:
        TextError: The file does not exist or has an unknown kind, or the name is invalid.
    """
    data = DataName.parse(name)
    if data.is_local and data.path.is_file():
        _reader(data.path)
    elif not data.is_local and (
        not _HUB_NAME.fullmatch(data.place) or _suffix(data.path) in _READERS
    ):
        raise TextError(
            f"there is no file or folder at {data.place}{did_you_mean_path(data.place)}: give "
            "--eval-data a JSONL, JSON, CSV, Parquet or text file, a folder of them, or a name on"
            " the Hugging Face hub"
        )


def data_pieces(name: str, tokenizer: Any) -> Iterator[str]:
    """Yield the text of a dataset in pieces of whole rows. Each row ends its line.

    A row may hold a conversation, a list of `{"role": ..., "content": ...}`. It is written with the
    tokenizer's chat template, or else as `role: content`.

    Raises:
        TextError: The dataset, its configuration, split or column does not exist, or cannot be
            read.
    """
    data = DataName.parse(name)
    try:
        rows, column = _open(data)
        yield from _joined(_text(row[column], column, data, tokenizer) for row in rows)
    except TextError:
        raise
    except Exception as error:
        raise TextError(
            f"cannot read {name} ({_reason(error)}): fix it, or give another --eval-data"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the message of a reader in `datasets`, which wraps it in an error without one."""
    wrapped = type(error).__name__.startswith("DatasetGeneration") and error.__cause__ is not None
    return first_line(error.__cause__ if wrapped and error.__cause__ else error)


def data_rows(
    name: str, wanted: Mapping[Kind, Sequence[str]], seed: int
) -> Iterator[tuple[Mapping[str, Any], Mapping[Kind, str]]]:
    """Yield the rows of a dataset with the columns of what a model reads.

    They come in an order that the seed determines: files are often sorted by class.

    Args:
        wanted: The usual names of the column of each kind of input.

    Raises:
        TextError: As for `data_pieces`, or a column is missing.
    """
    data = DataName.parse(name)
    try:
        rows, first, choice = _rows(data)
        columns: dict[Kind, str] = {}
        for kind, names in wanted.items():
            found = next((each for each in names if each in first), None)
            if len(wanted) == 1 and (any(choice.parts) or found is None):
                found = _column(data, choice, first)
            if found is None:
                raise TextError(
                    f"{data.place} has no column of {kind}: call it {names[0]} (it has"
                    f" {_list(first)})"
                )
            columns[kind] = found
        mixed: Any = rows
        for row in mixed.shuffle(seed=seed, buffer_size=_SHUFFLED_ROWS):
            yield row, columns
    except TextError:
        raise
    except Exception as error:
        raise TextError(
            f"cannot read {name} ({_reason(error)}): fix it, or give another --eval-data"
        ) from error


def _open(data: DataName) -> tuple[Iterable[Mapping[str, Any]], str]:
    """Return the rows of a dataset, and the column of their text."""
    rows, first, choice = _rows(data)
    return rows, _column(data, choice, first)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a name may choose among.

    Attributes:
        parts: What of the name is left for the column.
    """

    parts: Sequence[str]
    configs: Sequence[str]
    splits: Sequence[str]


def _rows(data: DataName) -> tuple[Iterable[Mapping[str, Any]], Mapping[str, Any], _Choice]:
    """Return the rows of a dataset, the first of them, and what may be chosen."""
    import datasets

    from autoquant.models.quiet import no_progress_bars, quiet

    with quiet(), no_progress_bars():
        place, options, configs = _found(data)
        config, parts = _take(data.parts, configs)
        if config is None and len(configs) > 1 and "default" not in configs:
            raise TextError(
                f"which configuration of {data.place}? Say {data.place}:CONFIG, one of "
                f"{_list(configs)}"
            )
        splits = datasets.load_dataset(place, config, streaming=True, **options)
        split, parts = _take(parts, list(splits))
        usual = next((name for name in _SPLITS if name in splits), next(iter(splits)))
        rows = splits[split or usual]
        first = next(iter(rows), None)
    if first is None:
        raise TextError(f"{data} has no rows: give another split or dataset")
    return rows, first, _Choice(parts, configs, list(splits))


def _found(data: DataName) -> tuple[str, Mapping[str, Any], Sequence[str]]:
    """Return arguments of `datasets.load_dataset` for a place, and its configurations."""
    import datasets

    check_data(str(data))
    if data.path.is_file():
        reader, options = _reader(data.path)
        if reader in _LINES:
            check_lines(data.path)
        return reader, {"data_files": str(data.path), **options}, ()
    if data.path.is_dir():
        return str(data.path), {}, datasets.get_dataset_config_names(str(data.path))
    _check_on_hub(data.place)
    return data.place, {}, datasets.get_dataset_config_names(data.place)


def _check_on_hub(name: str) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:
        raise TextError(
            f"{name} is neither a file or folder here{did_you_mean_path(name)} nor a dataset that "
            f"can be had from the hub ({first_line(error)}): check the spelling and the network,"
            " or give a local file"
        ) from error


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _reader(path: Path) -> tuple[str, Mapping[str, Any]]:
    found = _READERS.get(_suffix(path))
    if found is None:
        raise TextError(
            f"{path} is no dataset that can be read: give a file that ends in one of "
            f"{', '.join(_READERS)}, or is packed and says so behind that, as text.txt.gz"
        )
    return found


def _take(parts: Sequence[str], known: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """Return the first part if it is known (None if empty), and the parts that are left."""
    if not parts or (parts[0] and parts[0] not in known):
        return None, parts
    return parts[0] or None, parts[1:]


def _column(data: DataName, choice: _Choice, row: Mapping[str, Any]) -> str:
    """Return the column that is named, or the only one that can be meant."""
    parts, configs, splits = choice.parts, choice.configs, choice.splits
    if len(parts) == 1 and parts[0] in row:
        return parts[0]
    if any(parts):
        # The first part that names nothing; if all are columns, there are too many of them.
        wrong = next((part for part in parts if part and part not in row), parts[-1])
        known = [*configs, *splits, *row]
        among = f"configurations {_list(configs)}; " if configs else ""
        raise TextError(
            f"{data.place} has no {wrong}{did_you_mean(wrong, known)}: write it as {GRAMMAR}, each"
            f" of {among}splits {_list(splits)}; columns {_list(row)}"
        )
    texts = [name for name, value in row.items() if isinstance(value, str)]
    only = texts[0] if len(texts) == 1 else None
    found = next((name for name in _COLUMNS if name in row), only)
    if found is None:
        raise TextError(
            f"which column of {data.place} is the text? Say {data}:COLUMN, one of {_list(row)}"
        )
    return found


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(str, names))


def _text(value: Any, column: str, data: DataName, tokenizer: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(each, Mapping) and "content" in each for each in value)
    ):
        return _conversation(value, tokenizer)
    raise TextError(
        f"column {column} of {data.place} holds {type(value).__name__}, neither text nor messages "
        f"with role and content: name another column, {GRAMMAR}"
    )


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    return "\n".join(f"{message.get('role', 'user')}: {message['content']}" for message in messages)


def _joined(rows: Iterable[str]) -> Iterator[str]:
    """Join rows into pieces that are worth tokenizing. Each row ends its line."""
    piece: list[str] = []
    characters = 0
    for row in rows:
        piece.append(row if row.endswith("\n") else f"{row}\n")
        characters += len(piece[-1])
        if characters >= _PIECE_CHARACTERS:
            yield from row_pieces("".join(piece))
            piece, characters = [], 0
    if piece:
        yield "".join(piece)
