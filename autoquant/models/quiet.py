"""Keep libraries off the user's terminal while they load."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autoquant.logs import levels_kept


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log records below error level inside."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def left_as_found() -> Iterator[None]:
    """Give the caller's process back what a search changes in it.

    These are the states of random generators, the levels of loggers and the filters of warnings.
    """
    import random

    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if used else []
    try:
        with torch.random.fork_rng(devices), levels_kept():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turn off progress bars of transformers and of the hub client inside."""
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    hub: Any = utils
    hub_was_on, was_on = (
        not hub.are_progress_bars_disabled(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
        (hub.enable_progress_bars if hub_was_on else hub.disable_progress_bars)()


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Make modules of the current folder importable inside, as `python -m` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def some(names: list[str], most: int = 3) -> str:
    """Join names as in `a, b, c and 4 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
