"""Decide what is logged and warned of: nothing that a user cannot act on.

Autoquant itself logs only on request.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TALKATIVE = ("torchao", "torch.utils._pytree", "transformers")


def quiet_libraries() -> None:
    """Drop the records that the filters below name, in this process from now on.

    A command, a worker, or a program that uses autoquant may be the one that imports torchao.
    """
    # Silent until a program adds a handler.
    logging.getLogger("autoquant").addHandler(logging.NullHandler())
    logging.getLogger("torchao").addFilter(_is_missed)
    logging.getLogger("torch.utils._pytree").addFilter(_is_for_users)


@contextmanager
def levels_kept() -> Iterator[None]:
    """Restore the levels of loggers and the filters of warnings that libraries change inside."""
    places = [logging.root, *logging.root.manager.loggerDict.values()]
    levels = [(place, place.level) for place in places if isinstance(place, logging.Logger)]
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.disable(disabled)
        for place, level in levels:
            if place.level != level:  # setting one makes all thousand loggers forget what they know
                place.setLevel(level)


def hide_warnings() -> None:
    """Hide all warnings of libraries: who types a command cannot act on them.

    A program that uses autoquant decides on its own.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler announces each of its runs
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def on_stderr(visible: Callable[[str], str]) -> Iterator[None]:
    """Show what autoquant logs on stderr inside.

    Args:
        visible: Writes out what would steer the terminal.
    """
    logger, handler = logging.getLogger("autoquant"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(visible))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _is_missed(record: logging.LogRecord) -> bool:
    """Drop the warning that kernels for GPUs cannot be loaded, unless there is a GPU."""
    if not record.getMessage().startswith("Failed to load "):
        return True
    torch = sys.modules.get("torch")  # torchao has imported it; `autoquant --help` must not
    return torch is not None and bool(torch.cuda.is_available())


def _is_for_users(record: logging.LogRecord) -> bool:
    """Drop the advice on how torchao should register its enumerations with PyTorch."""
    return "on Enum subclasses is deprecated" not in record.getMessage()


class _Formatter(logging.Formatter):
    def __init__(self, visible: Callable[[str], str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self._visible = visible

    def format(self, record: logging.LogRecord) -> str:
        return self._visible(super().format(record))
