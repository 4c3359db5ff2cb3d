"""How fast one or two models wrote a text, as lines and as an object of JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from autoquant.report.units import digits, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One model's times; medians, if it got the request more than once.

    Attributes:
        ready_s: Time to load it and to make a first short request.
        first_token_s: Time from a request to its first new token.
        tokens_per_s: The pace after the first token; None for fewer than two tokens.
        total_s: Time from a request to its last new token.
    """

    ready_s: float
    first_token_s: float
    tokens_per_s: float | None
    new_tokens: int
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDifference:
    """Where two greedy texts first differ.

    Attributes:
        token: Counts from 1.
        text: The token there; empty if the text has ended.
        original_text: The unquantized model's.
    """

    token: int
    text: str
    original_text: str


class Kept(Protocol):
    """What is read from `autoquant.prompting.Kept`."""

    @property
    def kind(self) -> str | None: ...

    @property
    def tokens(self) -> int: ...

    @property
    def memory_bytes(self) -> int | None: ...

    @property
    def plain_bytes(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """The speed of a model, or of a model and the unquantized one after it.

    Attributes:
        rounds: Requests to each of two models, in turn.
        sampled: Whether the texts are drawn at random, so that they are not compared.
        difference: None if the texts are the same, or not compared.
        kept: Keys and values of the first model's longest sequence, if they are known.
    """

    models: Sequence[Speed]
    prompt_tokens: int
    rounds: int
    sampled: bool
    difference: TextDifference | None
    kept: Kept | None = None

    def as_object(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        shown: dict[str, Any] = {"prompt_tokens": self.prompt_tokens, **asdict(self.models[0])}
        if self.kept is not None:
            shown["kv_cache"] = self.kept.kind
            shown["kv_cache_bytes"] = self.kept.memory_bytes
        if len(self.models) > 1:
            shown["original"] = asdict(self.models[1])
            shown["times_faster"] = self._times_faster()
            shown["first_difference"] = self.difference.token if self.difference else None
        return shown

    def lines(self) -> list[str]:
        """Return what a user reads: a sentence for one model, a table for two."""
        if len(self.models) == 1:
            return [self._sentence(), *self._kept_words()]
        return [*self._table(), self._how_timed(), *self._kept_words(), self._comparison()]

    def _kept_words(self) -> list[str]:
        """Say how much keys and values take, if they are not in the model's dtype."""
        kept = self.kept
        if kept is None or kept.kind is None:
            return []
        sizes = ""
        if kept.memory_bytes is not None and kept.plain_bytes is not None:
            sizes = f", {size(kept.memory_bytes)} instead of {size(kept.plain_bytes)}"
        return [f"keys and values in {kept.kind}: for {kept.tokens} tokens{sizes}"]

    def _times_faster(self) -> dict[str, float | None]:
        """Return how many times faster the first model is than the unquantized one."""
        ours, theirs = self.models
        paces = None
        if ours.tokens_per_s and theirs.tokens_per_s:
            paces = ours.tokens_per_s / theirs.tokens_per_s
        # Seconds a token, since one of the texts may have ended early.
        in_all = (theirs.total_s / theirs.new_tokens) / (ours.total_s / ours.new_tokens)
        return {
            "first_token": theirs.first_token_s / ours.first_token_s,
            "tokens_per_s": paces,
            "total": in_all,
        }

    def _sentence(self) -> str:
        (speed,) = self.models
        return (
            f"ready after {_seconds(speed.ready_s)}; then {self.prompt_tokens} tokens of prompt,"
            f" {speed.new_tokens} new ones: first token after {_seconds(speed.first_token_s)},"
            f" {_rate(speed.tokens_per_s)} tokens/s after it, {_seconds(speed.total_s)} in all"
        )

    def _table(self) -> list[str]:
        faster = [_times(ratio) for ratio in self._times_faster().values()]
        rows = [
            ("", "ready after", "first token", "tokens/s", "in all"),
            ("this model", *_cells(self.models[0])),
            ("unquantized", *_cells(self.models[1])),
            ("times faster", "", *faster),
        ]
        lines = []
        for name, *cells in rows:
            columns = "".join(f"{cell:>13}" for cell in cells)
            lines.append(f"{name:<12}{columns}")
        return lines

    def _how_timed(self) -> str:
        ours, theirs = (speed.new_tokens for speed in self.models)
        line = (
            f"medians of {self.rounds} requests to each in turn; {self.prompt_tokens} tokens of"
            f" prompt, {ours} new ones"
        )
        if ours != theirs:
            line += f" ({theirs} of the unquantized model; the last ratio is of seconds a token)"
        return line

    def _comparison(self) -> str:
        if self.sampled:
            return "texts are sampled, so they are not compared"
        if self.difference is None:
            return f"greedy text: the same {self.models[0].new_tokens} tokens"
        found = self.difference
        return (
            f"greedy text: differs from token {found.token} on ({found.text!r}, unquantized"
            f" {found.original_text!r})"
        )


def pace_words(first_token_s: float, tokens_per_s: float | None) -> str:
    """Return how fast one answer of a conversation came."""
    return f"{_seconds(first_token_s)} to the first token, then {_rate(tokens_per_s)} tokens/s"


def _cells(speed: Speed) -> tuple[str, str, str, str]:
    return (
        _seconds(speed.ready_s),
        _seconds(speed.first_token_s),
        _rate(speed.tokens_per_s),
        _seconds(speed.total_s),
    )


def _seconds(value: float) -> str:
    return f"{digits(value)} s"


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else digits(tokens_per_s)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
