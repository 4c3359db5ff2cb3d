"""Tiny real models for the loading tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from autoquant.models import LoadedModel, ModelSource


def tiny_llama(*, tied=False, dtype=torch.bfloat16, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(60)} | {"<unk>": 60, "<eos>": 61}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        return self.down(self.drop(torch.relu(self.up(x))))


def as_loaded(module, kind="causal_lm", inputs=None, max_positions=None):
    """A live module of a kind, without a look at its weights."""
    return LoadedModel(
        module=module,
        content_hash="",
        source=ModelSource(kind="live"),
        tokenizer=None,
        kind=kind,
        example_inputs=inputs,
        max_positions=max_positions,
        stored_dtype="float32",
    )
