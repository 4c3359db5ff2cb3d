"""`autoquant generate`: print a model's text as it comes, then how fast it came."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoquant.cli.options import (
    FolderArgument,
    FolderDeviceOption,
    KvCacheChoice,
    KvCacheOption,
    TrustRemoteCodeOption,
)
from autoquant.cli.output import JsonFlag, echo, print_json
from autoquant.cli.trust import trusting

if TYPE_CHECKING:
    import torch

    from autoquant.events import Listener
    from autoquant.prompting import Generator, Reply, Show
    from autoquant.report.tables.generate import Speed, TextDifference

_DEFAULT_PROMPT = "The most important thing about a good book is"
_LEAST_TEMPERATURE = 1e-30  # scores that are divided by less overflow float32
_ROUNDS = 3  # of requests to both models in turn


@dataclass(frozen=True, slots=True)
class _Request:
    """One request to a model."""

    prompt: Mapping[str, torch.Tensor]
    max_new_tokens: int
    temperature: float

    @property
    def tokens(self) -> int:
        """The length of the prompt."""
        return int(self.prompt["input_ids"].shape[1])


def generate(
    folder: FolderArgument,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to continue. Default: stdin, else a short one."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the text to continue.", show_default=False),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Talk with the model, line by line; Ctrl-D ends.", show_default=False
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest text to write.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, metavar="T", help="Sample; 0 takes the likeliest token every time."),
    ] = 0.0,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="ORIGINAL",
            help="Also time the unquantized model of this folder, in turn.",
            show_default=False,
        ),
    ] = None,
    kv_cache: KvCacheOption = None,
    device: FolderDeviceOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Continue a text with the model of DIR, print it as it comes, and say how fast it came.

    The first request of a process may compile and tune. So a short request, which is not shown,
    comes first.
    """
    _check_together(
        chat, prompt=prompt, prompt_file=prompt_file, compare=compare, json=as_json or None
    )
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("cannot be combined with --prompt-file", param_hint="--prompt")
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise typer.BadParameter(
            f"scores cannot be divided by {temperature}: give 0 for the likeliest token every time,"
            " or a number such as 0.8",
            param_hint="--temperature",
        )
    if prompt is None and prompt_file is not None:
        prompt = _read(prompt_file)
    from autoquant import prompting
    from autoquant.errors import ModelError

    places = [folder] if compare is None else [folder, compare]
    if problems := [problem for place in places for problem in prompting.problems_of(place)]:
        raise ModelError("; ".join(problems))
    place = prompting.device_of(folder, device)
    if chat:
        talk = partial(_chat, folder, place, max_new_tokens, temperature, kv_cache=kv_cache)
        return trusting(talk, trust_remote_code=trust_remote_code)
    answer = partial(
        _answer,
        places,
        prompt,
        place,
        max_new_tokens,
        temperature,
        as_json=as_json,
        kv_cache=kv_cache,
    )
    return trusting(answer, trust_remote_code=trust_remote_code)


def _answer(
    places: Sequence[Path],
    prompt: str | None,
    device: str,
    max_new_tokens: int,
    temperature: float,
    *,
    as_json: bool,
    kv_cache: KvCacheChoice | None,
    trust_remote_code: bool,
) -> None:
    """Continue the prompt with the model of the first place, timed in turn with the others."""
    from autoquant import prompting
    from autoquant.report.progress import listening
    from autoquant.report.tables.generate import Speeds

    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer = prompting.tokenizer_of(places[0], **code)
    text = _prompt_of_stdin() if prompt is None else prompt
    request = _Request(prompting.encode(tokenizer, text), max_new_tokens, temperature)
    dtype = prompting.dtype_of(places[0])
    generators: list[Generator] = []
    ready_s: list[float] = []
    with listening() as listener:
        for each in places:
            started = time.perf_counter()
            if not generators:  # what is compared keeps them in its dtype
                code |= {"kv_cache": kv_cache}
            load = partial(prompting.load_generator, each, tokenizer, device, dtype, **code)
            code.pop("kv_cache", None)
            generators.append(_load(load, each, device, listener))
            request = _fitting(generators[-1], request, each, listener)
            _warm_up(generators[-1], request, started, listener, each)
            ready_s.append(time.perf_counter() - started)
    if not as_json:
        _show(text)
    replies = _replies(generators, request, None if as_json else _show)
    speeds = Speeds(
        models=tuple(map(_speed, ready_s, replies)),
        prompt_tokens=request.tokens,
        rounds=_ROUNDS,
        sampled=temperature > 0,
        difference=None if temperature else _difference(replies, tokenizer),
        kept=generators[0].kept(request.tokens + request.max_new_tokens),
    )
    if as_json:
        print_json({"text": replies[0][0].text, **speeds.as_object()})
        return
    echo("\n")
    for line in speeds.lines():
        echo(line)


def _check_together(chat: bool, **others: Any) -> None:
    given = ["--" + name.replace("_", "-") for name, value in others.items() if value is not None]
    if chat and given:
        raise typer.BadParameter(f"cannot be combined with {', '.join(given)}", param_hint="--chat")


def _read(file: Path) -> str:
    from autoquant.errors import TextError
    from autoquant.files import read_text

    try:
        return read_text(file)
    except UnicodeError as error:
        raise TextError(f"cannot read {file}: it is no UTF-8 text") from error
    except (OSError, ValueError) as error:
        raise TextError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _prompt_of_stdin() -> str:
    """Return the text that is piped in, or else a short default."""
    if not sys.stdin.isatty() and (text := sys.stdin.read()).strip():
        return text
    echo(
        f"prompt: {_DEFAULT_PROMPT!r} (give your own with --prompt, --prompt-file or on stdin)",
        err=True,
    )
    return _DEFAULT_PROMPT


def _load(
    load: Callable[[], Generator], folder: Path, device: str, listener: Listener
) -> Generator:
    from autoquant import prompting
    from autoquant.events import StageFinished, StageStarted
    from autoquant.report.units import digits

    listener(StageStarted("load", 1))
    started = time.perf_counter()
    generator = load()
    kind = "quantized" if prompting.is_quantized(folder) else "unquantized"
    took = digits(time.perf_counter() - started)
    listener(StageFinished("load", f"{kind} model on {device} in {took} s"))
    return generator


def _fitting(generator: Generator, request: _Request, folder: Path, listener: Listener) -> _Request:
    """Return the request, shortened to the tokens that the model has room for."""
    from autoquant.errors import ModelError
    from autoquant.events import Notice

    room = generator.room(request.prompt)
    if room is None or room >= request.max_new_tokens:
        return request
    limit = f"{folder} takes {room + request.tokens} in all"
    if room < 1:
        raise ModelError(f"the prompt has {request.tokens} tokens, and {limit}: shorten it")
    listener(Notice(f"{room} new tokens instead of {request.max_new_tokens}: {limit}"))
    return replace(request, max_new_tokens=room)


def _warm_up(
    generator: Generator, request: _Request, started: float, listener: Listener, folder: Path
) -> None:
    """Make a short request first, since it may compile and tune.

    Raises:
        ModelError: The model does not run: the numbers in its files do not fit together.
    """
    from autoquant.errors import AutoquantError, ModelError, first_line
    from autoquant.events import StageFinished, StageStarted
    from autoquant.report.units import digits

    listener(StageStarted("prepare", 1))
    before = time.perf_counter()
    try:
        generator.warm_up(request.prompt, request.max_new_tokens, temperature=request.temperature)
    except AutoquantError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model in {folder} does not run ({first_line(error)}): save or download it again,"
            " with the config.json and the tokenizer that belong to it"
        ) from error
    now = time.perf_counter()
    took, ready = digits(now - before), digits(now - started)
    listener(
        StageFinished("prepare", f"a first short request took {took} s; ready after {ready} s")
    )


def _replies(
    generators: Sequence[Generator], request: _Request, show: Show | None
) -> list[list[Reply]]:
    """Return the replies of each model; two models take turns. Show the first reply."""
    replies: list[list[Reply]] = [[] for _ in generators]
    for turn in range(1 if len(generators) == 1 else _ROUNDS):
        for kept, generator in zip(replies, generators, strict=True):
            shown = show if turn == 0 and kept is replies[0] else None
            reply = generator.reply(
                request.prompt, request.max_new_tokens, temperature=request.temperature, show=shown
            )
            kept.append(reply)
    return replies


def _show(text: str) -> None:
    echo(text, nl=False)


def _speed(ready_s: float, replies: Sequence[Reply]) -> Speed:
    """Return the medians of replies to the same request."""
    from autoquant.report.tables.generate import Speed

    rates = [reply.tokens_per_s for reply in replies if reply.tokens_per_s is not None]
    return Speed(
        ready_s=ready_s,
        first_token_s=median(reply.first_token_s for reply in replies),
        tokens_per_s=median(rates) if rates else None,
        new_tokens=round(median(len(reply.ids) for reply in replies)),
        total_s=median(reply.total_s for reply in replies),
    )


def _difference(replies: Sequence[Sequence[Reply]], tokenizer: Any) -> TextDifference | None:
    """Return where the greedy texts of two models first differ, or None."""
    from autoquant.report.tables.generate import TextDifference

    if len(replies) < 2:
        return None
    ours, theirs = (kept[0].ids for kept in replies)
    for place in range(max(len(ours), len(theirs))):
        # Slices, as one text may have ended here.
        one, other = ours[place : place + 1], theirs[place : place + 1]
        if one != other:
            return TextDifference(
                token=place + 1,
                text=tokenizer.decode(list(one)),
                original_text=tokenizer.decode(list(other)),
            )
    return None


def _chat(
    folder: Path,
    device: str,
    max_new_tokens: int,
    temperature: float,
    *,
    kv_cache: KvCacheChoice | None,
    trust_remote_code: bool,
) -> None:
    from autoquant import prompting
    from autoquant.errors import ModelError
    from autoquant.report.progress import listening
    from autoquant.report.tables.generate import pace_words

    tokenizer = prompting.tokenizer_of(folder, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder} has no chat template, so it is no model to talk with: use --prompt"
        )

    def asked(conversation: list[dict[str, str]]) -> _Request:
        prompt = prompting.encode_chat(tokenizer, conversation)
        return _fitting(generator, _Request(prompt, max_new_tokens, temperature), folder, listener)

    started = time.perf_counter()
    with listening() as listener:
        load = partial(
            prompting.load_generator,
            folder,
            tokenizer,
            device,
            trust_remote_code=trust_remote_code,
            kv_cache=kv_cache,
        )
        generator = _load(load, folder, device, listener)
        _warm_up(
            generator, asked([{"role": "user", "content": "Hello"}]), started, listener, folder
        )
    messages: list[dict[str, str]] = []
    while (said := _line()) is not None:
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        with listening() as listener:
            request = asked(messages)
        reply = generator.reply(
            request.prompt, request.max_new_tokens, temperature=temperature, show=_show
        )
        messages.append({"role": "assistant", "content": reply.text})
        echo()
        echo(f"({pace_words(reply.first_token_s, reply.tokens_per_s)})", err=True)


def _line() -> str | None:
    """Return what the user types, or None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
