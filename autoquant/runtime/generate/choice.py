"""Choose the next tokens as a part of a step.

transformers' `generate` chooses them between two steps, by some twenty small operators. Launched
one by one, these take the host 200 to 400 us a token, longer than a small model's whole step takes
a GPU. As a part of the step they are replayed with it. That needs a rule that looks at nothing but
tensors which stay where they are; other rules are left to the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Warper = Callable[[Any, torch.Tensor], torch.Tensor]
"""A logits processor of transformers that looks at the scores only."""

_WARPERS = ("Temperature", "TopK", "TopP", "MinP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How the next token of a sequence is chosen.

    Attributes:
        sampled: Draw it; otherwise take the one with the highest score.
        ends: Ids that end a sequence.
        padding: What follows in a sequence that has ended.
        barred: Sequences must not end before `Choice.earliest`.
        settings: What tells the warpers from others of their kind.
        warpers: They change the scores, in this order.
    """

    sampled: bool
    ends: tuple[int, ...]
    padding: int
    barred: bool
    settings: tuple[Any, ...]
    warpers: tuple[Warper, ...] = field(compare=False)


def rule_of(
    processors: Sequence[Any], criteria: Sequence[Any], config: Any, prompt_tokens: int
) -> tuple[Rule, int] | None:
    """Return the rule of a call of `generate`, or None if a step cannot follow it.

    Args:
        processors: Its logits processors.
        criteria: Its stopping criteria, without the maximal length.
        config: Its generation config.

    Returns:
        The rule, and how many new tokens there must be before a sequence may end.
    """
    from transformers.generation import EosTokenCriteria

    if any(type(one) is not EosTokenCriteria for one in criteria):
        return None
    ends = {end for one in criteria for end in one.eos_token_id.flatten().tolist()}
    earliest = 0
    warpers: list[Warper] = []
    for one in processors:
        least = _least_tokens(one, prompt_tokens)
        if least is not None and not warpers and set(one.eos_token_id.flatten().tolist()) <= ends:
            earliest = max(earliest, least)
        elif _is_warper(one):
            warpers.append(one)
        else:
            return None
    rule = Rule(
        sampled=bool(config.do_sample),
        ends=tuple(sorted(ends)),
        padding=int(config._pad_token_tensor) if ends else 0,
        barred=earliest > 0,
        settings=tuple((type(one).__name__, *sorted(vars(one).items())) for one in warpers),
        warpers=tuple(warpers),
    )
    return rule, earliest


def _least_tokens(processor: Any, prompt_tokens: int) -> int | None:
    """Return how many new tokens a processor asks for before a text may end, or None."""
    from transformers.generation import logits_process as known

    if type(processor) is known.MinNewTokensLengthLogitsProcessor:
        skipped: int = processor.prompt_length_to_skip
        return int(processor.min_new_tokens) + skipped - prompt_tokens
    if type(processor) is known.MinLengthLogitsProcessor:
        return int(processor.min_length) - prompt_tokens
    return None


def _is_warper(processor: Any) -> bool:
    from transformers.generation import logits_process as known

    kinds = tuple(getattr(known, f"{name}LogitsWarper") for name in _WARPERS)
    plain = all(isinstance(value, (int, float)) for value in vars(processor).values())
    return type(processor) in kinds and plain


class Choice:
    """The tokens that were chosen last, in tensors that stay where they are.

    Args:
        batch: How many sequences.
        places: The most tokens that are chosen in one call of `generate`.

    Attributes:
        tokens: The last ones, `[batch, 1]`.
        unfinished: 1 for sequences that have not ended, `[batch]`.
        going_on: 1 if there is one of these, `[]`.
        made: All that were chosen so far, `[batch, places]`.
    """

    def __init__(self, batch: int, places: int, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.long, device=device)
        self.going_on = torch.ones((), dtype=torch.long, device=device)
        self.made = torch.zeros(batch, places, dtype=torch.long, device=device)
        # On the device, too: in a replayed graph the host cannot count.
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self._earliest = torch.zeros(1, dtype=torch.long, device=device)
        self._ends: dict[tuple[int, ...], torch.Tensor] = {}

    def tensors(self) -> list[torch.Tensor]:
        """Return what choosing changes, other than `made`."""
        return [self.tokens, self.unfinished, self.going_on, self._count]

    def start(
        self, rule: Rule, first: torch.Tensor, unfinished: torch.Tensor, earliest: int
    ) -> None:
        """Begin a call of `generate` whose first tokens `[batch]` are chosen already.

        Args:
            unfinished: As the attribute, after these tokens.
            earliest: How many new tokens there must be before a sequence may end.
        """
        if rule.ends not in self._ends:
            self._ends[rule.ends] = torch.tensor(rule.ends, device=first.device, dtype=torch.long)
        self.tokens.copy_(first[:, None])
        self.unfinished.copy_(unfinished)
        self.going_on.copy_(unfinished.max())
        self.made[:, :1].copy_(first[:, None])
        self._count.fill_(1)
        self._earliest.fill_(earliest)

    def take(self, rule: Rule, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next tokens by their logits `[batch, vocabulary]`, and return `tokens`."""
        ends = self._ends[rule.ends]
        chosen = self._chosen(rule, logits, ends)
        if rule.ends:
            # By arithmetic: a graph cannot branch on values.
            chosen = chosen * self.unfinished + rule.padding * (1 - self.unfinished)
            ended = (chosen[:, None] == ends).any(dim=-1)
            self.unfinished.mul_(~ended)
            self.going_on.copy_(self.unfinished.max())
        self.tokens.copy_(chosen[:, None])
        self.made.index_copy_(1, self._count, self.tokens)
        self._count.add_(1)
        return self.tokens

    def _chosen(self, rule: Rule, logits: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if not (rule.sampled or rule.barred or rule.warpers):
            return logits.argmax(dim=-1)
        scores = logits.float()
        if rule.barred:
            without_ends = scores.index_fill(-1, ends, -torch.inf)
            scores = torch.where(self._count < self._earliest, without_ends, scores)
        for warper in rule.warpers:
            scores = warper(None, scores)
        if rule.sampled:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)
