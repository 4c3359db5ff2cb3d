"""Tokenizers as llama.cpp has them: which of its rules is named, and which are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from autoquant.delivery.targets.gguf_vocab import Vocab
from autoquant.errors import PlanError

gguf = pytest.importorskip("gguf")

BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre.ByteLevel(add_prefix_space=False, use_regex=True)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"


def split(digits):
    return pre.Split(Regex(f"{CONTRACTIONS}|{LETTERS}|{digits}|{REST}"), "isolated")


def bytes_tokenizer(*steps, normalizer=None, model=None, special=("<|end|>",), **named):
    letters = sorted(pre.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate([*letters, "he", "hel", "Ġa"])}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("h", "e"), ("he", "l"), ("Ġ", "a")]) if model is None else model
    )
    tokenizer.pre_tokenizer = pre.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<|end|>"} | named)


def pieces_tokenizer(split=False):
    texts = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab"]
    vocab = {text: number for number, text in enumerate(texts)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=split)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def settings(tokenizer, path, *, size=300, bos=None, ends=None):
    """Write a GGUF of a tokenizer alone, and return what it says by name."""
    writer = gguf.GGUFWriter(path / "vocab.gguf", "llama")
    config = SimpleNamespace(vocab_size=size, bos_token_id=bos)
    Vocab(tokenizer, config, SimpleNamespace(eos_token_id=ends)).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path / "vocab.gguf").fields
    return {
        name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for name, field in fields.items()
    }


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ((WORDS,), "gpt-2"),
        ((pre.Digits(individual_digits=True), WORDS), "smollm"),
        ((split(r"\p{N}{1,3}"), BYTES), "llama-bpe"),
        ((split(r"\p{N}"), BYTES), "qwen2"),
        ((pre.Sequence([split(r"\p{N}")]), BYTES), "qwen2"),
    ],
)
def test_a_way_to_split_text_has_llama_cpps_name(tmp_path, steps, rule):
    found = settings(bytes_tokenizer(*steps), tmp_path)
    assert found["model"] == "gpt2" and found["pre"] == rule
    assert found["merges"] == ["h e", "he l", "Ġ a"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: bytes_tokenizer(split(r"\p{N}{1,4}"), BYTES), r"pre-tokenizer Split \+ ByteLevel"),
        (lambda: bytes_tokenizer(pre.ByteLevel(add_prefix_space=True)), "pre-tokenizer ByteLevel"),
        (lambda: bytes_tokenizer(WORDS, normalizer=norm.Lowercase()), "normalizer Lowercase"),
        (lambda: bytes_tokenizer(WORDS, model=models.WordLevel({"a": 0})), "the kind WordLevel"),
        (lambda: pieces_tokenizer(split=True), "step Metaspace before its pieces"),
        (lambda: SimpleNamespace(), "none that the package tokenizers computes"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_needs_a_base(tmp_path, tokenizer, message):
    with pytest.raises(PlanError, match=f"{message}.* give a GGUF .* as --base"):
        settings(tokenizer(), tmp_path)


def test_whole_words_first_matters_only_for_tokens_without_a_merge(tmp_path):
    letters = {text: number for number, text in enumerate(sorted(pre.ByteLevel.alphabet()))}
    merged = models.BPE({**letters, "he": 256}, [("h", "e")], ignore_merges=True)
    alone = models.BPE({**letters, "he": 256, "hello": 257}, [("h", "e")], ignore_merges=True)
    assert settings(bytes_tokenizer(WORDS, model=merged), tmp_path)["pre"] == "gpt-2"
    with pytest.raises(PlanError, match="ignore_merges=true with the pre-tokenizer of gpt-2"):
        settings(bytes_tokenizer(WORDS, model=alone), tmp_path)


def test_every_id_of_the_model_has_a_token_and_its_type(tmp_path):
    found = settings(bytes_tokenizer(WORDS), tmp_path, size=263)
    kinds = gguf.TokenType
    assert found["tokens"][256:] == ["he", "hel", "Ġa", "<|end|>", "<tool>", "[PAD261]", "[PAD262]"]
    assert found["token_type"][256:] == [
        *[kinds.NORMAL] * 3,
        kinds.CONTROL,
        kinds.USER_DEFINED,
        *[kinds.UNUSED] * 2,
    ]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(PlanError, match="1 tokens more than the model, which has 260"):
        settings(bytes_tokenizer(WORDS), tmp_path, size=260)


def test_special_tokens_are_the_tokenizers_and_then_the_configurations(tmp_path):
    plain = settings(bytes_tokenizer(WORDS), tmp_path, bos=7, ends=[259, 260])
    assert plain["bos_token_id"] == 7 and plain["eos_token_id"] == 259
    assert plain["eot_token_id"] == 260
    assert plain["add_bos_token"] is False and plain["add_eos_token"] is False
    tokenizer = bytes_tokenizer(WORDS, special=("<|end|>", "<|go|>"), bos_token="<|go|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|go|> $A <|end|>", special_tokens=[("<|go|>", 260), ("<|end|>", 259)]
    )
    around = settings(tokenizer, tmp_path, bos=7)
    assert around["bos_token_id"] == 260 and "eot_token_id" not in around
    assert around["add_bos_token"] is True and around["add_eos_token"] is True


def test_other_tokens_around_a_text_are_refused(tmp_path):
    tokenizer = bytes_tokenizer(WORDS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 259)]
    )
    with pytest.raises(PlanError, match="more tokens around a text"):
        settings(tokenizer, tmp_path)


def test_the_chat_templates_are_kept(tmp_path):
    tokenizer = bytes_tokenizer(WORDS)
    tokenizer.chat_template = "{{ messages }}"
    assert settings(tokenizer, tmp_path)["chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    found = settings(tokenizer, tmp_path)
    assert found["chat_template"] == "{{ messages }}"
    assert found["chat_template.tools"] == "{{ tools }}"


def test_pieces_have_scores_in_the_order_of_their_merges(tmp_path):
    found = settings(pieces_tokenizer(), tmp_path, size=11)
    kinds = gguf.TokenType
    assert found["model"] == "llama" and found["pre"] == "default"
    assert found["token_type"][:5] == [
        kinds.UNKNOWN,
        kinds.CONTROL,
        kinds.CONTROL,
        kinds.BYTE,
        kinds.NORMAL,
    ]
    score = dict(zip(found["tokens"], found["scores"], strict=True))
    assert score["ab"] > score["▁a"] > score["▁ab"] > score["a"]
    assert found["add_space_prefix"] is True and found["add_bos_token"] is True


def test_it_says_with_which_texts_llama_cpp_differs():
    config = SimpleNamespace(vocab_size=300)
    composed = Vocab(bytes_tokenizer(WORDS, normalizer=norm.NFC()), config, None)
    assert ["NFC" in note for note in composed.notes] == [True]
    assert ["space before" in note for note in Vocab(pieces_tokenizer(), config, None).notes] == [
        True
    ]
    assert Vocab(bytes_tokenizer(WORDS), config, None).notes == ()
