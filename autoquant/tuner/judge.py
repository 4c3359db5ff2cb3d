"""Choose how a search measures quality: text, the user's own loss, or divergence of outputs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoquant.candidates import Candidate
from autoquant.devices import backend
from autoquant.errors import QualityError, TextError
from autoquant.evaluators.data import check_data, data_pieces
from autoquant.evaluators.outputs import SAMPLES, AnyQuality, OutputQuality, vary
from autoquant.evaluators.quality import FunctionQuality, QualityFunction, TextQuality
from autoquant.evaluators.reading import file_pieces
from autoquant.evaluators.sensitivity import ISOLATED, PATH, SENSITIVITIES, Sensitivity
from autoquant.evaluators.text import (
    DEFAULT_TEXT,
    GPU_WINDOWS,
    WANTED_WINDOWS,
    deal_text,
)
from autoquant.events import Listener, Notice
from autoquant.hints import did_you_mean_path
from autoquant.models import LoadedModel
from autoquant.models.named import quality_function
from autoquant.profiler.measure import Candidates
from autoquant.tuner.baseline import check_reads_text
from autoquant.tuner.rows_judge import judge_rows

_OWN_LOSS = "--quality package.module:callable"
_MUCH_UNKNOWN = 0.1


@dataclass(frozen=True, slots=True)
class Asked:
    """The measure of quality that the user asked for: at most one of these."""

    text: Path | None
    data: str | None
    function: FunctionQuality | None

    @classmethod
    def of(
        cls,
        eval_text: str | os.PathLike[str] | None,
        eval_data: str | None,
        quality: QualityFunction | str | None,
    ) -> Asked:
        """Read the options of a search.

        Raises:
            TextError: There is no such text, or more than one of them is given.
        """
        options = {"--eval-text": eval_text, "--eval-data": eval_data, "--quality": quality}
        given = [name for name, value in options.items() if value is not None]
        if len(given) > 1:
            raise TextError(f"{' and '.join(given)} cannot be combined: give one of them, or none")
        if eval_text is not None and not Path(eval_text).is_file():
            raise TextError(
                f"there is no text file at {eval_text}{did_you_mean_path(eval_text)}: give a plain"
                " UTF-8 text like what the model will read"
            )
        if eval_data is not None:
            check_data(eval_data)
        return cls(None if eval_text is None else Path(eval_text), eval_data, _own_quality(quality))

    def check(self, sensitivity: str | None, max_kl: float | None) -> None:
        """Refuse, before the model is loaded, what `method_of` would refuse later."""
        if sensitivity is not None and sensitivity not in SENSITIVITIES:
            raise QualityError(
                f"no sensitivity {sensitivity!r}: choose one of {', '.join(SENSITIVITIES)}"
            )
        if self.function is not None:
            method_of(sensitivity, max_kl, self.function)


@dataclass(frozen=True, slots=True)
class Judge:
    """A measure of quality, and the candidates that it suits.

    Attributes:
        candidates: Those whose quality can be measured so.
        words: A description for reports.
    """

    quality: AnyQuality
    candidates: list[Candidate]
    words: str


def make_judge(
    asked: Asked,
    loaded: LoadedModel,
    candidates: Candidates,
    seed: int,
    listener: Listener,
) -> Judge:
    """Make what was asked for, or what suits the model if nothing was.

    Raises:
        TextError, QualityError: The model cannot be judged so. The message names everything that is
            missing.
    """
    if asked.function is not None:
        words = f"a loss of the user's own, {asked.function.key}"
        return Judge(asked.function, _without_inputs(candidates, listener), words)
    if loaded.reader is not None:
        return _judge_by_rows(asked, loaded, candidates, seed, listener)
    if loaded.kind == "module":
        return _judge_by_outputs(asked, loaded, candidates, seed, listener)
    return _judge_by_text(asked, loaded, candidates, listener)


def _judge_by_outputs(
    asked: Asked, loaded: LoadedModel, candidates: Candidates, seed: int, listener: Listener
) -> Judge:
    _check_module(asked, has_inputs=loaded.example_inputs is not None)
    quality = _output_quality(loaded, seed, listener)
    words = (
        "divergence of outputs from the unquantized model's, ||y - y0||^2 / ||y0||^2, on"
        f" {sum(SAMPLES.values())} inputs varied from its sample inputs (key {quality.key})"
    )
    return Judge(quality, _without_inputs(candidates, listener), words)


def _judge_by_rows(
    asked: Asked, loaded: LoadedModel, candidates: Candidates, seed: int, listener: Listener
) -> Judge:
    made = judge_rows(loaded, asked.text, asked.data, seed)
    own = "" if asked.text or asked.data else ": rows like its own are better, --eval-data DATASET"
    listener(
        Notice(
            f"judged by {made.compared}, on {made.quality.rows.words}; --max-ppl-increase limits"
            f" it, 1% is 0.01{own}"
        )
    )
    return Judge(made.quality, _without_inputs(candidates, listener), made.words)


def _judge_by_text(
    asked: Asked, loaded: LoadedModel, candidates: Candidates, listener: Listener
) -> Judge:
    if loaded.tokenizer is None:
        raise TextError(
            "this model has no tokenizer: give one with --tokenizer FOLDER, or judge it by"
            f" {_OWN_LOSS}"
        )
    needs_inputs = any(each.format.needs_inputs for each in candidates)
    text, name = _text_quality(asked, loaded, inputs=needs_inputs)
    check_reads_text(loaded, text)
    if asked.text is None and asked.data is None:
        listener(
            Notice(
                "quality is measured on a text that autoquant ships: one like what the model will"
                " read is better (--eval-text FILE or --eval-data DATASET)"
            )
        )
    unknown = _unknown_share(text, loaded.tokenizer)
    if unknown > _MUCH_UNKNOWN:
        listener(
            Notice(
                f"{unknown:.0%} of the tokens of {name} are unknown to the tokenizer, so quality"
                " says little: give a text like what the model reads (--eval-text FILE or"
                " --eval-data DATASET)"
            )
        )
    return Judge(text, list(candidates), f"{name} (key {text.key})")


def method_of(name: str | None, max_kl: float | None, quality: AnyQuality) -> Sensitivity:
    """Return the sensitivity of that name, or the one that suits the quality.

    Raises:
        QualityError: The sensitivity or the limit of divergence needs a text, and there is none.
    """
    if isinstance(quality, TextQuality):
        return SENSITIVITIES[name] if name is not None else PATH
    if max_kl is not None:
        raise QualityError(
            "--max-kl needs a text: without one use --max-ppl-increase, the limit of what is"
            " measured instead"
        )
    if name is not None and not SENSITIVITIES[name].functions:
        raise QualityError(
            f"--sensitivity {name} needs a text: without one use --sensitivity isolated"
        )
    return ISOLATED


def _own_quality(quality: QualityFunction | str | None) -> FunctionQuality | None:
    """Return the user's function with its qualified name, or None.

    The user gives the function itself, or that name.
    """
    if quality is None:
        return None
    if isinstance(quality, str):
        return FunctionQuality(quality_function(quality), quality.replace(":", "."))
    return FunctionQuality(quality, f"{quality.__module__}.{quality.__qualname__}")


def _without_inputs(candidates: Candidates, listener: Listener) -> list[Candidate]:
    """Drop the formats that need calibration text, since none was given."""
    for name in dict.fromkeys(each.format.id for each in candidates if each.format.needs_inputs):
        listener(
            Notice(
                f"{name} not considered: it is rounded for what layers read on a text, and there"
                " is none"
            )
        )
    return [each for each in candidates if not each.format.needs_inputs]


def _check_module(asked: Asked, *, has_inputs: bool) -> None:
    """Check that a model that is not known to read tokens can be judged.

    Raises:
        TextError: It cannot; the message names everything that is missing.
    """
    given = ""
    if asked.text is not None:
        given = "--eval-text"
    elif asked.data is not None:
        given = "--eval-data"
    needs = []
    if not has_inputs:
        needs.append(
            "give --sample-inputs package.module:callable, the arguments of one forward pass"
        )
    if given:
        needs.append(
            f"leave out {given} to compare its outputs with the unquantized model's, or give"
            f" {_OWN_LOSS} instead of it"
        )
    if not needs:
        return
    raise TextError(
        f"this model is not known to read tokens, so {'a text' if given else 'text'} cannot judge"
        f" it: {', and '.join(needs)} (if it is a language model, give --tokenizer FOLDER instead)"
    )


def _output_quality(loaded: LoadedModel, seed: int, listener: Listener) -> OutputQuality:
    assert loaded.example_inputs is not None  # _check_module saw to it
    inputs, notes = vary(loaded.module, loaded.example_inputs, seed)
    for note in notes:
        listener(Notice(note))
    listener(
        Notice(
            "judged by how little outputs diverge from the unquantized model's, ||y - y0||^2 /"
            " ||y0||^2 on inputs varied from its sample inputs, which --max-ppl-increase limits: a"
            f" loss of your own says more, {_OWN_LOSS}"
        )
    )
    return OutputQuality(inputs)


def _unknown_share(text: TextQuality, tokenizer: Any) -> float:
    """Return the share of a text that its tokenizer has no token for (0 to 1)."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return 0.0
    tokens = torch.cat([windows.flatten() for windows in text.parts.windows.values()])
    return float((tokens == unknown).float().mean())


def _text_quality(asked: Asked, loaded: LoadedModel, *, inputs: bool) -> tuple[TextQuality, str]:
    """Return the quality, and what its text is called."""
    if asked.data is not None:
        name, pieces = f"the dataset {asked.data}", data_pieces(asked.data, loaded.tokenizer)
    elif asked.text is not None:
        name, pieces = f"the text {asked.text}", file_pieces(asked.text)
    else:
        name, pieces = "a text that autoquant ships", file_pieces(DEFAULT_TEXT)
    parts = deal_text(
        pieces,
        name,
        loaded.tokenizer,
        max_positions=loaded.max_positions,
        inputs=inputs,
        windows=GPU_WINDOWS if backend(loaded.device).judges_long else WANTED_WINDOWS,
    )
    return TextQuality(parts, loaded.device), name
