"""Run written programs in a process without autoquant, and compare them with the plan in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoquant.candidates.kernels.caches import untuned
from autoquant.delivery.likeness import divergence, read_inputs
from autoquant.delivery.programs.ranges import Range
from autoquant.delivery.programs.steps import Step, new_cache
from autoquant.delivery.programs.tracing import Subject
from autoquant.errors import CheckpointError
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.outputs import output_tensor
from autoquant.records import Workload
from autoquant.runtime.agreement import relative_error, unexplained_error
from autoquant.runtime.generate import attention
from autoquant.runtime.parts import as_if_compiled

_LONGEST_S = 900
_TIMED_STEPS = 32
_FEWEST_PLACES = 16
_READER = """
import statistics, sys, time
for name in ("autoquant", "torchao"):
    sys.modules[name] = None  # not to be imported, wherever it is installed
folder, asked, answer = sys.argv[1:]
sys.path.insert(0, folder)
import torch, run

asked = torch.load(asked, weights_only=True)
programs = run.Programs()

def took_ms(call, times):
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        if asked["device"] == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found)

outputs, times = [], {}
if asked["ids"] is None:
    outputs = [programs(*args, **kwargs) for args, kwargs in asked["calls"]]
    args, kwargs = asked["calls"][-1]
    times["request"] = took_ms(lambda: programs(*args, **kwargs), 10)
else:
    ids, first = asked["ids"], asked["first"]
    cache = programs.new_cache(ids.shape[1])
    outputs.append(programs.step(ids[:, :first], 0, cache))
    for place in range(first, ids.shape[1]):
        outputs.append(programs.step(ids[:, place : place + 1], place, cache))
    prompt, steps = asked["prompt"], asked["steps"]
    cache = programs.new_cache(prompt + steps)
    long = ids[:, torch.arange(prompt) % ids.shape[1]]
    times["prompt"] = took_ms(lambda: programs.step(long, 0, cache), 4)
    if steps:
        step = lambda: programs.step(ids[:, :1], prompt, cache)
        step()
        times["token"] = took_ms(step, steps)
torch.save({"outputs": outputs, "times": times}, answer)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How like the plan in memory programs are.

    Attributes:
        places: How many tokens, or outputs of a module, were compared.
        same: All outputs are bit for bit those of the plan.
        error: Norm of the difference from the plan's outputs, over the norm of these.
        same_tokens: Of how many places the likeliest token is the plan's; None if there is none.
        loss: Distance from the unquantized model: mean Kullback-Leibler divergence in nats a
            token, or for a module without tokens as `error`.
        plan_loss: The same of the plan.
        times_ms: Of one call (`request`), or of a prompt as in the workload (`prompt`) and of one
            token behind it (`token`).
    """

    places: int
    same: bool
    error: float
    same_tokens: int | None
    loss: float
    plan_loss: float
    times_ms: dict[str, float]


class Reading:
    """What is asked of the plan, of the unquantized model and of the programs.

    Made before the plan is applied, since it asks the unquantized model at once.
    """

    def __init__(self, loaded: LoadedModel, subject: Subject, workload: Workload) -> None:
        self._loaded, self._subject, self._workload = loaded, subject, workload
        self._ids: torch.Tensor | None = None
        if subject.steps:
            (ids,), _ = read_inputs(loaded)
            self._ids = ids.expand(workload.batch, -1)
        self._own = [subject.inputs(0)] if self._ids is None else []
        self._original = self._answers(loaded.module, self._own)

    def agreement(
        self, folder: Path, scratch: Path, found: Sequence[Range], *, exact: bool
    ) -> Agreement:
        """Run the programs of a folder in a new process and compare.

        Args:
            exact: Every kernel rounds the activation as that of the plan. Otherwise the outputs may
                be as far from the plan's as that makes them.

        Raises:
            CheckpointError: They do not run, or differ by more than rounding explains.
        """
        own = self._own
        calls = [self._subject.inputs(each.least) for each in found] + own if own else []
        answered = self._run(folder, scratch, calls)
        got = [output_tensor(each) for each in answered["outputs"]]
        module = self._loaded.module
        expected = self._answers(module, calls)
        flat, wanted = (_flat(each) for each in (got, expected))
        error = unexplained_error(flat, wanted, lambda: _flat(self._answers(module, calls)))
        if error is not None and exact:
            raise CheckpointError(
                f"the programs compute something else than the plan, off by {error:.2g} (relative);"
                " please report this"
            )
        of_original = got if self._ids is not None else got[-1:]
        of_plan = expected if self._ids is not None else expected[-1:]
        tokens = self._loaded.kind in ("causal_lm", "token_lm")
        return Agreement(
            places=sum(each.numel() // each.shape[-1] for each in got) if tokens else len(got),
            same=all(map(torch.equal, got, expected)),
            error=relative_error(flat, wanted),
            same_tokens=_same_tokens(got, expected) if tokens else None,
            loss=self._distance(of_original),
            plan_loss=self._distance(of_plan),
            times_ms=answered["times"],
        )

    def _distance(self, outputs: Sequence[torch.Tensor]) -> float:
        if self._loaded.kind == "module":
            return relative_error(_flat(outputs), _flat(self._original))
        return divergence(_rows(self._original), _rows(outputs))

    def _answers(self, module: nn.Module, calls: Sequence[Any]) -> list[torch.Tensor]:
        """Return the outputs of a model in memory, by its own code."""
        with torch.no_grad(), untuned():
            if self._ids is None:
                return [output_tensor(module(*args, **kwargs)) for args, kwargs in calls]
            return self._steps(module, self._ids)

    def _steps(self, module: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
        copied = shallow_copy(module)
        if attention.has_kernels(ids.device.type):
            attention.use_token_attention(copied)
        step = Step(copied)
        cache = new_cache(module, len(ids), max(ids.shape[1], _FEWEST_PLACES))

        def logits(start: int, end: int) -> torch.Tensor:
            place = torch.tensor(start, device=ids.device)
            found: torch.Tensor = step(ids[:, start:end], place, *cache)
            return found

        first = self._first(ids)
        with as_if_compiled():
            return [logits(0, first)] + [logits(at, at + 1) for at in range(first, ids.shape[1])]

    @staticmethod
    def _first(ids: torch.Tensor) -> int:
        """Return how many tokens are read as a prompt. The others come one by one."""
        return max(1, ids.shape[1] // 2)

    def _run(self, folder: Path, scratch: Path, calls: Sequence[Any]) -> dict[str, Any]:
        ids, workload = self._ids, self._workload
        asked, answer = scratch / "asked.pt", scratch / "answer.pt"
        request = {
            "device": torch.device(self._loaded.device).type,
            "ids": ids,
            "first": 0 if ids is None else self._first(ids),
            "prompt": workload.prompt_tokens,
            "steps": min(workload.new_tokens, _TIMED_STEPS),
            "calls": list(calls),
        }
        torch.save(request, asked)
        # Isolated: without PYTHONPATH, the user's packages and files in the working folder.
        command = [sys.executable, "-I", "-B", "-c", _READER, str(folder), str(asked), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S)
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"the programs did not end within {_LONGEST_S} s in a process of their own"
            ) from None
        if done.returncode or not answer.is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise CheckpointError(
                f"the programs do not run in a process of their own ({lines[-1]}); please report"
                " this"
            )
        result: dict[str, Any] = torch.load(answer, weights_only=True)
        return result


def _flat(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.flatten().float() for each in outputs])


def _rows(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.reshape(-1, each.shape[-1]) for each in outputs])


def _same_tokens(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> int:
    return int((_rows(got).argmax(-1) == _rows(expected).argmax(-1)).sum())
