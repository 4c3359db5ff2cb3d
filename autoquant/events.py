"""What long work reports while it runs. The terminal, a log file and a page are listeners; the library never prints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageStarted:
    """A stage begins, with `total` items of work (0: nothing left to do)."""

    stage: str
    total: int


@dataclass(frozen=True, slots=True)
class StageProgress:
    """`done` items of the stage are finished; `what` is at work now."""

    stage: str
    done: int
    what: str


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A stage ended; `summary` says in one line what came out."""

    stage: str
    summary: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should know: a layer left alone, a candidate that failed, a fallback taken, with its reason."""

    text: str


Event = StageStarted | StageProgress | StageFinished | Notice
Listener = Callable[[Event], None]


_log = logging.getLogger(__name__)


def ignore(_event: Event) -> None:
    """The listener that does nothing."""


def logged(listener: Listener) -> Listener:
    """The listener, with every event in the log too: notices as warnings, the rest as information."""

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
        listener(event)

    return log_and_tell
