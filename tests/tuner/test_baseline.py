"""The unquantized model is checked before anything is measured."""

import pytest
import torch
import transformers
from models.tiny_models import tiny_llama, tiny_tokenizer
from torch import nn

import autoquant
from autoquant.errors import ModelError, TextError
from autoquant.evaluators.quality import FunctionQuality, TextQuality
from autoquant.evaluators.text import TextParts
from autoquant.models import ModelRequest, from_module, load_request
from autoquant.tuner.baseline import check_baseline, check_reads_text

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
BIDIRECTIONAL = {
    "masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "decoder by name only": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)),
    "permuted": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(d_model=32, d_inner=64, n_layer=2, n_head=4, vocab_size=64)
    ),
}
CAUSAL = {
    "dense": tiny_llama,
    "experts": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    ),
    "a window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)
    ),
    "a decoder": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**SMALL, is_decoder=True)
    ),
}


def text_quality(largest=59):
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(2, largest, (6, 24), generator=generator)
    windows[1, -1] = largest
    parts = {"calibration": windows[:2], "selection": windows[2:4], "report": windows[4:]}
    return TextQuality(TextParts(parts), "cpu")


def loaded_of(module, **options):
    request = ModelRequest(model=module, device="cpu", tokenizer=tiny_tokenizer(), **options)
    return request, load_request(request)


def checked(module, quality=None, **options):
    said = []
    request, loaded = loaded_of(module, **options)
    check_baseline(
        request, loaded, quality or text_quality(), lambda event: said.append(event.text)
    )
    return said


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_a_model_that_sees_what_it_predicts_is_not_judged_by_text(kind, dtype):
    torch.manual_seed(0)
    _, loaded = loaded_of(BIDIRECTIONAL[kind](), dtype=dtype)
    with pytest.raises(TextError, match=r"is no causal language model.*--quality"):
        check_reads_text(loaded, text_quality())


def test_a_model_whose_own_code_fails_is_refused_with_its_error():
    """As transformers' Llama with `return_dict: false` in its config.json."""
    _, loaded = loaded_of(tiny_llama())
    loaded.module.config.return_dict = False
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM fails on token ids \(AttributeError: .*"
    ):
        check_reads_text(loaded, text_quality())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_is_judged_by_text(kind, dtype):
    torch.manual_seed(0)
    _, loaded = loaded_of(CAUSAL[kind](), dtype=dtype)
    check_reads_text(loaded, text_quality())


def test_a_token_beyond_the_embeddings_is_refused_with_both_sizes():
    _, loaded = loaded_of(tiny_llama())
    check_reads_text(loaded, text_quality(largest=63))
    with pytest.raises(TextError, match=r"ids up to 64, .* embeddings for ids below 64") as refused:
        check_reads_text(loaded, text_quality(largest=64))
    assert "tokenizer" in str(refused.value)


def test_a_refused_search_leaves_no_database(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("w59 w1 w2 w3 " * 4000)
    model = tiny_llama()
    model.resize_token_embeddings(40)
    with pytest.raises(TextError, match="embeddings for ids below 40"):
        autoquant.search(
            model,
            eval_text=text,
            tokenizer=tiny_tokenizer(),
            device="cpu",
            db=tmp_path / "plan.db",
        )
    assert not (tmp_path / "plan.db").exists()


def overflowing():
    model = tiny_llama(dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1e4)
            layer.mlp.down_proj.weight.mul_(1e4)
    return model


def test_a_model_that_overflows_is_refused_with_the_dtype_that_works():
    with pytest.raises(ModelError, match=r"not finite .* in float16: .*--dtype bf16"):
        checked(overflowing())


def test_one_window_that_overflows_is_enough():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

        def forward(self, ids):
            logits = self.head(self.embed(ids))
            return torch.where((ids == 59).any(), logits * float("inf"), logits)

    with pytest.raises(ModelError, match="on 1 of 2 samples in float32"):
        checked(Once(), text_quality())


def test_a_weight_that_is_not_finite_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"weight model.layers.1.mlp.up_proj.weight is not finite"):
        checked(model)


def test_a_loss_of_the_users_own_must_be_finite_too():
    quality = FunctionQuality(lambda _module, _part: [0.5, float("nan")], "own")
    with pytest.raises(ModelError, match="on 1 of 2 samples"):
        checked(tiny_llama(), quality)


class Frequencies(nn.Module):
    """Embeds tokens as sines of learned frequencies, which a 16-bit float cannot hold."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.frequencies = nn.Parameter(torch.linspace(100.0, 2000.0, 32))

    def forward(self, ids):
        return self.head(torch.sin(self.embed(ids) + self.frequencies)) * 4


def test_a_cast_that_makes_another_model_is_refused():
    torch.manual_seed(0)
    assert checked(Frequencies()) == []
    with pytest.raises(ModelError, match=r"in bfloat16 .* worse than in float32.*--dtype auto"):
        checked(Frequencies(), dtype="bf16")


def test_a_cast_that_rounds_as_usual_is_not_mentioned():
    assert checked(tiny_llama(dtype=torch.float32), dtype="bf16") == []


def test_outputs_in_another_dtype_are_compared_too():
    from autoquant.evaluators.outputs import OutputQuality, vary

    class Waves(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.full((8,), scale))

        def forward(self, x):
            return torch.sin(self.up(x) + self.scale)

    def check(scale):
        torch.manual_seed(0)
        inputs = (torch.randn(4, 8).bfloat16(),)
        request = ModelRequest(model=Waves(scale), device="cpu", dtype="bf16", sample_inputs=inputs)
        loaded = load_request(request)
        quality = OutputQuality(vary(loaded.module, inputs, 0)[0])
        check_baseline(request, loaded, quality, lambda _event: None)

    check(0.5)
    with pytest.raises(ModelError, match="in bfloat16"):
        check(1001.0)


def test_a_live_module_is_not_changed_by_the_check():
    module = tiny_llama(dtype=torch.float32)
    checked(module, dtype="bf16")
    assert module.lm_head.weight.dtype is torch.float32
    assert from_module(module).dtype == "float32"
