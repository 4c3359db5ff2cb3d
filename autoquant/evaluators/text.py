"""Evaluation text: token windows split into disjoint calibration, selection and report parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from autoquant.errors import TextError
from autoquant.evaluators.reading import file_pieces
from autoquant.files import MOST_TEXT_BYTES

Part = Literal["calibration", "selection", "report"]
PARTS: tuple[Part, ...] = ("calibration", "selection", "report")
WINDOW_TOKENS = 512
WANTED_WINDOWS: Mapping[Part, int] = {"calibration": 8, "selection": 20, "report": 28}
GPU_WINDOWS: Mapping[Part, int] = {"calibration": 8, "selection": 60, "report": 84}
"""On GPUs a run is cheap next to compiling, so more windows narrow intervals by 1.7."""
LEAST_WINDOWS: Mapping[Part, int] = {"calibration": 1, "selection": 6, "report": 8}
INPUT_WINDOWS = 32
ENOUGH_INPUT_WINDOWS = 16  # with 3, GPTQ is worse than clipping alone (studies/rounding)

DEFAULT_TEXT = Path(__file__).parent / "texts" / "default.txt"
"""The text for users who give none. `SOURCES.md` next to it lists its sources."""


@dataclass(frozen=True, slots=True)
class TextParts:
    """Windows of token ids, `[windows, tokens]` per part. No token is in two parts.

    Attributes:
        inputs: Windows that weights are rounded for, or None if no format needs them.
    """

    windows: Mapping[Part, torch.Tensor]
    inputs: torch.Tensor | None = None

    @property
    def key(self) -> str:
        """Hash of the tokens and their parts."""
        digest = hashlib.sha256()
        for part in PARTS:
            windows = self.windows[part]
            digest.update(f"{part}{tuple(windows.shape)}".encode())
            digest.update(windows.to(torch.int64).numpy().tobytes())
        if self.inputs is not None:
            digest.update(f"inputs{tuple(self.inputs.shape)}".encode())
            digest.update(self.inputs.to(torch.int64).numpy().tobytes())
        return digest.hexdigest()[:12]


def read_text(path: str | Path, tokenizer: Any, **options: Any) -> TextParts:
    """Deal the text in a UTF-8 file, as `deal_text` does.

    Raises:
        TextError: The file cannot be read, is no text, or is too short.
    """
    return deal_text(file_pieces(Path(path)), str(path), tokenizer, **options)


def deal_text(
    pieces: Iterable[str],
    name: str,
    tokenizer: Any,
    *,
    max_positions: int | None = None,
    inputs: bool = False,
    windows: Mapping[Part, int] = WANTED_WINDOWS,
) -> TextParts:
    """Tokenize as much of a text as the parts need.

    The first windows are dealt to the parts in turn, so that every part has the same mixture. Each
    begins with what the tokenizer puts before every text.

    Args:
        pieces: The text. Reading stops when there are enough tokens.
        name: Name of the text in messages.
        inputs: Also take windows that weights are rounded for: those after the parts, or the
            calibration part if too few follow.
        windows: The number of windows of each part in a text that is long enough.

    Raises:
        TextError: The text is too short, or far too long for the tokens that it gives.
    """
    window = min(WINDOW_TOKENS, max_positions or WINDOW_TOKENS)
    wanted = sum(windows.values())
    begin = beginning(tokenizer)
    text_tokens = window - len(begin)
    needed = (wanted + (INPUT_WINDOWS if inputs else 0)) * text_tokens
    tokens = _tokens(pieces, name, tokenizer, needed)
    available = len(tokens) // text_tokens
    least = sum(LEAST_WINDOWS.values())
    if available < least:
        raise TextError(
            f"{name} gives {len(tokens)} tokens; at least {least * text_tokens} are needed for"
            " separate calibration, selection and report parts: give a longer text"
        )
    counts = _counts(min(available, wanted), windows)
    rows = _rows(tokens, begin, text_tokens, 0, sum(counts.values()))
    owners = deal(counts)
    parts = {}
    for part in PARTS:
        own = [number for number, owner in enumerate(owners) if owner == part]
        parts[part] = rows[own]
    if not inputs:
        return TextParts(parts)
    count = min(available - wanted, INPUT_WINDOWS)
    if count <= len(parts["calibration"]):
        return TextParts(parts, parts["calibration"])
    return TextParts(parts, _rows(tokens, begin, text_tokens, wanted, count))


def beginning(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before every text: its BOS token, or none."""
    if getattr(tokenizer, "bos_token_id", None) is None:
        return []
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    for start in range(len(whole)):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


def _rows(
    tokens: Sequence[int], begin: Sequence[int], text_tokens: int, first: int, count: int
) -> torch.Tensor:
    """Return `count` windows of the text from number `first` on, each behind the same ids."""
    taken = tokens[first * text_tokens : (first + count) * text_tokens]
    text = torch.tensor(taken, dtype=torch.long).reshape(count, text_tokens)
    return torch.cat([torch.tensor(begin, dtype=torch.long).expand(count, -1), text], dim=1)


def _tokens(pieces: Iterable[str], name: str, tokenizer: Any, wanted: int) -> list[int]:
    tokens: list[int] = []
    characters = 0
    for piece in pieces:
        tokens += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        characters += len(piece)
        if len(tokens) >= wanted:
            break
        if characters > MOST_TEXT_BYTES:
            raise TextError(
                f"{name} gives {len(tokens)} tokens in its first {characters:,} characters, and"
                f" {wanted} are wanted: take out what is blank, or give another text"
            )
    return tokens


def _counts(available: int, windows: Mapping[Part, int]) -> dict[Part, int]:
    """Return how many windows each part gets: as wanted, or fewer in a short text.

    With at least `WANTED_WINDOWS`, only selection and report shrink. With fewer, all parts do.
    """
    usual = sum(WANTED_WINDOWS.values())
    if available >= usual:
        rest = available - windows["calibration"]
        selection = windows["selection"] * rest // (windows["selection"] + windows["report"])
        return {
            "calibration": windows["calibration"],
            "selection": selection,
            "report": rest - selection,
        }
    counts = {
        part: max(LEAST_WINDOWS[part], WANTED_WINDOWS[part] * available // usual) for part in PARTS
    }
    spare = available - sum(counts.values())
    counts["report" if spare > 0 else "calibration"] += spare
    return counts


def deal(counts: Mapping[Part, int]) -> list[Part]:
    """Deal windows to parts. Each goes to the part that is furthest behind its share."""
    given = dict.fromkeys(counts, 0)
    order: list[Part] = []
    for _ in range(sum(counts.values())):
        part = min(
            (p for p in counts if given[p] < counts[p]), key=lambda p: (given[p] + 0.5) / counts[p]
        )
        given[part] += 1
        order.append(part)
    return order
