"""Keep compiled and tuned kernels on disk, so that shapes, models and runs share them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from autoquant.cache import cache_folder, is_safe, unusable
from autoquant.candidates.kernels.library import TunedLibrary
from autoquant.candidates.registry import known_formats
from autoquant.devices import backend
from autoquant.errors import CandidateError
from autoquant.records import Device


def use_kernel_caches() -> None:
    """Have compilers keep their output in the cache folder, unless the user chose others.

    If it cannot be written, they keep it where they always do, among the temporary files.

    Raises:
        CandidateError: Others may write into that folder.
    """
    folder = _own_folder()
    if unusable():
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def tuning_folder(device: Device) -> Path:
    """Return where the settings lie that libraries found by tuning their kernels on this device.

    Raises:
        CandidateError: Others may write there.
    """
    return _own_folder() / "tuning" / device.key


def _own_folder() -> Path:
    """Return the cache folder, whose content is run.

    Raises:
        CandidateError: Others may write into it.
    """
    folder = cache_folder()
    if not is_safe(folder):
        raise CandidateError(
            f"others may write into {folder}, and the compiled code in it is run: take their right"
            " away (chmod o-w), or choose a folder of your own with AUTOQUANT_CACHE"
        )
    return folder


def load_tuning(folder: Path) -> None:
    """Have every library take over the settings in `folder`."""
    for library in _libraries():
        library.load(folder)


def save_tuning(folder: Path) -> None:
    """Have every library save its settings in `folder`."""
    for library in _libraries():
        library.save(folder)


def tune_briefly() -> None:
    """Have every library spend less time on each setting from now on."""
    for library in _libraries():
        library.tune_briefly()


@contextmanager
def untuned(*, timed: bool = False) -> Iterator[None]:
    """Inside, no library tunes its kernels.

    Args:
        timed: They should not be far slower than tuned ones.
    """
    with ExitStack() as stack:
        for library in _libraries():
            stack.enter_context(library.untuned(timed=timed))
        yield


@contextmanager
def kernels_kept(device: str) -> Iterator[None]:
    """Inside, kernels are compiled and tuned only if no process of this machine has done so before.

    This changes nothing on a device whose kernels are not prepared.
    """
    place = backend(device)
    if not place.prepares:
        yield
        return
    use_kernel_caches()
    folder = tuning_folder(place.fingerprint())
    load_tuning(folder)
    for library in _libraries():
        library.tune_alone(threads=os.cpu_count() or 1)
    try:
        yield
    finally:
        save_tuning(folder)


def _libraries() -> list[TunedLibrary]:
    """Return the libraries of all candidates that are installed."""
    kernels = [kernel for fmt in known_formats().values() for kernel in fmt.kernels]
    found = dict.fromkeys(kernel.library for kernel in kernels if kernel.library is not None)
    return [library for library in found if library.missing_reason() is None]
