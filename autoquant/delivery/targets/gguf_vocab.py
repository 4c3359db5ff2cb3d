"""The tokenizer of a folder, as the settings of a GGUF.

llama.cpp has tokenizers of its own. It splits text by a rule that the file names, and merges the
pieces as the file says. So a rule is named only for a tokenizer that splits in exactly that way;
any other tokenizer is refused. What llama.cpp does lies in its `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autoquant.errors import PlanError
from autoquant.models.quiet import some

_SPACE = "▁"
_BY_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES: Mapping[tuple[str, ...], str] = {
    ("bytes of words",): "gpt-2",
    ("digits", "bytes of words"): "smollm",
    (_BY_WORDS % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (_BY_WORDS % r"\p{N}", "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}
"""llama.cpp's names of ways to split text, by the steps of a pre-tokenizer."""
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")
"""Rules with which llama.cpp takes a word that is a token without merging it."""
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


class Vocab:
    """A tokenizer that llama.cpp has.

    Args:
        tokenizer: Of transformers, of the kind that the package tokenizers computes.
        config: The model's configuration. It says how many tokens the model has, and which token
            begins a text if the tokenizer does not say it.
        generation: The settings of `generate`, which may name more tokens that end a text.

    Raises:
        PlanError: llama.cpp has no such tokenizer.
    """

    def __init__(self, tokenizer: Any, config: Any, generation: Any) -> None:
        self._tokenizer, self._config, self._generation = tokenizer, config, generation
        self._state = _state(tokenizer)
        model = self._state["model"]
        if model.get("type") != "BPE":
            raise _unknown(f"a vocabulary of the kind {model.get('type')}")
        self._tokens = _tokens(self._state, int(config.vocab_size))
        self._added = _added_around(tokenizer)
        self._rule = None if model.get("byte_fallback") else _rule(self._state)
        if self._rule is None:
            _check_pieces(self._state)

    @property
    def notes(self) -> tuple[str, ...]:
        """What llama.cpp does otherwise than this tokenizer with some texts, a line each."""
        steps = [
            *_steps(self._state["normalizer"], "normalizers"),
            *_steps(self._state["pre_tokenizer"], "pretokenizers"),
        ]
        kinds = {step["type"] for step in steps}
        found = []
        if "NFC" in kinds:
            found.append(
                "llama.cpp does not compose accents (NFC) as the model's tokenizer does: text with"
                " decomposed ones gets other tokens"
            )
        if any(step.get("prepend_scheme") in ("first", "always") for step in steps):
            found.append(
                "llama.cpp puts a space before a text that begins with one, too, as SentencePiece"
                " does and the model's tokenizer in transformers does not"
            )
        return tuple(found)

    def write(self, writer: Any) -> None:
        """Write all settings of the tokenizer.

        Args:
            writer: A `gguf.GGUFWriter`.
        """
        if self._rule is None:
            self._write_pieces(writer)
        else:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(self._rule)
            writer.add_token_merges([" ".join(pair) for pair in _merges(self._state)])
        writer.add_token_list([text for text, _ in self._tokens])
        writer.add_token_types([kind for _, kind in self._tokens])
        self._write_special(writer)
        template = getattr(self._tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        if template:
            writer.add_chat_template(template)

    def _write_pieces(self, writer: Any) -> None:
        """Write a vocabulary of SentencePiece, which merges the piece of the highest score first.

        A tokenizer.json has the order of merges and no scores, so the score is minus the place of
        the first merge that makes a piece.
        """
        scores: dict[str, float] = {}
        for place, (left, right) in enumerate(_merges(self._state)):
            scores.setdefault(left + right, -float(place))
        lowest = -float(len(scores)) - 1
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(text, lowest) for text, _ in self._tokens])
        ids = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        begins = self._tokenizer.convert_ids_to_tokens(ids)[0]
        writer.add_add_space_prefix(begins.startswith(_SPACE))

    def _write_special(self, writer: Any) -> None:
        """Write which tokens begin and end a text, and whether each text gets them."""
        ids = {name: getattr(self._tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
        if ids["bos"] is None and isinstance(getattr(self._config, "bos_token_id", None), int):
            ids["bos"] = self._config.bos_token_id
        for name, number in ids.items():
            if number is not None:
                getattr(writer, f"add_{name}_token_id")(number)
        ends = getattr(self._generation, "eos_token_id", None)
        others = [each for each in ends if each != ids["eos"]] if isinstance(ends, list) else []
        if others:  # a file can name one more
            writer.add_eot_token_id(others[0])
        before, after = self._added
        writer.add_add_bos_token(before)
        writer.add_add_eos_token(after)


def _state(tokenizer: Any) -> dict[str, Any]:
    """Return what a `tokenizer.json` says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("none that the package tokenizers computes")
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def _unknown(what: str) -> PlanError:
    return PlanError(
        f"the model's tokenizer has {what}, which llama.cpp does not have under a name that is"
        " known here: give a GGUF of the unquantized model as --base (`convert_hf_to_gguf.py"
        " MODEL --outtype bf16` of llama.cpp may write one)"
    )


def _tokens(state: Mapping[str, Any], size: int) -> list[tuple[str, int]]:
    """Return the text and the type of each token id.

    Args:
        size: How many ids the model has. Those without a token are marked as unused.
    """
    from gguf import TokenType

    model, added = state["model"], {each["id"]: each for each in state["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()}
    if beyond := [number for number in (*texts, *added) if number >= size]:
        raise PlanError(
            f"the tokenizer has {len(beyond)} tokens more than the model, which has {size}:"
            " llama.cpp needs an embedding for each"
        )
    tokens: list[tuple[str, int]] = []
    for number in range(size):
        if number in added:
            text = added[number]["content"]
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        else:
            text = texts.get(number, f"[PAD{number}]")
            kind = TokenType.NORMAL if number in texts else TokenType.UNUSED
        if model.get("byte_fallback"):
            kind = _kind_of_piece(text, kind, model.get("unk_token"))
        tokens.append((text, int(kind)))
    return tokens


def _kind_of_piece(text: str, kind: Any, unknown: str | None) -> Any:
    from gguf import TokenType

    if text == unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else kind


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the pieces that are merged, the first first."""
    pairs = [
        pair.split(" ", 1) if isinstance(pair, str) else pair for pair in state["model"]["merges"]
    ]
    return [(left, right) for left, right in pairs]


def _rule(state: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer splits text before it merges.

    Raises:
        PlanError: It has none.
    """
    normalizers = [step["type"] for step in _steps(state["normalizer"], "normalizers")]
    if lacking := [name for name in normalizers if name != "NFC"]:
        raise _unknown(f"the normalizer {some(lacking)}")
    steps = _steps(state["pre_tokenizer"], "pretokenizers")
    rule = _RULES.get(tuple(map(_step, steps)))
    if rule is None:
        raise _unknown(f"the pre-tokenizer {' + '.join(step['type'] for step in steps) or 'none'}")
    whole = bool(state["model"].get("ignore_merges"))
    if whole != (rule in _WHOLE_WORDS_FIRST) and not _all_merge(state):
        raise _unknown(
            f"ignore_merges={str(whole).lower()} with the pre-tokenizer of {rule}, which differs"
        )
    return rule


def _all_merge(state: Mapping[str, Any]) -> bool:
    """Check that each token longer than a byte is made by a merge.

    Only for tokens without one does it matter whether whole words are taken first.
    """
    made = {left + right for left, right in _merges(state)}
    added = {each["content"] for each in state["added_tokens"]}
    return all(len(text) == 1 or text in made or text in added for text in state["model"]["vocab"])


def _steps(part: Mapping[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a tokenizer, which may be one, several or none."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    return [step for each in part[several] for step in _steps(each, several)]


def _step(step: Mapping[str, Any]) -> str:
    """Return a step of a pre-tokenizer as a word of `_RULES`, or as what is in none of them."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes of words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return f"other {kind}"


def _check_pieces(state: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that does more to a text than to mark its spaces."""
    steps = [
        *_steps(state["normalizer"], "normalizers"),
        *_steps(state["pre_tokenizer"], "pretokenizers"),
    ]
    if lacking := [step["type"] for step in steps if not _marks_spaces(step)]:
        raise _unknown(f"the step {some(lacking)} before its pieces are merged")


def _marks_spaces(step: Mapping[str, Any]) -> bool:
    kind = step["type"]
    if kind == "Prepend":
        return bool(step["prepend"] == _SPACE)
    if kind == "Replace":
        return bool(step["content"] == _SPACE and step["pattern"] == {"String": " "})
    return bool(kind == "Metaspace" and step["replacement"] == _SPACE and not step["split"])


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a text gets a token before it, and one behind it.

    Raises:
        PlanError: It gets others than those that begin and end a text.
    """
    bare = list(tokenizer("a b", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a b")["input_ids"])
    starts = [n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare]
    if starts:
        before, after = whole[: starts[0]], whole[starts[0] + len(bare) :]
        if before in ([], [tokenizer.bos_token_id]) and after in ([], [tokenizer.eos_token_id]):
            return bool(before), bool(after)
    raise _unknown("more tokens around a text than one that begins and one that ends it")
