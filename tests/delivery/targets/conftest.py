"""A language model in a folder, and plans for it that are only applied."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from builders.records import make_plan
from models.tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from autoquant.candidates import get_format
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, RouteStep, Workload

WORKLOAD = Workload.parse("prefill=4,decode=2")


def save_llama(folder, *, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Planned:
    """A model that was searched, as far as an export looks at it.

    Attributes:
        facts: What the study of a search would say.
        sites: The model's linears, and its tables if these are searched.
    """

    def __init__(self, folder, *, tables=False):
        loaded = load_model(folder, device="cpu")
        self.folder = folder
        self.sites = record_model(loaded, WORKLOAD, ignore, tables=tables).layers
        self.facts = SimpleNamespace(
            source=asdict(loaded.source), device=SimpleNamespace(type="cpu"), calibration=None
        )
        self._hash = loaded.content_hash

    def plan(self, formats):
        """Choose for each layer the first of {end of its name: (format, *kernels)} that fits."""
        layers = [self._layer(site, formats) for site in self.sites]
        return replace(
            make_plan("abcd", layers=tuple(layers)), model_hash=self._hash, dtype="bfloat16"
        )

    def _layer(self, site, formats):
        found = [value for end, value in formats.items() if site.name.endswith(end)]
        fmt, *kernels = found[0] if found else ("bfloat16/plain", "matmul")
        kernels = ["lookup"] if site.lookup else kernels
        uppers = [4 * (number + 1) for number in range(len(kernels) - 1)]
        steps = zip([*uppers, None], kernels, strict=True)
        return LayerChoice(
            name=site.name,
            parameters=site.parameters,
            shape=site.shape,
            format=fmt,
            route=tuple(RouteStep(upper_m=upper, kernel=kernel) for upper, kernel in steps),
            numerics=f"{get_format(fmt).values}+a16",
            latency_us={},
            memory_bytes=0,
            loss=0.0,
            tied=site.tied,
        )


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """A model whose head is tied to its embedding."""
    return Planned(save_llama(tmp_path_factory.mktemp("tied"), tied=True))


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    return Planned(save_llama(tmp_path_factory.mktemp("untied"), tied=False))
