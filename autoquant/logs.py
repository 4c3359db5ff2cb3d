"""Drop what libraries log if a user can do nothing about it. Autoquant logs only on request."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Give back the levels of loggers and the filters of warnings that libraries change inside."""
    places = [logging.root, *logging.root.manager.loggerDict.values()]
    levels = [(place, place.level) for place in places if isinstance(place, logging.Logger)]
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.disable(disabled)
        for place, level in levels:
            place.setLevel(level)


def _is_missed(record: logging.LogRecord) -> bool:
    """Drop the warning that kernels for GPUs cannot be loaded, unless there is a GPU."""
    if not record.getMessage().startswith("Failed to load "):
        return True
    torch = sys.modules.get("torch")  # torchao has imported it; `autoquant --help` must not
    return torch is not None and bool(torch.cuda.is_available())


def _is_for_users(record: logging.LogRecord) -> bool:
    """Drop the advice on how torchao should register its enumerations with PyTorch."""
    return "on Enum subclasses is deprecated" not in record.getMessage()
