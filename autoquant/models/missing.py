"""Say in one line what else a model file needs before it can be loaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from autoquant.errors import ModelError, TrustError
from autoquant.models.request import ModelRequest

_TOKEN_WEIGHTS = (
    "embed_tokens",
    "wte.",
    "word_embeddings",
    "tok_embeddings",
    "token_embedding",
    "lm_head",
)
_TOKEN_CLASSES = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, slots=True)
class _Option:
    """An option that has to be given: an example to type, and words for it."""

    example: str
    words: str


_TRUST = _Option("--trust-pickle", "--trust-pickle (if you trust its author)")
_FACTORY = _Option(
    "--model-factory my_code:build",
    "--model-factory package.module:callable (returns the module that the weights are of)",
)
_INPUTS = _Option(
    "--sample-inputs my_code:inputs",
    "--sample-inputs package.module:callable (returns the inputs of one forward pass)",
)
_TOKENIZER = _Option("--tokenizer FOLDER", "--tokenizer FOLDER")
_EITHER = _Option(
    _INPUTS.example,
    f"{_INPUTS.words}, or for a model of token ids {_TOKENIZER.words} in place of the latter",
)


def missing(
    request: ModelRequest,
    problem: str,
    *,
    trust: bool = False,
    factory: bool = False,
    reads_tokens: bool | None,
    instead: str,
) -> ModelError:
    """Make the error for a file that cannot be loaded as asked.

    Args:
        problem: What the file is, e.g. `model.pt is a state dict, weights without a model`.
        trust: The file may run code.
        factory: The file holds weights only.
        reads_tokens: Whether the model takes token ids; None if unknown.
        instead: What else to do; follows `or`.
    """
    options = list(_options(request, trust=trust, factory=factory, reads_tokens=reads_tokens))
    example = " ".join(
        ["autoquant search", shlex.quote(request.name), *(option.example for option in options)]
    )
    message = (
        f"{problem}: give {_listed(option.words for option in options)}, e.g. `{example}`;"
        f" or {instead}"
    )
    if options == [_TRUST]:  # what else is missing cannot be answered with yes
        return TrustError(message, options={"trust_pickle": True}, runs=[problem])
    return ModelError(message)


def _options(
    request: ModelRequest, *, trust: bool, factory: bool, reads_tokens: bool | None
) -> Iterator[_Option]:
    if trust and not request.trust_pickle:
        yield _TRUST
    if factory and request.model_factory is None:
        yield _FACTORY
    if request.tokenizer is None and request.sample_inputs is None:
        yield {True: _TOKENIZER, False: _INPUTS, None: _EITHER}[reads_tokens]


def _listed(words: Iterable[str]) -> str:
    """Join words as in `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def weights_read_tokens(names: Iterable[str]) -> bool:
    """Check whether weights of these names are a language model's."""
    return any(part in name for name in names for part in _TOKEN_WEIGHTS)


def class_reads_tokens(name: str) -> bool | None:
    """Check whether a class of this name is a language model; None if unknown."""
    return True if name.endswith(_TOKEN_CLASSES) else None
