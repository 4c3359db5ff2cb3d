"""Judge a model with a reader by how its outputs diverge on rows of what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant.errors import ModelError, TextError, first_line
from autoquant.evaluators.answers import with_answers
from autoquant.evaluators.diverging import WORDS, RowsQuality, measure_of, scores_spread
from autoquant.evaluators.reading import file_pieces
from autoquant.evaluators.rows import JudgedRows, dataset_rows, deal_rows, made_up_rows, text_rows
from autoquant.evaluators.text import DEFAULT_TEXT
from autoquant.models import LoadedModel
from autoquant.models.loaded import UNFIT
from autoquant.models.reader import Reader

_CLASSIFIERS = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
)


@dataclass(frozen=True, slots=True)
class RowsJudge:
    """A measure on rows, in words.

    Attributes:
        compared: What is compared.
        words: All of it, for reports.
    """

    quality: RowsQuality
    compared: str
    words: str


def judge_rows(loaded: LoadedModel, text: Path | None, data: str | None, seed: int) -> RowsJudge:
    """Make the measure that suits the model, on the rows that the user gave, or on others.

    Raises:
        TextError: The rows cannot be read, are no such as the model reads, or are too few.
        ModelError: The unquantized model fails on them.
    """
    assert loaded.reader is not None and loaded.family is not None
    judged_by = loaded.family.judged_by
    rows = _rows(loaded, loaded.reader, text, data, seed)
    if judged_by == "answers":
        rows = with_answers(loaded.module, rows)
    measure = measure_of(loaded.module, judged_by, Path(loaded.source.path))
    quality = RowsQuality(rows, measure)
    try:
        outputs = list(quality.outputs(loaded.module, "calibration"))
        if measure.compares == "scores":
            spread = scores_spread(iter(outputs))
            quality = RowsQuality(rows, type(measure)("scores", spread=spread))
    except UNFIT as error:
        raise ModelError(
            f"the unquantized {type(loaded.module).__name__} fails on {rows.words}"
            f" ({first_line(error, with_type=True)}): make it run by itself, or judge it by a loss"
            " of your own, --quality package.module:callable"
        ) from error
    compared = _compared(judged_by, WORDS[measure.compares])
    return RowsJudge(quality, compared, f"{compared}, on {rows.words} (key {quality.key})")


def _compared(judged_by: str, words: str) -> str:
    if judged_by != "answers":
        return words
    return words.replace("probabilities", "decoder's next-token probabilities")


def _rows(
    loaded: LoadedModel, reader: Reader, text: Path | None, data: str | None, seed: int
) -> JudgedRows:
    assert loaded.family is not None
    masks = loaded.family.auto == "AutoModelForMaskedLM"
    if data is not None:
        answers = loaded.family.judged_by == "answers"
        found = dataset_rows(reader, data, seed, labels_of(loaded), answers=answers)
        name = f"the dataset {data}"
    elif "texts" in reader.reads:
        pieces = file_pieces(DEFAULT_TEXT if text is None else text)
        found, name = text_rows(reader, pieces), _text_name(text)
    elif text is not None:
        kind = reader.reads[0]
        raise TextError(
            f"a {loaded.family.name} reads {kind}, so no text can judge it: leave out --eval-text,"
            f" or give {kind} with --eval-data"
        )
    else:
        return deal_rows(
            reader, made_up_rows(reader), reader.words, masks=False, seed=seed, limited=False
        )
    return deal_rows(reader, found, name, masks=masks, seed=seed, limited=True)


def _text_name(text: Path | None) -> str:
    return "a text that autoquant ships" if text is None else f"the text {text}"


def labels_of(loaded: LoadedModel) -> Mapping[str, int] | None:
    """Return the number of each class by its name; empty for a model that answers.

    None if the model gives neither one class for a row nor answers.
    """
    config: Any = loaded.module.config
    if loaded.family is None:
        return None
    if loaded.family.judged_by == "answers":
        return {}
    many = getattr(config, "problem_type", None) == "multi_label_classification"
    if loaded.family.auto not in _CLASSIFIERS or many or config.num_labels == 1:
        return None
    return {str(name): int(number) for name, number in (config.label2id or {}).items()}
