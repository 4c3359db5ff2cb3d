"""The rows that a model with a reader is judged on, dealt to three disjoint parts.

A row is a text, a picture or a sound, from a dataset or a text, or else made up. Rows of a dataset
may have labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from autoquant.errors import TextError, first_line
from autoquant.evaluators.data import data_rows
from autoquant.evaluators.text import LEAST_WINDOWS, PARTS, Part, deal
from autoquant.models.reader import Batch, Reader, Reads, as_image, picture

ROW_TOKENS = 128
"""Tokens of a row that is cut from a text. Rows of a dataset are as long as they are."""
LONGEST_ROW_TOKENS = 512
ROWS: Mapping[Part, int] = {"calibration": 8, "selection": 40, "report": 56}
SOUND_ROWS: Mapping[Part, int] = {"calibration": 4, "selection": 12, "report": 16}
LABELLED_ROWS: Mapping[Part, int] = {"calibration": 16, "selection": 100, "report": 200}
_BATCH = 8
_MASKED_SHARE = 0.15
_LABELS: Mapping[bool, Sequence[str]] = {
    False: ("label", "labels", "class", "fine_label"),
    True: ("target", "answer", "summary", "output", "labels", "label"),
}
_COLUMNS: Mapping[Reads, Sequence[str]] = {
    "texts": ("text", "content", "sentence", "input", "document"),
    "pictures": ("image", "img", "picture", "pixels"),
    "sounds": ("audio", "sound", "wave"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One input.

    Attributes:
        ids: Of its text, or empty.
        label: The number of its class, or None.
        answer: Ids of what the decoder should say, or empty.
    """

    ids: tuple[int, ...] = ()
    picture: Any = None
    sound: Any = None
    label: int | None = None
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one shape, ready for one forward pass.

    Attributes:
        inputs: On the CPU.
        counted: Positions `[rows, positions]` that are compared; None for all.
        labels: The class of each row `[rows]`, or the token of each position; None if unknown.
    """

    inputs: Batch
    counted: torch.Tensor | None = None
    labels: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """Rows of three disjoint parts.

    Attributes:
        key: Hash of what the rows hold, apart from answers of the model's own.
        words: What they are, e.g. `104 texts of the dataset rows.jsonl`.
    """

    parts: Mapping[Part, tuple[Rows, ...]]
    key: str
    words: str
    notes: tuple[str, ...] = field(default=())

    @property
    def labelled(self) -> bool:
        """Whether all rows have labels."""
        return all(rows.labels is not None for part in self.parts.values() for rows in part)


def made_up_rows(reader: Reader) -> Iterator[Row]:
    """Yield made-up rows of a model that reads no text."""
    number = 0
    while True:
        if "pictures" in reader.reads:
            yield Row(picture=picture(number))
        else:
            yield Row(sound=reader.sound(number))
        number += 1


def text_rows(reader: Reader, pieces: Iterable[str]) -> Iterator[Row]:
    """Yield rows cut from a text, each with what the tokenizer puts around a text.

    What reads pictures too gets a made-up one with each text.
    """
    words: Any = reader.tokenizer
    before, behind = reader.frame()
    most = min(ROW_TOKENS, reader.max_tokens or ROW_TOKENS)
    own = max(1, most - len(before) - len(behind))
    left: list[int] = []
    number = 0
    for piece in pieces:
        left += words(piece, add_special_tokens=False, verbose=False)["input_ids"]
        while len(left) >= own:
            taken, left = left[:own], left[own:]
            shown = picture(number) if "pictures" in reader.reads else None
            yield Row(ids=(*before, *taken, *behind), picture=shown)
            number += 1


def dataset_rows(
    reader: Reader, name: str, seed: int, labels: Mapping[str, int] | None, *, answers: bool
) -> Iterator[Row]:
    """Yield the rows of a dataset, in an order that the seed determines.

    Args:
        labels: The number of each class by its name; None to read no labels.
        answers: Labels are texts that the decoder should say.

    Raises:
        TextError: It cannot be read, or has not what the model reads.
    """
    kinds = reader.reads
    wanted = {kind: _COLUMNS[kind] for kind in kinds}
    for row, columns in data_rows(name, wanted, seed):
        try:
            yield _row(reader, row, columns, labels, answers=answers)
        except (ValueError, TypeError, KeyError) as error:
            raise TextError(
                f"a row of {name} holds no {' and '.join(kind[:-1] for kind in kinds)} that can be"
                f" read ({first_line(error)}): name another column, or give another --eval-data"
            ) from error


def _row(
    reader: Reader,
    row: Mapping[str, Any],
    columns: Mapping[Reads, str],
    labels: Mapping[str, int] | None,
    *,
    answers: bool,
) -> Row:
    most = min(LONGEST_ROW_TOKENS, reader.max_tokens or LONGEST_ROW_TOKENS)
    text = columns.get("texts")
    ids = () if text is None else tuple(reader.ids(str(row[text]), most))
    shown = None if "pictures" not in columns else as_image(row[columns["pictures"]], "RGB")
    heard = None if "sounds" not in columns else _wave(row[columns["sounds"]])
    given = next((row[name] for name in _LABELS[answers] if row.get(name) is not None), None)
    if given is None or labels is None or (answers and not isinstance(given, str)):
        return Row(ids, shown, heard)
    if answers:
        words: Any = reader.tokenizer
        return Row(ids, shown, heard, answer=tuple(words(text_target=given)["input_ids"][:most]))
    return Row(ids, shown, heard, label=_class_number(given, labels))


def _class_number(given: Any, labels: Mapping[str, int]) -> int | None:
    if isinstance(given, str):
        if given not in labels:
            raise ValueError(f"no class of the model is called {given!r}")
        return labels[given]
    return int(given) if isinstance(given, (int, np.integer)) else None


def _wave(value: Any) -> Any:
    """Return the samples of a sound: numbers, or `{"array": numbers}`."""
    array = np.asarray(value["array"] if isinstance(value, Mapping) else value, dtype=np.float32)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"a sound has one dimension of numbers, not {array.shape}")
    return array


def deal_rows(
    reader: Reader, rows: Iterable[Row], name: str, *, masks: bool, seed: int, limited: bool
) -> JudgedRows:
    """Deal rows to the parts in turn, and make them ready.

    Args:
        name: What the rows are of, for messages.
        masks: Hide some tokens of each text, and compare what the model says of these.
        limited: The rows may come to an end.

    Raises:
        TextError: There are too few.
    """
    taken = iter(rows)
    first = next(taken, None)
    known = first is not None and (first.label is not None or bool(first.answer))
    usual = SOUND_ROWS if "sounds" in reader.reads else ROWS
    counts = dict(LABELLED_ROWS if known else usual)
    wanted = sum(counts.values())
    found = [] if first is None else [first, *islice(taken, wanted - 1)]
    if len(found) < wanted:
        counts = _fewer(len(found), counts, name)
    owners = deal(counts)
    digest = hashlib.sha256(f"rows-1 {masks} {seed}".encode())
    parts: dict[Part, tuple[Rows, ...]] = {}
    for part in PARTS:
        own = [row for row, owner in zip(found, owners, strict=False) if owner == part]
        digest.update(part.encode())
        parts[part] = tuple(_ready(reader, own, digest, masks=masks, seed=seed))
    kind = " with ".join(reader.reads)
    words = f"{sum(counts.values())} {kind} of {name}" if limited else f"{wanted} {name}"
    return JudgedRows(parts, f"rows-{digest.hexdigest()[:12]}", words)


def batches(reader: Reader, rows: Sequence[Row]) -> tuple[Rows, ...]:
    """Return rows ready for forward passes, those of one shape together."""
    return tuple(_ready(reader, rows, hashlib.sha256(), masks=False, seed=0))


def _fewer(available: int, counts: Mapping[Part, int], name: str) -> dict[Part, int]:
    """Return how many rows each part gets of fewer than are wanted."""
    least = sum(LEAST_WINDOWS.values())
    if available < least:
        raise TextError(
            f"{name} has {available} rows for this model; at least {least} are needed for separate"
            " calibration, selection and report parts: give more"
        )
    total = sum(counts.values())
    fewer = {
        part: max(LEAST_WINDOWS[part], count * available // total) for part, count in counts.items()
    }
    while sum(fewer.values()) > available:
        largest = max(fewer, key=lambda part: fewer[part] - LEAST_WINDOWS[part])
        fewer[largest] -= 1
    fewer["report"] += available - sum(fewer.values())
    return fewer


def _ready(
    reader: Reader, rows: Sequence[Row], digest: Any, *, masks: bool, seed: int
) -> Iterator[Rows]:
    """Yield rows in batches of one shape, and feed what they hold to the digest."""
    groups: dict[tuple[int, int, bool], list[Row]] = {}
    for row in rows:
        shape = (len(row.ids), len(row.answer), row.label is not None)
        groups.setdefault(shape, []).append(row)
    for group in groups.values():
        for start in range(0, len(group), _BATCH):
            yield _batch(reader, group[start : start + _BATCH], digest, masks=masks, seed=seed)


def _batch(reader: Reader, rows: Sequence[Row], digest: Any, *, masks: bool, seed: int) -> Rows:
    inputs = reader.batch(
        ids=[row.ids for row in rows if row.ids],
        pictures=[row.picture for row in rows if row.picture is not None],
        sounds=[row.sound for row in rows if row.sound is not None],
    )
    counted = _mask(reader, inputs, len(rows), seed) if masks else None
    labels = None
    if all(row.answer for row in rows):
        labels = torch.tensor([row.answer for row in rows])
    elif all(row.label is not None for row in rows):
        labels = torch.tensor([row.label for row in rows])
    for name in sorted(inputs):
        value = inputs[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(None if labels is None else labels.tolist()).encode())
    return Rows(inputs, counted, labels)


def _mask(reader: Reader, inputs: Batch, rows: int, seed: int) -> torch.Tensor | None:
    """Put the mask in place of some tokens, and return where; None if there is no mask."""
    words: Any = reader.tokenizer
    mask = getattr(words, "mask_token_id", None)
    if mask is None:
        return None
    before, behind = (len(ids) for ids in reader.frame())
    ids = inputs["input_ids"]
    inside = range(before, ids.shape[1] - behind)
    count = max(1, round(_MASKED_SHARE * len(inside)))
    generator = torch.Generator().manual_seed(seed)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(rows):
        drawn = torch.randperm(len(inside), generator=generator)[:count] + before
        counted[row, drawn] = True
    ids[counted] = int(mask)
    return counted
