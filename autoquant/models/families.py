"""The kinds of models of transformers that a folder may hold, as one table.

A kind says which class of transformers loads its folders, and by what its models are judged. All
else follows from the model itself: what it reads, and whether it generates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EMBEDDER_FILE = "modules.json"
"""Lists the modules of a sentence embedder, of which the first is a model of transformers."""

JudgedBy = Literal["perplexity", "classes", "answers", "vectors", "outputs"]
"""What is compared with the unquantized model's:

- `perplexity`: nothing; a text judges the model, as it does any causal language model;
- `classes`: probabilities of classes, one distribution a sample, or one a position;
- `answers`: the decoder's probabilities of the next token;
- `vectors`: the directions of embeddings;
- `outputs`: every tensor of numbers that a forward pass returns.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
        name: What to call a model of it.
        auto: The class of transformers that loads it.
        mapping: Name of transformers' table of its classes by `model_type`.
        needs_tokenizer: All models of it read texts.
    """

    name: str
    auto: str
    mapping: str
    judged_by: JudgedBy
    needs_tokenizer: bool = True


def _family(name: str, task: str, judged_by: JudgedBy, *, texts: bool = True) -> Family:
    """Return a family whose class is `AutoModelFor` and the task."""
    table = "_".join(["MODEL_FOR", *_WORD.findall(task), "MAPPING_NAMES"]).upper()
    table = _TABLES.get(task, table)
    return Family(
        name=name,
        auto=f"AutoModelFor{task}",
        mapping=table,
        judged_by=judged_by,
        needs_tokenizer=texts,
    )


_WORD = re.compile("[A-Z]+(?![a-z])|[A-Z][a-z]+")
_TABLES = {
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
CAUSAL_LM = _family("causal language model", "CausalLM", "perplexity")
BARE = Family(
    name="model without a head",
    auto="AutoModel",
    mapping="MODEL_MAPPING_NAMES",
    judged_by="vectors",
    needs_tokenizer=False,
)
FAMILIES = (
    CAUSAL_LM,
    _family("encoder-decoder", "Seq2SeqLM", "answers"),
    _family("speech recognizer", "SpeechSeq2Seq", "answers", texts=False),
    _family("vision-language model", "ImageTextToText", "perplexity"),
    _family("classifier of texts", "SequenceClassification", "classes"),
    _family("classifier of tokens", "TokenClassification", "classes"),
    _family("question answerer", "QuestionAnswering", "classes"),
    _family("masked language model", "MaskedLM", "classes"),
    _family("classifier of pictures", "ImageClassification", "classes", texts=False),
    _family("classifier of sounds", "AudioClassification", "classes", texts=False),
    _family("speech recognizer", "CTC", "classes", texts=False),
    _family("segmenter of pictures", "SemanticSegmentation", "outputs", texts=False),
    _family("depth estimator", "DepthEstimation", "outputs", texts=False),
    _family("detector of objects", "ObjectDetection", "outputs", texts=False),
    _family("encoder of texts", "TextEncoding", "vectors"),
    BARE,
)
"""In the order in which they are looked through."""


def class_names(family: Family, model_type: str) -> tuple[str, ...]:
    """Return the classes that transformers has for a family's models of a type."""
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, family.mapping, {}).get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def named_classes(config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a `config.json` names."""
    named = config.get("architectures") or []
    return [str(name) for name in named] if isinstance(named, list) else [str(named)]


def family_of(config: Mapping[str, Any], folder: Path) -> Family | None:
    """Return the family of what a folder holds, or None if no class of it is known.

    A folder that names no class is taken for a causal language model.
    """
    model_type, named = str(config.get("model_type")), named_classes(config)
    if (folder / EMBEDDER_FILE).is_file():
        return BARE if class_names(BARE, model_type) or _has_code(config, BARE) else None
    for family in FAMILIES:
        known = class_names(family, model_type)
        if any(name in known for name in named) or _has_code(config, family, named):
            return family
    causal = bool(class_names(CAUSAL_LM, model_type)) and not named
    return CAUSAL_LM if causal or _has_code(config, CAUSAL_LM) else None


def _has_code(config: Mapping[str, Any], family: Family, named: list[str] | None = None) -> bool:
    """Check whether a configuration brings code for a family, and for one of the named classes."""
    brought = config.get("auto_map")  # such as {"AutoModelForCausalLM": "modeling_my.MyModel"}
    if not isinstance(brought, dict) or family.auto not in brought:
        return False
    return not named or str(brought[family.auto]).rpartition(".")[2] in named
