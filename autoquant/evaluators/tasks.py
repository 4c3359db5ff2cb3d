"""Accuracy of models in memory on tasks of lm-evaluation-harness (the package `lm_eval`)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from autoquant.errors import TaskError, first_line
from autoquant.models.quiet import quiet
from autoquant.records import TaskScore

INSTALL = "pip install -c constraints.txt '.[eval]'"
_BATCH = 8
_BOOTSTRAPS = 1000
_PLAIN_FILTER = "none"
_STDERR = 2


class Tasks:
    """Tasks with the same requests for any number of models.

    Args:
        names: Names of tasks in lm-eval, or in the task files of `folder`.
        folder: A folder of more task files (YAML).
        limit: The number of samples from the start of each task, or None for all.

    Raises:
        TaskError: lm-eval is not installed, or a task or the folder does not exist.
    """

    def __init__(
        self, names: Sequence[str], *, folder: Path | None = None, limit: int | None = None
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise TaskError(f"there is no folder of task files at {folder}")
        self.names = tuple(dict.fromkeys(names))
        self.limit = limit
        self._library = _Library()
        with _silent():
            self._manager = self._library.manager(
                include_path=None if folder is None else str(folder)
            )
        known = set(self._manager.all_tasks)
        for name in self.names:
            if name not in known:
                raise TaskError(_unknown(name, known, folder))

    def score(self, module: nn.Module, tokenizer: Any) -> tuple[TaskScore, ...]:
        """Return the scores of a Hugging Face causal language model, task by task.

        Raises:
            TaskError: lm-eval cannot load a task's data or run the model on it.
        """
        with _silent(), _ties_kept(module):
            try:
                model = self._library.model(
                    pretrained=module, tokenizer=tokenizer, backend="causal", batch_size=_BATCH
                )
                results = self._library.evaluate(
                    model=model,
                    tasks=list(self.names),
                    task_manager=self._manager,
                    limit=self.limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=False,
                )
            except Exception as error:
                raise TaskError(
                    f"lm-eval cannot run {', '.join(self.names)} ({type(error).__name__}: "
                    f"{first_line(error)}): see that the tasks' data can be reached from here;"
                    " --debug shows where it failed"
                ) from error
        return tuple(self._scores(results))

    def _scores(self, results: Mapping[str, Any]) -> Iterator[TaskScore]:
        for task, values in results["results"].items():
            samples = results.get("n-samples", {}).get(task, {}).get("effective")
            for name, value in values.items():
                metric, _, variant = name.partition(",")
                if not variant or metric.endswith("_stderr") or isinstance(value, str):
                    continue
                error = values.get(f"{metric}_stderr,{variant}")
                yield TaskScore(
                    task=task,
                    metric=metric if variant == _PLAIN_FILTER else name,
                    value=float(value),
                    stderr=float(error) if isinstance(error, (int, float)) else None,
                    samples=samples,
                    limit=self.limit,
                    lm_eval_version=self._library.version,
                )


class _Library:
    """The parts of lm-eval in use. It may be missing, and its import takes seconds."""

    def __init__(self) -> None:
        try:
            with _silent():
                from lm_eval import simple_evaluate
                from lm_eval.models.huggingface import HFLM
                from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise TaskError(
                f"tasks need the package lm_eval, which cannot be imported ({first_line(error)}): "
                f"{INSTALL}"
            ) from error
        self.evaluate: Any = simple_evaluate
        self.model: Any = HFLM
        self.manager: Any = TaskManager
        self.version = metadata.version("lm_eval")


def _unknown(name: str, known: set[str], folder: Path | None) -> str:
    alike = get_close_matches(name, known, n=3)
    where = "lm-eval" if folder is None else f"lm-eval or {folder}"
    advice = (
        f"did you mean {', '.join(alike)}?"
        if alike
        else "give the folder of its task file with --tasks-path"
    )
    return f"there is no task {name!r} in {where}: {advice}"


@contextmanager
def _silent() -> Iterator[None]:
    """Discard what lm-eval and the programs that it starts print, log and draw."""
    kept = os.dup(_STDERR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(nowhere)
        os.close(kept)


@contextmanager
def _ties_kept(module: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights, which would replace a quantized head by the embedding."""
    module.tie_weights = lambda *_arguments, **_options: None
    try:
        yield
    finally:
        del module.tie_weights
