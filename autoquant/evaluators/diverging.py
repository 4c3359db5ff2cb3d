"""How far a model's outputs diverge from the unquantized model's, by what they are.

- Classes, and the decoder's next tokens: the Kullback-Leibler divergence of the probabilities, in
  nats, the mean of those positions that count. Classes that do not exclude one another have one
  such divergence each, and these are added up.
- Scores, of a model with one class: the squared difference over the variance of the unquantized
  model's scores, which is what matters for ranking.
- Vectors: 1 minus the cosine of the angle between both, the mean over tokens or patches where a
  model leaves it to others to pool them.
- Anything else: ||y - y0||^2 / ||y0||^2.

The unquantized model has 0 in each, so the divergence is its own increase. Labels, where there are
any, are not what limits keep to: how many are right is shown beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from autoquant.evaluators.outputs import WORST, DivergenceQuality
from autoquant.evaluators.quality import Comparison, Enough
from autoquant.evaluators.rows import JudgedRows, Rows
from autoquant.evaluators.text import Part
from autoquant.models.loaded import device_of
from autoquant.models.reader import on

Compares = Literal["classes", "labels", "scores", "vectors", "outputs"]
"""As above; `labels` are classes that do not exclude one another."""
WORDS: dict[Compares, str] = {
    "classes": "KL divergence of the probabilities, in nats",
    "labels": "KL divergence of the probabilities of each label, in nats",
    "scores": "squared difference of the scores over their variance",
    "vectors": "1 - cosine of its vectors with the unquantized model's",
    "outputs": "||y - y0||^2 / ||y0||^2 of its outputs",
}
_POOLING = "1_Pooling/config.json"


@dataclass(frozen=True, slots=True)
class Measure:
    """What is compared of a model's output.

    Attributes:
        pooled: How vectors of tokens become one: by their mean, or the first or the last of them.
            None if each is compared.
        spread: The variance of the unquantized model's scores.
    """

    compares: Compares
    pooled: Literal["mean", "first", "last"] | None = None
    spread: float = 1.0


class RowsQuality(DivergenceQuality):
    """Divergence of a model's outputs on rows of what it reads."""

    def __init__(self, rows: JudgedRows, measure: Measure) -> None:
        self.rows, self.measure = rows, measure
        self.key = f"{rows.key}-{measure.compares}"

    def compare(
        self,
        module: nn.Module,
        reference: nn.Module,
        part: Part,
        known: Sequence[float] = (),
        enough: Enough | None = None,
    ) -> Comparison:
        device = device_of(reference)
        losses: list[float] = []
        right = reference_right = counted = 0
        for rows in self.rows.parts[part]:
            expected = _run(reference, rows, device)
            found = expected if module is reference else _run(module, rows, device)
            losses += self._losses(expected, found, rows)
            if self.rows.labelled:
                right += right_labels(found, rows)
                reference_right += right_labels(expected, rows)
                counted += _labels(rows)
        shown = (right, reference_right, counted) if counted else None
        return Comparison(tuple(losses), (0.0,) * len(losses), None, right=shown)

    def increase_over(self, reference: nn.Module, part: Part) -> Callable[[nn.Module], float]:
        device = device_of(reference)
        expected = [(rows, _run(reference, rows, device)) for rows in self.rows.parts[part]]

        def increase(module: nn.Module) -> float:
            losses = [
                loss
                for rows, wanted in expected
                for loss in self._losses(wanted, _run(module, rows, device), rows)
            ]
            return sum(losses) / len(losses)

        return increase

    def outputs(self, module: nn.Module, part: Part) -> Iterator[Any]:
        """Yield what a model returns for each batch of a part."""
        for rows in self.rows.parts[part]:
            yield _run(module, rows, device_of(module))

    def _losses(self, expected: Any, found: Any, rows: Rows) -> list[float]:
        each = _divergences(self.measure, expected, found, rows)
        return [min(loss, WORST) if math.isfinite(loss) else WORST for loss in each.tolist()]


def measure_of(module: nn.Module, judged_by: str, folder: Path) -> Measure:
    """Return what is compared of a model's outputs.

    Args:
        judged_by: See `autoquant.models.families`.
        folder: May say how vectors are pooled.
    """
    config: Any = module.config
    if judged_by == "vectors":
        return Measure("vectors", pooled=_pooling(folder))
    if judged_by == "answers":
        return Measure("classes")
    if judged_by == "classes":
        labels = getattr(config, "num_labels", 0)
        if type(module).__name__.endswith("ForSequenceClassification") and labels == 1:
            return Measure("scores")
        many = getattr(config, "problem_type", None) == "multi_label_classification"
        return Measure("labels" if many else "classes")
    return Measure("outputs")


def scores_spread(outputs: Iterator[Any]) -> float:
    """Return the variance of the scores in outputs; 1 if they are all the same."""
    scores = torch.cat([output.logits.float().flatten() for output in outputs])
    spread = float(scores.var()) if len(scores) > 1 else 0.0
    return spread if spread > 0 and math.isfinite(spread) else 1.0


def _pooling(folder: Path) -> Literal["mean", "first", "last"] | None:
    with suppress(OSError, ValueError):
        settings = json.loads((folder / _POOLING).read_text(encoding="utf-8"))
        mode = str(settings.get("pooling_mode", ""))
        if settings.get("pooling_mode_cls_token") or mode == "cls":
            return "first"
        if settings.get("pooling_mode_lasttoken") or mode == "lasttoken":
            return "last"
        return "mean"
    return None


def _run(module: nn.Module, rows: Rows, device: str) -> Any:
    with torch.no_grad():
        return module(**on(rows.inputs, device))


def _divergences(measure: Measure, expected: Any, found: Any, rows: Rows) -> torch.Tensor:
    """Return the divergence of each row `[rows]`."""
    if measure.compares == "vectors":
        return _angles(_vectors(expected, measure.pooled), _vectors(found, measure.pooled))
    if measure.compares == "outputs":
        return _relative(_floats(expected), _floats(found))
    if measure.compares == "scores":
        difference: torch.Tensor = (found.logits.float() - expected.logits.float()).flatten(1)
        return difference.square().mean(1) / measure.spread
    pairs = zip(_logits(expected), _logits(found), strict=True)
    parted = _of_labels if measure.compares == "labels" else _of_classes
    each = [_mean_of(parted(wanted, given), rows.counted) for wanted, given in pairs]
    return torch.stack(each).mean(0)


def _logits(output: Any) -> list[torch.Tensor]:
    """Return the scores `[rows, ..., classes]` of a model, of an answer those of both its ends."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return [logits]
    return [output.start_logits, output.end_logits]


def _of_classes(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    wanted, given = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    terms = torch.where(wanted.exp() > 0, wanted.exp() * (wanted - given), 0.0)
    return terms.sum(-1)


def _of_labels(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(expected.shape[:-1], device=expected.device)
    for sign in (1.0, -1.0):
        wanted = nn.functional.logsigmoid(sign * expected.float())
        given = nn.functional.logsigmoid(sign * found.float())
        total = total + (wanted.exp() * (wanted - given)).sum(-1)
    return total


def _mean_of(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of each row `[rows]` over positions, or over those that count."""
    if values.dim() == 1:
        return values
    if counted is None:
        return values.flatten(1).mean(1)
    weight = counted.to(values.device).float()
    return (torch.where(weight > 0, values, 0.0)).sum(1) / weight.sum(1).clamp(min=1)


def _vectors(output: Any, pooled: str | None) -> list[torch.Tensor]:
    """Return vectors `[rows, width]` or `[rows, ..., width]`."""
    named = [getattr(output, name, None) for name in ("text_embeds", "image_embeds")]
    if found := [each for each in named if isinstance(each, torch.Tensor)]:
        return found
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, torch.Tensor):
        return _floats(output)
    if pooled == "first":
        return [hidden[:, 0]]
    if pooled == "last":
        return [hidden[:, -1]]
    return [hidden.float().mean(1)] if pooled == "mean" else [hidden]


def _angles(expected: list[torch.Tensor], found: list[torch.Tensor]) -> torch.Tensor:
    each = []
    for wanted, given in zip(expected, found, strict=True):
        # A picture's [rows, channels, height, width] has its vectors along the second dimension.
        along = 1 if wanted.dim() == 4 else -1
        cosine = nn.functional.cosine_similarity(wanted.double(), given.double(), dim=along)
        each.append((1 - cosine).clamp(min=0).reshape(len(wanted), -1).mean(1))
    return torch.stack(each).mean(0)


def _floats(output: Any) -> list[torch.Tensor]:
    return [
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim()
    ]


def _relative(expected: list[torch.Tensor], found: list[torch.Tensor]) -> torch.Tensor:
    each = []
    for wanted, given in zip(expected, found, strict=True):
        one, other = wanted.float().reshape(len(wanted), -1), given.float().reshape(len(given), -1)
        each.append((other - one).square().sum(1) / one.square().sum(1).clamp(min=1e-30))
    return torch.stack(each).mean(0)


def right_labels(output: Any, rows: Rows) -> int:
    """Return how many labels are the output's most likely class."""
    assert rows.labels is not None
    labels = rows.labels.to(output.logits.device)
    same = output.logits.argmax(-1) == labels
    return int(same[rows.counted.to(same.device)].sum() if rows.counted is not None else same.sum())


def _labels(rows: Rows) -> int:
    assert rows.labels is not None
    return int(rows.counted.sum()) if rows.counted is not None else rows.labels.numel()
