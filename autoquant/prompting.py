"""Generate text, timed as the user sees it: time to the first token, and the pace after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, TextStreamer

from autoquant.delivery.checkpoint import dtype_in
from autoquant.delivery.manifest import MANIFEST, read_manifest
from autoquant.delivery.on_disk import load
from autoquant.errors import DeviceError, ModelError, first_line
from autoquant.models.identity import adapter_in, has_adapter
from autoquant.models.loaded import is_causal_lm, max_positions, settle
from autoquant.models.placing import moved
from autoquant.models.pretrained import pretrained
from autoquant.models.targets import resolve_device
from autoquant.models.tokenizers import has_tokenizer, load_tokenizer
from autoquant.records import KvCache
from autoquant.runtime.generate.kv_codes import bytes_of_a_sequence, kv_cache_of
from autoquant.runtime.prepare import prepare

_WARMING_TOKENS = 8  # enough to compile, to capture a graph and to replay it

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Generated text and its times.

    Attributes:
        ids: Ids of the new tokens.
        first_token_s: Time from the call to the first new token.
        total_s: Time from the call to the last one.
    """

    ids: tuple[int, ...]
    text: str
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Return the pace after the first token, or None for fewer than two tokens."""
        tokens = len(self.ids) - 1
        seconds = self.total_s - self.first_token_s
        return tokens / seconds if tokens > 0 and seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Kept:
    """The keys and values of a sequence.

    Attributes:
        kind: How they are kept; None for the model's dtype.
        tokens: Of the sequence.
        memory_bytes: None if the model hides its sizes; so `plain_bytes`.
        plain_bytes: In the model's dtype.
    """

    kind: KvCache | None
    tokens: int
    memory_bytes: int | None
    plain_bytes: int | None


class Generator:
    """A language model on its device, with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, device: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device

    def reply(
        self,
        prompt: Mapping[str, torch.Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        show: Show | None = None,
        stop_after: int | None = None,
    ) -> Reply:
        """Continue a prompt.

        Args:
            prompt: The result of `encode` or `encode_chat`.
            temperature: 0 always takes the likeliest token.
            show: Called with each new piece of text.
            stop_after: Stop after this many new tokens. The request is otherwise the same as one
                for `max_new_tokens`, so it uses the same compiled code.
        """
        inputs = {name: tensor.to(self.device) for name, tensor in prompt.items()}
        watch = _Watch(self.tokenizer, show)
        criteria = []
        if stop_after is not None:
            criteria.append(_StopAt(inputs["input_ids"].shape[1] + stop_after))
        how: dict[str, Any] = {"do_sample": True, "temperature": temperature}
        if temperature == 0:  # None overrides the model's own sampling settings
            how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        model: Any = self.model
        watch.start()
        model.generate(
            **inputs,
            **how,
            max_new_tokens=max_new_tokens,
            streamer=watch,
            stopping_criteria=criteria,
            pad_token_id=_pad_id(self.tokenizer),
        )
        return watch.reply()

    def warm_up(
        self, prompt: Mapping[str, torch.Tensor], max_new_tokens: int, *, temperature: float = 0.0
    ) -> None:
        """Make a short request first, since the first one may compile and tune."""
        self.reply(prompt, max_new_tokens, temperature=temperature, stop_after=_WARMING_TOKENS)

    def kept(self, tokens: int) -> Kept:
        """Return what a sequence of `tokens` keeps of keys and values."""
        kind = kv_cache_of(self.model)
        sizes = [bytes_of_a_sequence(self.model, each, tokens) for each in (kind, None)]
        return Kept(kind, tokens, *sizes)

    def room(self, prompt: Mapping[str, torch.Tensor]) -> int | None:
        """Return how many tokens fit after a prompt, or None if the model has no limit."""
        positions = max_positions(self.model)
        return None if positions is None else positions - prompt["input_ids"].shape[1]


def problems_of(folder: Path) -> list[str]:
    """Return why a folder cannot generate text; empty if nothing is missing."""
    if not folder.is_dir():
        return [f"there is no folder {folder}"]
    if has_adapter(folder):
        return [adapter_in(folder)]
    if not (folder / "config.json").is_file():
        if (folder / MANIFEST).is_file():
            return [
                f"{folder} holds a module that is no language model: run it with autoquant.load"
            ]
        return [f"{folder} holds no model (no config.json)"]
    return (
        []
        if has_tokenizer(folder)
        else [f"{folder} has no tokenizer: put its tokenizer.json there"]
    )


def encode(tokenizer: Any, text: str) -> dict[str, torch.Tensor]:
    """Return a text as a prompt for `Generator.reply`.

    Raises:
        ModelError: The text has no token, or the tokenizer cannot read it.
    """
    try:
        encoded = dict(tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    except Exception as error:  # tokenizers raises no type of its own
        raise ModelError(
            f"the tokenizer cannot read the prompt ({first_line(error)}): download or save its"
            " tokenizer.json again"
        ) from error
    if not encoded["input_ids"].numel():
        raise ModelError("the prompt is empty: give some text")
    return encoded


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """Return a conversation as a prompt, using the model's chat template.

    Raises:
        ModelError: The template rejects these messages.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:
        raise ModelError(
            f"the model's chat template does not take the conversation: {first_line(error)}"
        ) from error
    return {name: tensor for name, tensor in encoded.items() if name != "token_type_ids"}


def tokenizer_of(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder."""
    return load_tokenizer(str(folder), trust_remote_code=trust_remote_code)


def device_of(folder: Path, name: str) -> str:
    """Return the device for a name. `auto` is what a plan was made for, if it is here."""
    planned = _manifest(folder).get("device")
    if name == "auto" and planned is not None:
        with suppress(DeviceError):
            return resolve_device(planned)
    return resolve_device(name)


def dtype_of(folder: Path) -> torch.dtype | None:
    """Return the dtype that a plan was made for, or None for an unquantized model."""
    manifest = _manifest(folder)
    return dtype_in(manifest) if "dtype" in manifest else None


def is_quantized(folder: Path) -> bool:
    """Check for a folder written by `autoquant apply` or a quantized model's `save_pretrained`."""
    return (folder / MANIFEST).is_file()


def load_generator(
    folder: Path,
    tokenizer: Any,
    device: str,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    kv_cache: str | None = None,
) -> Generator:
    """Load a folder that `autoquant apply` wrote, or an unquantized model.

    Args:
        dtype: Dtype of an unquantized model; None keeps its own.
        trust_remote_code: Run the code that the folder brings.
        kv_cache: How keys and values are kept, as `autoquant.prepare` takes it.

    Raises:
        TrustError: The model needs code that the folder brings, which is not trusted.
        ModelError: The folder holds no causal language model.
    """
    quantized = is_quantized(folder)
    if quantized:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "kv_cache": kv_cache}
        module = load(folder, device=device, **options)
    else:
        original = pretrained(folder, dtype, trust_remote_code=trust_remote_code)
        module = prepare(settle(moved(original, device)), kv_cache=kv_cache)
    if not is_causal_lm(module):
        raise ModelError(
            f"{folder} holds no causal language model, so it writes no text: "
            "run it with autoquant.load"
        )
    return Generator(module, tokenizer, device)


def _manifest(folder: Path) -> dict[str, Any]:
    return read_manifest(folder) if is_quantized(folder) else {}


def _pad_id(tokenizer: Any) -> int | None:
    padding: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if padding is None else padding


class _StopAt(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Stops at a given number of tokens, prompt included."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        enough = input_ids.shape[1] >= self._tokens
        return torch.full((len(input_ids),), enough, dtype=torch.bool, device=input_ids.device)


class _Watch(TextStreamer):  # type: ignore[misc, unused-ignore]
    """Times the tokens, and passes on text once it is final."""

    def __init__(self, tokenizer: Any, show: Show | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._ids: list[int] = []
        self._prompt_came = False
        self._started = self._first = self._last = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take tokens; the first call brings the prompt."""
        if self._prompt_came:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self._ids += value.flatten().tolist()
        self._prompt_came = True
        if self._show is not None:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show text that no later token can change."""
        if self._show is not None and text:
            self._show(text)

    def reply(self) -> Reply:
        """Return the text and its times."""
        return Reply(
            ids=tuple(self._ids),
            text=self.tokenizer.decode(self._ids, skip_special_tokens=True),
            first_token_s=self._first - self._started,
            total_s=self._last - self._started,
        )
