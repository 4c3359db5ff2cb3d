"""The errors that a user can cause: every one is an `AutoquantError` with a one-line message."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

_LONGEST = 300


class AutoquantError(Exception):
    """Base of every error for the user: one line says what is wrong and what to do."""


class ModelError(AutoquantError):
    """The model cannot be read, or is not the one a plan was made for."""


class TrustError(ModelError):
    """Code would run that the user did not name in this call. The message says how to name it.

    Attributes:
        options: What allows it, by the name of the keyword: True for a flag, else its value.
        runs: What would run then, piece by piece.
    """

    def __init__(
        self,
        message: str,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
        runs: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.options = dict(options)
        self.runs = tuple(runs)


class TextError(AutoquantError):
    """The evaluation text is missing, unreadable or too short."""


class QualityError(AutoquantError):
    """The user's quality function fails or gives no losses."""


class TaskError(AutoquantError):
    """A task does not exist, or lm-eval is missing or cannot run it."""


class WorkloadError(AutoquantError):
    """A workload, limit or size cannot be parsed or does not fit the model."""


class ConstraintError(AutoquantError):
    """A pattern for layers or formats matches nothing, or constraints contradict each other."""


class RecipeError(AutoquantError):
    """A recipe does not exist, or its file holds something that a search does not take."""


class DeviceError(AutoquantError):
    """The requested device does not exist."""


class CandidateError(AutoquantError):
    """A candidate, format or kernel does not exist or misbehaves."""


class KernelError(AutoquantError):
    """A kernel computes other numbers than its format says.

    Attributes:
        format, kernel: Ids.
        reason: Where and how, without what to do.
    """

    def __init__(
        self, message: str, *, format_id: str = "", kernel: str = "", reason: str = ""
    ) -> None:
        super().__init__(message)
        self.format, self.kernel, self.reason = format_id, kernel, reason


class StoreError(AutoquantError):
    """The database is missing, foreign, newer, damaged or not writable."""


class PlanError(AutoquantError):
    """A plan or study does not exist, or no plan is within the limits."""


class CheckpointError(AutoquantError):
    """A saved model cannot be written, read or verified."""


class DiskFullError(AutoquantError):
    """No space is left on a disk."""


class ProcessDiedError(AutoquantError):
    """A worker process crashed or was killed."""


class WorkerLostError(ProcessDiedError):
    """A worker was ended from outside, or its machine is gone: that says nothing about its job."""


class WorkersError(AutoquantError):
    """There are no such workers as were asked for."""


class HungError(ProcessDiedError):
    """A worker process was killed because it took far too long."""


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """Return the first line of an error's message without colours, or its type if there is none."""
    # PyTorch's compiler wraps the error that matters.
    error = getattr(error, "inner_exception", None) or error
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 3] + "..."
    kind = type(error).__name__
    return f"{kind}: {line}" if line and with_type else line or kind


def option_words(keyword: str, value: Any) -> str:
    """Return an option as it is typed, e.g. `--model-factory my_code:build`."""
    option = f"--{keyword.replace('_', '-')}"
    return option if value is True else f"{option} {shlex.quote(str(value))}"
