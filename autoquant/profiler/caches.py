"""Where compiled and tuned kernels are kept, so that shapes, models and runs share them."""

from __future__ import annotations

import os
from pathlib import Path

from autoquant.records import Device


def cache_folder() -> Path:
    """The project's folder for what can be made again: `$AUTOQUANT_CACHE`, or `autoquant` under the user's cache folder."""
    chosen = os.environ.get("AUTOQUANT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoquant"


def use_kernel_caches() -> None:
    """Have PyTorch's and Triton's compilers keep what they make there, unless the user has chosen other places."""
    folder = cache_folder()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def tuning_folder(device: Device) -> Path:
    """Where the settings lie that libraries found by tuning their kernels on this device."""
    return cache_folder() / "tuning" / device.key
