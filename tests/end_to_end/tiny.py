"""Tiny real models and their text, as files."""

from __future__ import annotations

import random

import torch
from torch import nn

WORDS = 126
POSITIONS = 64


def make_llama(seed=0, layers=2, positions=POSITIONS):
    """A Llama with tied embeddings, whose random weights are large enough for its outputs to differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS + 2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(WORDS)} | {"<unk>": WORDS, "<eos>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def save_llama(folder, **options):
    model = make_llama(**options)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_text(path, windows=16, seed=0):
    """Text of that many windows of the model's length."""
    draw = random.Random(seed)
    words = [f"w{draw.randrange(WORDS)}" for _ in range(windows * POSITIONS)]
    path.write_text(
        "\n".join(" ".join(words[start : start + 16]) for start in range(0, len(words), 16))
    )
    return path


class Perceptron(nn.Module):
    """A module as a user may bring it, with one weight that two linears share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64, bias=False)
        self.again.weight = self.second.weight
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.again(torch.relu(self.second(x)))))
