"""What libraries log and a user can do nothing about is dropped; what autoquant logs is kept for those who ask."""

from __future__ import annotations

import logging
import sys


def quiet_libraries() -> None:
    """Drop the records below from now on, whoever imports torchao: a command, a worker, or a program that uses autoquant."""
    logging.getLogger("autoquant").addHandler(logging.NullHandler())  # silent until a program asks for what is logged
    logging.getLogger("torchao").addFilter(_is_missed)
    logging.getLogger("torch.utils._pytree").addFilter(_is_for_users)


def _is_missed(record: logging.LogRecord) -> bool:
    """Drop that kernels for GPUs could not be loaded where there is no GPU."""
    if not record.getMessage().startswith("Failed to load "):
        return True
    torch = sys.modules.get("torch")  # torchao has imported it; `autoquant --help` must not
    return torch is not None and bool(torch.cuda.is_available())


def _is_for_users(record: logging.LogRecord) -> bool:
    """Drop the advice on how torchao should register its enumerations with PyTorch."""
    return "on Enum subclasses is deprecated" not in record.getMessage()
