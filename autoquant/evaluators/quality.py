"""The quality of a model against the unquantized one: on text, or by the user's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from autoquant.devices import backend
from autoquant.devices.memory import available_bytes
from autoquant.errors import QualityError, first_line
from autoquant.evaluators.kept import HeldTensor, KeptTensor, held_tensors
from autoquant.evaluators.logits import WindowComparison, compare_window, window_loss
from autoquant.evaluators.passes import each_output
from autoquant.evaluators.text import LEAST_WINDOWS, Part, TextParts
from autoquant.models.outputs import output_tensor, run_on_tokens
from autoquant.models.streaming import stream_of
from autoquant.solver.beyond import looks

_KEPT_BYTES = 4 << 30
"""Logits that are kept at most on disk, beside those in memory; a quarter of the memory, if less.

The system holds them in memory while it can.
"""

ReferenceLosses = Mapping[Part, tuple[float, ...]]
"""The unquantized model's losses on the parts on which they are known."""

QualityFunction = Callable[[nn.Module, Part], Any]
"""Maps (module, part) to one loss per sample of the part, always in the same order.

Lower is better.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Losses of a model and of the unquantized one on the same samples.

    Attributes:
        kl: Mean divergence between the models, or None if it is not defined.
        sample_kl: The divergence of each sample, or empty if it is not defined.
        unseen: The number of samples that were not compared, since enough was known.
        right: How many labels the model gets right, how many the unquantized one does, and how many
            there are; None without labels.
    """

    losses: tuple[float, ...]
    reference: tuple[float, ...]
    kl: float | None
    sample_kl: tuple[float, ...] = ()
    unseen: int = 0
    right: tuple[int, int, int] | None = None


Enough = Callable[[Comparison], bool]
"""Tells from a comparison of the first samples whether the others are needed no more."""


class Quality(Protocol):
    """What a search needs of a quality measure.

    Attributes:
        key: Hash of everything but the model that the losses depend on.
        logarithmic: The losses are log-likelihoods, and are shown as perplexity.
    """

    key: str
    logarithmic: bool

    def compare(
        self,
        module: nn.Module,
        reference: nn.Module,
        part: Part,
        known: Sequence[float] = (),
        enough: Enough | None = None,
    ) -> Comparison:
        """Return the losses of both models on the same samples.

        Args:
            module: May be the reference itself, which is then run once, or not at all.
            known: The reference's losses, if they were measured before: all, or none.
            enough: Asked a few times where samples are compared one after the other, never before
                as many as a short text has.
        """
        ...


class TextQuality:
    """Negative log-likelihood per token on separate windows of text.

    Args:
        parts: The windows.
        device: The model's device.
        keep_reference: Every comparison has the same reference, so hold its logits in memory, or
            keep them on disk.
        compiled: Compare logits in one compiled pass.
    """

    logarithmic = True

    def __init__(
        self,
        parts: TextParts,
        device: str,
        *,
        keep_reference: bool = False,
        compiled: bool = False,
    ) -> None:
        self.parts = parts
        self.key = parts.key
        self._device, self._compiled = device, compiled
        self._files: dict[tuple[Part, int], KeptTensor] = {}  # of a streamed model
        self._kept: dict[tuple[Part, int], HeldTensor] = {}
        if keep_reference:
            self._kept = self._keepers()

    def _keepers(self) -> dict[tuple[Part, int], HeldTensor]:
        compared: tuple[Part, ...] = ("report", "selection")
        windows = [
            (part, number) for part in compared for number in range(len(self.parts.windows[part]))
        ]
        room_bytes = backend(self._device).room_bytes() or 0
        files = [self._file(count) for count in range(1, len(windows) + 1)]
        return dict(zip(windows, held_tensors(files, room_bytes), strict=True))

    def _file(self, count: int) -> KeptTensor | None:
        """Return a file for one of so many windows, or None where making them again is quicker."""
        if backend(self._device).free_bytes() is not None:
            return None
        return KeptTensor(min(_KEPT_BYTES, (available_bytes() or _KEPT_BYTES) // 4) // count)

    def keeping(self, *, compiled: bool = False) -> TextQuality:
        """Return the same measure for comparisons that all have the same reference."""
        return TextQuality(self.parts, self._device, keep_reference=True, compiled=compiled)

    def window_tokens(self) -> int:
        """Return the tokens of every window."""
        return self.parts.windows["report"].shape[1]

    def windows(self, part: Part) -> Iterator[torch.Tensor]:
        """Yield the token ids `[1, tokens]` of each window."""
        for window in self.parts.windows[part]:
            yield window.unsqueeze(0).to(self._device)

    def losses(self, module: nn.Module, part: Part) -> tuple[float, ...]:
        """Return each window's mean negative log-likelihood in nats, without its first token."""
        windows = list(self.windows(part))
        each = each_logits(module, windows)
        return tuple(window_loss(logits, ids) for logits, ids in zip(each, windows, strict=True))

    def compare(
        self,
        module: nn.Module,
        reference: nn.Module,
        part: Part,
        known: Sequence[float] = (),
        enough: Enough | None = None,
    ) -> Comparison:
        if module is reference:
            same = tuple(known) or self._reference_losses(reference, part)
            return Comparison(same, same, 0.0, (0.0,) * len(same))
        found: list[WindowComparison] = []
        windows = list(self.windows(part))
        asked = looks(len(windows), LEAST_WINDOWS[part]) if enough else ()
        for ids, wanted in zip(windows, self._reference_logits(reference, part), strict=True):
            logits = next_token_logits(module, ids)
            found.append(compare_window(wanted, logits, ids, compiled=self._compiled))
            if enough and len(found) in asked and enough(self._so_far(found, part, known)):
                break
        return self._so_far(found, part, known)

    def _reference_losses(self, reference: nn.Module, part: Part) -> tuple[float, ...]:
        each = self._reference_logits(reference, part)
        windows = self.windows(part)
        return tuple(window_loss(logits, ids) for logits, ids in zip(each, windows, strict=True))

    def _so_far(
        self, found: Sequence[WindowComparison], part: Part, known: Sequence[float]
    ) -> Comparison:
        each = tuple(window.divergence / self.window_tokens() for window in found)
        return Comparison(
            tuple(window.loss for window in found),
            tuple(known[: len(found)]) or tuple(window.reference_loss for window in found),
            sum(each) / len(each),
            each,
            unseen=len(self.parts.windows[part]) - len(found),
        )

    def _reference_logits(self, reference: nn.Module, part: Part) -> Iterator[torch.Tensor]:
        """Yield the unquantized model's logits on each window, those kept on disk from there.

        Of a streamed model all are kept: one pass over all weights is enough for all plans.
        """
        windows = list(self.windows(part))
        if stream_of(reference) is None:
            for number, ids in enumerate(windows):
                make = partial(next_token_logits, reference, ids)
                kept = self._kept.get((part, number))
                yield make() if kept is None else kept.get(make)
            return
        files = [
            self._files.setdefault((part, number), KeptTensor(0)) for number in range(len(windows))
        ]
        missing = [ids for ids, file in zip(windows, files, strict=True) if not file.is_kept()]
        made = each_logits(reference, missing)
        for ids, file in zip(windows, files, strict=True):
            if file.is_kept():
                yield file.get(partial(next_token_logits, reference, ids))
            else:
                logits = next(made)
                file.keep(logits)
                yield logits


class FunctionQuality:
    """The user's own quality function.

    Args:
        function: See `QualityFunction`.
        key: Names the function and its data. Different functions need different keys.
    """

    logarithmic = False

    def __init__(self, function: QualityFunction, key: str) -> None:
        self._function = function
        self.key = key

    def losses(self, module: nn.Module, part: Part) -> tuple[float, ...]:
        """Return the function's losses as floats.

        Raises:
            QualityError: The function fails, or does not return losses.
        """
        try:
            with torch.no_grad():
                value = self._function(module, part)
        except Exception as error:
            raise QualityError(
                f"the quality function {self.key} failed on the {part} part "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        if hasattr(value, "tolist"):  # a tensor or an array
            value = value.reshape(-1).tolist()
        samples: Sequence[Any] = value if isinstance(value, Sequence) else [value]
        try:
            losses = tuple(float(sample) for sample in samples)
        except (TypeError, ValueError):
            losses = ()
        if not losses:
            raise QualityError(
                f"the quality function {self.key} returned no losses for the {part} part "
                f"({type(value).__name__}): it must return one number per sample"
            )
        return losses

    def compare(
        self,
        module: nn.Module,
        reference: nn.Module,
        part: Part,
        known: Sequence[float] = (),
        enough: Enough | None = None,
    ) -> Comparison:
        if module is reference:
            same = tuple(known) or self.losses(reference, part)
            return Comparison(same, same, None)
        return Comparison(
            self.losses(module, part), tuple(known) or self.losses(reference, part), None
        )

    def increase_over(self, reference: nn.Module, part: Part) -> Callable[[nn.Module], float]:
        """Return a function for the increase of a module's mean loss over today's reference."""
        base = _mean(self.losses(reference, part))
        return lambda module: _mean(self.losses(module, part)) - base


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def next_token_logits(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits `[tokens, vocabulary]` of one window `[1, tokens]`, without a cache."""
    with torch.no_grad():
        return output_tensor(run_on_tokens(module, ids))[0]


def each_logits(module: nn.Module, windows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the logits `[tokens, vocabulary]` of each window, as `next_token_logits`."""
    return each_output(module, [partial(next_token_logits, module, ids) for ids in windows])
