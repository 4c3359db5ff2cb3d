"""llama.cpp, timed by its own `llama-bench`.

It comes with each release and package of llama.cpp, tells its version and each time as JSON, and
needs nothing of Python. Bindings would be one more build of llama.cpp than the user serves with.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from autoquant.errors import ProcessDiedError, WorkloadError
from autoquant.records import Workload
from autoquant.store import StudyFacts
from autoquant.tuner.timed_engines.base import FIRST, LIMIT_S, REQUEST, Run, TimedEngine, Times


class LlamaCpp(TimedEngine):
    """`llama-bench`, started once for each request."""

    name = "llama.cpp"
    program = "llama-bench"
    how = "install llama.cpp (its releases, conda-forge and Homebrew have it) or build it"
    converts = True

    def check(self, workload: Workload) -> None:
        if workload.batch > 1:
            raise WorkloadError(
                f"{self.program} times one sequence, and this study's workload has a batch of"
                f" {workload.batch}: search with --batch 1 to time plans in llama.cpp"
            )
        super().check(workload)

    def model(self, folder: Path) -> Path:
        return folder / "model.gguf"

    def memory_bytes(self, model: Path) -> int:
        return model.stat().st_size

    @contextmanager
    def started(
        self, models: Sequence[Path], dtype: str, facts: StudyFacts, *, trust_remote_code: bool
    ) -> Iterator[Sequence[Run]]:
        yield [partial(self._run, model, facts) for model in models]

    def _run(self, model: Path, facts: StudyFacts) -> tuple[Times, str]:
        """Run it once on a prompt alone, and on a prompt with its new tokens.

        A prompt gives the first new token, so as many steps follow as there are new tokens but one.
        """
        prompt, further = facts.workload.prompt_tokens, facts.workload.new_tokens - 1
        command = [str(self.path), "-m", str(model), "-p", str(prompt), "-n", "0", "-r", "1"]
        command += ["-o", "json"]
        if further:
            command += ["-pg", f"{prompt},{further}"]
        if facts.device.type == "cpu" and facts.device.threads:
            command += ["-t", str(facts.device.threads), "-ngl", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        try:
            runs: list[Mapping[str, Any]] = json.loads(done.stdout)
            times = {int(run["n_gen"]): float(run["avg_ns"]) / 1e6 for run in runs}
            version = f"{runs[0]['build_commit']} (build {runs[0]['build_number']})"
            return {REQUEST: times[further], FIRST: times[0]}, version
        except (ValueError, LookupError, TypeError) as error:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ProcessDiedError(
                f"{self.program} gave no times (exit code {done.returncode}), and said: {said}"
            ) from error
