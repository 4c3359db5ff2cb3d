"""The loop that a user runs, and its time.

It is `generate` of a model that generates, and one call of any other module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoquant.candidates.kernels.caches import kernels_kept, untuned
from autoquant.devices.effort import TimingEffort, timing_effort
from autoquant.errors import WorkloadError
from autoquant.models import LoadedModel
from autoquant.models.outputs import CHECK_TOKENS, output_tensor
from autoquant.models.quiet import quiet
from autoquant.records import Interval, Loop, RunTimes, Workload
from autoquant.runtime.inputs import start_ids, workload_inputs
from autoquant.runtime.modules import compile as compiled
from autoquant.runtime.prepare import prepare
from autoquant.runtime.request import (
    MAX_RELATIVE_ERROR,
    WARM_UP_CALLS,
    RequestTimes,
    Rounds,
    UntilEnough,
    paired,
    rounds_in_turn,
)

_GENERATE = ("causal_lm", "encoder_decoder")
_REQUEST, _FIRST = "request", "first token"
_CHECK_NEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class UserLoop:
    """One request of a workload to one model.

    Attributes:
        new_tokens: How many the request asks for; 0 for a forward pass.
    """

    loop: Loop
    new_tokens: int
    calls: Mapping[str, Callable[[], Any]] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The names of the calls that are timed."""
        return list(self.calls)

    def run(self, name: str) -> None:
        with torch.no_grad():
            self.calls[name]()

    def reset(self, name: str) -> None:
        """Do nothing: every call is a whole one."""

    def limit(self, name: str) -> int:
        return 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The way a user runs a model.

    Attributes:
        kind: As for `autoquant.models.LoadedModel`.
        sample_inputs: Arguments of one forward pass of a `module`, or what an `encoder_decoder`
            reads.
    """

    kind: str
    workload: Workload
    device: str
    sample_inputs: Sequence[Any] | Mapping[str, Any] | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, workload: Workload) -> Usage:
        """Return how a loaded model is used, on its device and with the inputs of the workload."""
        return cls(
            kind=loaded.kind,
            workload=workload,
            device=loaded.device,
            sample_inputs=workload_inputs(loaded, workload),
        )

    @property
    def loop(self) -> Loop:
        return "generate" if self.kind in _GENERATE else "forward"

    def loop_of(self, module: nn.Module) -> UserLoop:
        """Return the loop of a model, and prepare the model for it in place."""
        if self.loop == "forward":
            forward, inputs = compiled(module), self._inputs()
            return UserLoop("forward", 0, {_REQUEST: lambda: _call(forward, inputs)})
        model, prompt, tokens = prepare(module), self._prompt(module), self.workload.new_tokens
        calls: dict[str, Callable[[], Any]] = {
            _REQUEST: lambda: generate_from(model, prompt, tokens, exactly=True)
        }
        if tokens > 1:
            calls[_FIRST] = lambda: generate_from(model, prompt, 1, exactly=True)
        return UserLoop("generate", tokens, calls)

    def answer_of(self, module: nn.Module, *, replayed: bool = False) -> Answer:
        """Return what a model gives for the prompt, or for the inputs.

        The output is for the beginning of the prompt. Tokens are generated for all of it, so that
        the steps are those that are timed.

        Args:
            replayed: Generate by compiled steps; otherwise as transformers itself does, which
                compiles and tunes nothing.
        """
        if self.loop == "forward":
            with torch.no_grad(), untuned():
                output = output_tensor(_call(module, self._inputs()))
            return Answer(output.float().cpu(), None)
        prompt = self._prompt(module)
        with torch.no_grad(), untuned():
            output = output_tensor(module(**self._beginning(module, prompt)))
        tokens = min(_CHECK_NEW_TOKENS, self.workload.new_tokens)
        with nullcontext() if replayed else untuned():
            ids = generate_from(module, prompt, tokens, disable_compile=not replayed)
        return Answer(output.float().cpu(), ids.cpu())

    def _beginning(self, module: nn.Module, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a forward pass on the beginning of a request."""
        if self.kind == "causal_lm":
            return {"input_ids": prompt["input_ids"][:1, :CHECK_TOKENS]}
        first = {name: value[:1] for name, value in prompt.items()}
        return first | {"decoder_input_ids": start_ids(module, 1, self.device)}

    def next_logits(self, model: Any, row: int, before: torch.Tensor) -> torch.Tensor:
        """Return a model's logits of the token behind ids `[1, tokens]` of a row of a request."""
        arguments: dict[str, Any] = {"input_ids": before.to(self.device)}
        if self.kind != "causal_lm":
            read = {name: value[row : row + 1] for name, value in self._prompt(model).items()}
            arguments = read | {"decoder_input_ids": before.to(self.device)}
        with torch.no_grad(), untuned():
            logits: torch.Tensor = model(**arguments).logits[0, -1].float()
        return logits

    def _prompt(self, module: nn.Module) -> dict[str, Any]:
        """Return what `generate` reads: of a causal model random token ids `[batch, tokens]`.

        They are the same for every model of a vocabulary.
        """
        if self.kind != "causal_lm":
            inputs = self._inputs()
            assert isinstance(inputs, Mapping)  # a reader names them
            return dict(inputs)
        config: Any = module.config
        vocabulary = config.get_text_config(decoder=True).vocab_size
        shape = (self.workload.batch, self.workload.prompt_tokens)
        ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
        ids = ids.to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _inputs(self) -> Sequence[Any] | Mapping[str, Any]:
        if self.kind == "token_lm":
            shape = (self.workload.batch, self.workload.prompt_tokens)
            return (torch.zeros(shape, dtype=torch.long, device=self.device),)
        if self.sample_inputs is None:
            raise WorkloadError("this model needs sample inputs, and there are none")
        return self.sample_inputs


@dataclass(frozen=True, slots=True)
class Answer:
    """Logits or other output of a model, and what it generated, both on the CPU.

    Attributes:
        output: In float32.
        ids: Prompt and new tokens `[batch, tokens]`, or None if the model generates nothing.
    """

    output: torch.Tensor
    ids: torch.Tensor | None

    def error(self, expected: Answer) -> float:
        """Return the relative difference from the expected output.

        0 if they are equal bit for bit.
        """
        if self.output.shape != expected.output.shape:
            return math.inf
        difference = (self.output - expected.output).norm() / expected.output.norm().clamp(
            min=1e-30
        )
        return float(difference)


def _call(forward: Callable[..., Any], inputs: Sequence[Any] | Mapping[str, Any]) -> Any:
    return forward(**inputs) if isinstance(inputs, Mapping) else forward(*inputs)


def generate(
    model: Any, prompt: torch.Tensor, tokens: int, *, exactly: bool = False, **settings: Any
) -> torch.Tensor:
    """Return the prompt and up to `tokens` greedily chosen tokens behind it: ids `[batch, tokens]`.

    Args:
        exactly: Do not end before.
    """
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    return generate_from(model, inputs, tokens, exactly=exactly, **settings)


def generate_from(
    model: Any, inputs: Mapping[str, Any], tokens: int, *, exactly: bool = False, **settings: Any
) -> torch.Tensor:
    """Do as `generate` for the inputs of any model that generates.

    Of an encoder-decoder the ids are the decoder's.
    """
    ends = {"min_new_tokens": tokens} if exactly else {}
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    first = [inputs["input_ids"]] if "input_ids" in inputs else []
    with torch.no_grad(), quiet():
        made: torch.Tensor = model.generate(
            *first,
            **others,
            max_new_tokens=tokens,
            do_sample=False,
            **ends,
            **settings,
        )
    return made


def first_difference(usage: Usage, model: Any, made: Answer, expected: Answer) -> str:
    """Return where generated ids differ by more than a near tie, or an empty string.

    Two tokens are a near tie if the gap between their logits is small against the distance from the
    best logit to the mean.
    """
    if made.ids is None or expected.ids is None:
        return ""
    if len(made.ids) != len(expected.ids):
        return "generate gives another number of texts than it did in memory"
    for row, (ids, wanted) in enumerate(zip(made.ids, expected.ids, strict=True)):
        pairs = zip(ids.tolist(), wanted.tolist(), strict=False)
        place = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if place is None:
            if ids.shape != wanted.shape:
                return "generate ends at another token than it did in memory"
            continue
        ours, theirs = int(ids[place]), int(wanted[place])
        if place == 0 or not _is_near_tie(
            usage.next_logits(model, row, ids[None, :place]), ours, theirs
        ):
            return (
                f"generate gives another token at position {place} than it did in memory: {ours}"
                f" instead of {theirs}"
            )
    return ""


def _is_near_tie(logits: torch.Tensor, ours: int, theirs: int) -> bool:
    gap = (logits[ours] - logits[theirs]).abs()
    height = (logits.max() - logits.mean()).clamp(min=1e-30)
    return bool(gap / height <= MAX_RELATIVE_ERROR)


@dataclass(frozen=True, slots=True)
class UserTimes:
    """Times of one model.

    Attributes:
        ratio: Its request time over that of the first model that was timed; None for that one.
    """

    times: RunTimes
    ratio: Interval | None


def warm_up(loops: Sequence[UserLoop], device: str) -> None:
    """Run each call of loops until it compiles and tunes nothing more.

    A request of many tokens runs a step many times, so one is enough.
    """
    with kernels_kept(device):
        for loop in loops:
            for name in loop.names * (1 if loop.new_tokens > WARM_UP_CALLS else WARM_UP_CALLS):
                loop.run(name)


def time_user_loops(
    loops: Sequence[UserLoop], device: str, effort: TimingEffort | None = None
) -> tuple[list[UserTimes], str]:
    """Time warm loops in turn, the first being that of the unquantized model.

    Rounds go on until every ratio is known well enough, within the limits of the effort.

    Args:
        effort: None for the process's own, `timing_effort()`.

    Returns:
        Times of each, and a note if other programs disturbed them.
    """
    effort = effort or timing_effort()

    def enough(rounds: Rounds) -> bool:
        ratios = [_ratio(paired(taken, rounds[0], "")) for taken in rounds[1:]]
        return all(
            ratio.high - ratio.value < effort.loop_precision * ratio.value for ratio in ratios
        )

    until = UntilEnough(enough, effort.fewest_loop_rounds, effort.loop_rounds, effort.loop_limit_s)
    rounds, note = rounds_in_turn(loops, loops[0].names, device, effort, until)
    pairs = [paired(taken, rounds[0], note) for taken in rounds]
    found = [
        _user_times(pair, loop, first=number == 0)
        for number, (pair, loop) in enumerate(zip(pairs, loops, strict=True))
    ]
    return found, note


def _ratio(times: RequestTimes) -> Interval:
    return times.ratio({_REQUEST: 1, _FIRST: 0})


def _user_times(pair: RequestTimes, loop: UserLoop, *, first: bool) -> UserTimes:
    request_ms, first_ms = pair.plan_ms[_REQUEST], pair.plan_ms.get(_FIRST)
    if loop.loop == "forward":
        times = RunTimes(request_ms=request_ms)
    elif first_ms is None:
        times = RunTimes(request_ms=request_ms, first_token_ms=request_ms)
    else:
        step_ms = (request_ms - first_ms) / (loop.new_tokens - 1)
        times = RunTimes(request_ms=request_ms, first_token_ms=first_ms, step_ms=step_ms)
    return UserTimes(times, None if first else _ratio(pair))
