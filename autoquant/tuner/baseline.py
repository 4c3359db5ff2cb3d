"""Check the unquantized model before anything is measured: all plans are compared with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from autoquant.errors import ModelError, TextError, first_line
from autoquant.evaluators.outputs import AnyQuality, DivergenceQuality
from autoquant.evaluators.quality import FunctionQuality, ReferenceLosses, TextQuality
from autoquant.evaluators.text import Part
from autoquant.events import Listener, Notice
from autoquant.models import LoadedModel, ModelRequest, load_request
from autoquant.models.kinds import PROBE_TOKENS, sees_ahead
from autoquant.models.loaded import main_dtype

_NOTED, _REFUSED = 0.005, 0.02
"""What a cast may change before it is noted, and before it is refused: a fraction of perplexity,
nats of divergence, or the divergence of outputs."""


def check_reads_text(loaded: LoadedModel, quality: TextQuality) -> None:
    """Check that the model has embeddings for the text, and predicts without seeing the answer.

    Raises:
        TextError: It does not.
        ModelError: It fails on token ids.
    """
    windows = [*quality.parts.windows.values()]
    largest = max(int(each.max()) for each in windows)
    rows = loaded.vocabulary
    if rows is not None and largest >= rows:
        raise TextError(
            f"the tokenizer gives token ids up to {largest}, and the model has embeddings for ids"
            f" below {rows}: give the tokenizer that belongs to it, or give it embeddings for the"
            f" added tokens, model.resize_token_embeddings({largest + 1})"
        )
    if (loaded.max_positions or PROBE_TOKENS) < PROBE_TOKENS:
        return
    try:
        shift = sees_ahead(loaded.module, loaded.device, rows or largest + 1)
    except Exception as error:
        raise ModelError(
            f"the unquantized {type(loaded.module).__name__} fails on token ids"
            f" ({first_line(error, with_type=True)}): make it run by itself before it is searched"
        ) from error
    if shift:
        raise TextError(
            f"{type(loaded.module).__name__} is no causal language model: later tokens change its"
            f" first logits by {shift:.1%}, so it would see the answers of a text; judge it by a"
            " loss of your own, --quality package.module:callable"
        )


def check_baseline(
    request: ModelRequest, loaded: LoadedModel, quality: AnyQuality, listener: Listener
) -> ReferenceLosses:
    """Check that the unquantized model's loss is finite, and that of its stored dtype.

    A text is read in part. Its first proof reads the rest, by compiled code.

    Args:
        request: What `loaded` was loaded by.

    Returns:
        The losses that proofs need not compute again.

    Raises:
        ModelError: It is not. The message says which dtype to use.
    """
    losses: ReferenceLosses = {}
    if isinstance(quality, TextQuality):
        check_finite(loaded, quality.losses(loaded.module, "calibration"))
    elif isinstance(quality, FunctionQuality):  # outputs were tried when the measure was made
        losses = {"report": quality.losses(loaded.module, "report")}
        check_finite(loaded, losses["report"])
    if loaded.dtype != loaded.stored_dtype:
        _check_cast(request, loaded, quality, listener)
    return losses


def check_finite(loaded: LoadedModel, losses: Sequence[float]) -> None:
    """Refuse losses of the unquantized model that no plan can be compared with.

    Raises:
        ModelError: One is not finite. The message says what to do.
    """
    bad = sum(not math.isfinite(loss) for loss in losses)
    if not bad:
        return
    raise ModelError(
        f"the unquantized model's loss is not finite (NaN or infinity) on {bad} of {len(losses)}"
        f" samples in {loaded.dtype}: {_remedy(loaded)}"
    )


def _remedy(loaded: LoadedModel) -> str:
    for name, parameter in loaded.module.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            return f"its weight {name} is not finite, so download or save the model again"
    if loaded.dtype == "float16":
        return "its numbers overflow float16, so use --dtype bf16, or fp32"
    if loaded.dtype == "bfloat16":
        return "try --dtype fp32, and check the model by itself"
    return "check the model by itself, it cannot be searched so"


def _check_cast(
    request: ModelRequest, loaded: LoadedModel, quality: AnyQuality, listener: Listener
) -> None:
    """Compare the model with itself in its stored dtype.

    Raises:
        ModelError: It became another model.
    """
    stored = load_request(replace(request, dtype="auto"))
    reference = stored.module
    if isinstance(quality, DivergenceQuality):
        reference = _WithInputsIn(reference, main_dtype(reference))
    part: Part = "report" if isinstance(quality, FunctionQuality) else "calibration"
    found = quality.compare(loaded.module, reference, part)
    increase = _mean(found.losses) - _mean(found.reference)
    if quality.logarithmic:
        increase = math.expm1(increase)
    elif isinstance(quality, FunctionQuality):
        increase /= abs(_mean(found.reference)) or 1.0
    change = max(increase, found.kl or 0.0)
    if not change > _NOTED:
        return
    what = (
        f"in {loaded.dtype} the unquantized model is worse than in {loaded.stored_dtype}, as it is"
        f" stored: loss up by {increase:.1%}"
        + ("" if found.kl is None else f", divergence {found.kl:.2g} nats per token")
    )
    # A loss of the user's own has a scale that only the user knows.
    if change > _REFUSED and not isinstance(quality, FunctionQuality):
        raise ModelError(f"{what}; use --dtype auto, or fp32")
    listener(Notice(f"{what}; every plan is compared with the former"))


class _WithInputsIn(nn.Module):
    """Casts floating-point inputs to a module's dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._run, self._dtype = module, dtype

    def forward(self, *args: Any, **named: Any) -> Any:
        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

        args, named = tree_map_only(torch.Tensor, cast, (args, named))
        return self._run(*args, **named)


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)
