"""The interface of a library that tunes its kernels for each shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path


class TunedLibrary(ABC):
    """A library that tunes a kernel for a shape when it is first called, which takes seconds.

    A candidate names its library in `Kernel.library`, and nothing else names it:
    `autoquant.candidates.kernels.caches` asks the libraries of all candidates that are installed.
    """

    @abstractmethod
    def missing_reason(self) -> str | None:
        """Return why the library cannot be used and what to install, or None.

        Only if None is the rest called.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take over the settings that earlier processes saved in `folder`, which may not exist."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Save the settings found so far in `folder`, in a file that no other process writes."""

    @abstractmethod
    def tune_briefly(self) -> None:
        """From now on spend less time on each setting: many processes tune at once."""

    @abstractmethod
    def tune_alone(self, threads: int) -> None:
        """From now on tune with care: no other process uses the device.

        Args:
            threads: How many settings to compile at once.
        """

    @abstractmethod
    def untuned(self, *, timed: bool) -> AbstractContextManager[None]:
        """Return a context in which shapes are not tuned. Settings found before are used.

        Args:
            timed: Take the fastest of a few settings for other shapes. Otherwise take any: only
                results matter.
        """
