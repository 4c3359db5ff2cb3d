"""Where compiled and tuned kernels are kept, so that shapes, models and runs share them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autoquant.cache import cache_folder
from autoquant.candidates.kernels import gemlite
from autoquant.devices.device import fingerprint
from autoquant.records import Device


def use_kernel_caches() -> None:
    """Have PyTorch's and Triton's compilers keep what they make there, unless the user has chosen other places."""
    folder = cache_folder()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def tuning_folder(device: Device) -> Path:
    """Where the settings lie that libraries found by tuning their kernels on this device."""
    return cache_folder() / "tuning" / device.key


@contextmanager
def kernels_kept(device: str) -> Iterator[None]:
    """Inside, kernels for a GPU are compiled and tuned only where no process of this machine has done so before."""
    if torch.device(device).type != "cuda":
        yield
        return
    use_kernel_caches()
    folder = str(tuning_folder(fingerprint(device)))
    gemlite.load_tuning(folder)
    gemlite.tune_alone(threads=os.cpu_count() or 1)
    try:
        yield
    finally:
        gemlite.save_tuning(folder)
