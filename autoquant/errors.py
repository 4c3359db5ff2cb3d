"""The error tree. Every error a user can cause is an `AutoquantError` with a one-line message.

AutoquantError
├── ModelError        the model cannot be read, or is not the one a plan was made for
├── TextError         the evaluation text is missing, unreadable or too short
├── QualityError      the user's quality function fails or gives no losses
├── TaskError         no such task, or lm-eval is missing or cannot run it
├── WorkloadError     a workload, limit or size that cannot be parsed or does not fit the model
├── ConstraintError   a pattern for layers or formats that matches nothing, or constraints that contradict each other
├── RecipeError       no such recipe, or its file has something that a search does not take
├── DeviceError       the device asked for is not there
├── CandidateError    a candidate name, format or kernel that does not exist or misbehaves
├── StoreError        the database is missing, foreign, newer, damaged or not writable
├── PlanError         no such plan or study, or none satisfies the limits
├── CheckpointError   a saved model cannot be written, read or verified
└── ProcessDiedError  what ran in a process of its own brought it down
"""

from __future__ import annotations

import re

_LONGEST = 300


class AutoquantError(Exception):
    """Base of every error whose message is meant for the user: what is wrong and what to do, in one line."""


class ModelError(AutoquantError):
    """The model cannot be read, or is not the one a plan was made for."""


class TextError(AutoquantError):
    """The evaluation text is missing, unreadable or too short."""


class QualityError(AutoquantError):
    """The user's quality function fails or gives no losses."""


class TaskError(AutoquantError):
    """No such task, or lm-eval is missing or cannot run it."""


class WorkloadError(AutoquantError):
    """A workload, limit or size that cannot be parsed or does not fit the model."""


class ConstraintError(AutoquantError):
    """A pattern for layers or formats that matches nothing, or constraints that contradict each other."""


class RecipeError(AutoquantError):
    """No such recipe, or its file has something that a search does not take."""


class DeviceError(AutoquantError):
    """The device asked for is not there."""


class CandidateError(AutoquantError):
    """A candidate name, format or kernel that does not exist or misbehaves."""


class StoreError(AutoquantError):
    """The database is missing, foreign, newer, damaged or not writable."""


class PlanError(AutoquantError):
    """No such plan or study, or none satisfies the limits."""


class CheckpointError(AutoquantError):
    """A saved model cannot be written, read or verified."""


class ProcessDiedError(AutoquantError):
    """What ran in a process of its own brought it down, or somebody did."""


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """The first line that says something of an error's message, without terminal colours; its type if it is silent.

    Of an error that PyTorch's compiler wraps in one of its own, the inner one's.
    """
    error = getattr(error, "inner_exception", None) or error
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 3] + "..."
    kind = type(error).__name__
    return f"{kind}: {line}" if line and with_type else line or kind
