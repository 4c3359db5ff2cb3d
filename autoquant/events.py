"""What long work reports while it runs.

The terminal and the log are listeners. The library itself never prints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins with `total` items of work. 0 means that nothing is left to do."""

    stage: str
    total: int


@dataclass(frozen=True, slots=True)
class StageProgress:
    """`done` items of the stage are finished, and `what` is at work now."""

    stage: str
    done: int
    what: str


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A stage ended. `summary` is its result in one line."""

    stage: str
    summary: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know, with its reason, such as a layer left alone."""

    text: str


@dataclass(frozen=True, slots=True)
class Ending:
    """All of the work is now expected to end in so many seconds."""

    in_s: float


Event = StageStarted | StageProgress | StageFinished | Notice | Ending
Listener = Callable[[Event], None]


_log = logging.getLogger(__name__)


def ignore(_event: Event) -> None:
    """Do nothing: the listener of a program that wants no events."""


def logged(listener: Listener) -> Listener:
    """Return a listener that also logs every event: notices as warnings, the rest as info."""

    def log_and_tell(event: Event) -> None:
        match event:
            case StageStarted():
                _log.info("%s: %d to do", event.stage, event.total)
            case StageProgress():
                _log.info("%s: %d done, now %s", event.stage, event.done, event.what)
            case StageFinished():
                _log.info("%s: %s", event.stage, event.summary)
            case Notice():
                _log.warning("%s", event.text)
            case Ending():
                _log.info("expected to end in %.0f s", event.in_s)
        listener(event)

    return log_and_tell
