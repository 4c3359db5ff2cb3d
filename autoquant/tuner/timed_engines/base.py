"""What a timed engine is."""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from autoquant.errors import ConstraintError, WorkloadError
from autoquant.records import Workload
from autoquant.store import StudyFacts

REQUEST, FIRST = "request", "first token"
Times = dict[str, float]
"""Milliseconds of a request and of its first token, by `REQUEST` and `FIRST`."""
Run = Callable[[], tuple[Times, str]]
"""Times one request, and returns the engine's version, too."""
LIMIT_S = 3600
"""What a start or a request may take."""


class TimedEngine(ABC):
    """An engine's own program, found on this machine.

    Attributes:
        path: Of the program.
        name: As in `autoquant.engines.ENGINES`.
        program: The name of its program.
        how: How to get it, a part of a sentence.
        converts: It reads no model of transformers, so the unquantized model is exported, too.
    """

    name: str
    program: str
    how: str
    converts: bool = False

    def __init__(self, folder: Path | None) -> None:
        """Find the program.

        Args:
            folder: Where it is, or the environment whose `bin` it is in. None looks on the PATH,
                and beside this Python.

        Raises:
            ConstraintError: It is not there.
        """
        places = [Path(place) for place in os.get_exec_path()] + [Path(sys.executable).parent]
        if folder is not None:
            places = [folder, folder / "bin"]
        found = shutil.which(self.program, path=os.pathsep.join(map(str, places)))
        if found is None:
            asked = "on the PATH" if folder is None else f"in {folder} or {folder / 'bin'}"
            raise ConstraintError(
                f"the program {self.program} is not {asked}: {self.how}, and say where it is with"
                " --engine-path"
            )
        self.path = Path(found)

    def check(self, workload: Workload) -> None:
        """Refuse a workload that it has no way to time.

        Raises:
            WorkloadError: It is one.
            ConstraintError: The program cannot be used.
        """
        if not {phase.name for phase in workload.phases} & {"prefill", "decode"}:
            raise WorkloadError(f"{self.name} runs language models, and this study's has no prompt")

    @abstractmethod
    def model(self, folder: Path) -> Path:
        """Return what the engine reads of an exported folder."""

    @abstractmethod
    def memory_bytes(self, model: Path) -> int:
        """Return the bytes of the weights in what it reads."""

    @abstractmethod
    def started(
        self, models: Sequence[Path], dtype: str, facts: StudyFacts, *, trust_remote_code: bool
    ) -> AbstractContextManager[Sequence[Run]]:
        """Start the engine with each model, and end it after use.

        Args:
            dtype: Of what is not quantized, e.g. `bfloat16`.

        Raises:
            ProcessDiedError: It failed, and the error says how. So do the runs.
        """
