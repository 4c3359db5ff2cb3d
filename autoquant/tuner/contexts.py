"""Score plans at long context, with keys and values in the model's dtype and in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates.kernels.caches import untuned
from autoquant.delivery.applier import applied
from autoquant.delivery.searched import load_searched
from autoquant.errors import TextError, WorkloadError
from autoquant.evaluators.contexts import long_windows, losses_with
from autoquant.evaluators.reading import file_pieces
from autoquant.evaluators.text import DEFAULT_TEXT
from autoquant.events import Listener, StageFinished, StageProgress, StageStarted, ignore, logged
from autoquant.intervals import paired_increase
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import ORIGINAL_LABEL, Interval, KvCache, Plan
from autoquant.runtime.generate.kv_codes import bytes_of_a_sequence, keeps_other
from autoquant.store import StudyFacts
from autoquant.tuner.prove import worst_numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRow:
    """One model with keys and values kept in one way.

    Attributes:
        plan_id: None for the unquantized model.
        kv_cache: None for the model's dtype.
        tokens: Of each window.
        increase: Of perplexity over the unquantized model with keys and values in its dtype; None
            for that one.
        kv_bytes: Of the keys and values of one sequence of so many tokens, or None if the model
            hides its sizes.
    """

    plan_id: str | None
    label: str
    kv_cache: KvCache | None
    tokens: int
    windows: int
    perplexity: float
    increase: Interval | None
    kv_bytes: int | None


def score_contexts(
    plans: Sequence[Plan],
    model: str,
    facts: StudyFacts,
    kinds: Sequence[KvCache],
    listener: Listener = ignore,
    *,
    tokens: int | None = None,
    text: Path | None = None,
    trust: Trust = NO_TRUST,
) -> list[ContextRow]:
    """Score the unquantized model and then each plan, each without and with each cache.

    Args:
        plans: At least one, all of one study.
        kinds: How keys and values are kept, beside the model's dtype.
        tokens: Of each window; None for those of a sequence of the study's workload.
        text: A file; None for the text that autoquant ships.

    Raises:
        TrustError: The model needs code that the user did not name.
        ModelError: Another model is at `model`.
        TextError: The text cannot be read, or is too short, or the model has no tokenizer.
        WorkloadError: The model keeps no keys and values, or has fewer positions.
    """
    listener = logged(listener)
    loaded = load_searched(plans[0], model, facts, None, trust)
    if reason := keeps_other(loaded.module):
        raise WorkloadError(f"--kv-cache is for models that keep keys and values: {reason}")
    if loaded.tokenizer is None:
        raise TextError("this model has no tokenizer to read a text with")
    workload = facts.workload
    asked = tokens or workload.prompt_tokens + workload.new_tokens
    if loaded.max_positions is not None and asked > loaded.max_positions:
        raise WorkloadError(
            f"a context of {asked} tokens was asked for, the model has {loaded.max_positions}"
            " positions: ask for fewer with --context"
        )
    name = f"the text {text}" if text else "the text that autoquant ships"
    windows = long_windows(file_pieces(text or DEFAULT_TEXT), name, loaded.tokenizer, asked)
    ways: list[KvCache | None] = [None, *kinds]
    listener(StageStarted("quality", (1 + len(plans)) * len(ways)))
    rows: list[ContextRow] = []
    reference: tuple[float, ...] = ()
    for plan in [None, *plans]:
        label = plan.label if plan else ORIGINAL_LABEL
        module = shallow_copy(loaded.module)
        if plan is not None:
            module = applied(plan, loaded.module, facts.calibration)
        for kind in ways:
            listener(StageProgress("quality", len(rows), f"{label}, {kind or loaded.dtype}"))
            losses = _losses(module, plan, windows, kind, loaded)
            reference = reference or losses
            rows.append(_row(plan, module, kind, asked, losses, reference))
    listener(StageFinished("quality", f"{len(rows)} on {len(windows)} windows of {asked} tokens"))
    return rows


def _losses(
    module: nn.Module,
    plan: Plan | None,
    windows: torch.Tensor,
    kind: KvCache | None,
    loaded: LoadedModel,
) -> tuple[float, ...]:
    with nullcontext() if plan is None else worst_numerics(module, plan), untuned():
        return losses_with(module, windows, kind, loaded.device)


def _row(
    plan: Plan | None,
    module: nn.Module,
    kind: KvCache | None,
    tokens: int,
    losses: Sequence[float],
    reference: Sequence[float],
) -> ContextRow:
    first = plan is None and kind is None
    return ContextRow(
        plan_id=plan.plan_id if plan else None,
        label=plan.label if plan else ORIGINAL_LABEL,
        kv_cache=kind,
        tokens=tokens,
        windows=len(losses),
        perplexity=math.exp(sum(losses) / len(losses)),
        increase=None if first else paired_increase(losses, reference, logarithmic=True),
        kv_bytes=bytes_of_a_sequence(module, kind, tokens),
    )
