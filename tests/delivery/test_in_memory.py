"""A plan applied to the caller's own module, which is saved, cast and copied afterwards."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from models.tiny_models import Perceptron, tiny_llama, tiny_tokenizer
from torch import nn

import autoquant
from autoquant.candidates.routed import RoutedWeight
from autoquant.errors import CheckpointError, DiskFullError, ModelError
from autoquant.events import ignore
from autoquant.models import from_module, load_model
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, LinearShape, Plan, Prediction, RouteStep, Workload

IDS = torch.tensor([[3, 4, 5, 9]])


def plan_for(module, model_hash=None, *, dtype="bfloat16"):
    """Every linear in int8."""
    layers = [
        LayerChoice(
            name=name,
            shape=LinearShape(
                n=part.out_features, k=part.in_features, bias=part.bias is not None, dtype=dtype
            ),
            format="int8-row/plain",
            route=(RouteStep(upper_m=None, kernel="int-mm"),),
            numerics="int8-row+int8-row",
            latency_us={},
            memory_bytes=0,
            loss=0.0,
            parameters=(f"{name}.weight",),
        )
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    return Plan(
        plan_id="abcd",
        study_id="study",
        label="int8",
        kind="uniform",
        model_hash=from_module(module).content_hash if model_hash is None else model_hash,
        dtype=dtype,
        layers=tuple(layers),
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def quantized():
    model = tiny_llama(tied=True)
    return autoquant.apply(plan_for(model), model)


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_a_model_quantized_in_memory_can_be_saved(quantized, tmp_path, way):
    if way == "save":
        autoquant.save(quantized, tmp_path / "out", tokenizer=tiny_tokenizer())
        assert (tmp_path / "out" / "tokenizer.json").is_file()
    else:
        quantized.save_pretrained(tmp_path / "out")
    again = autoquant.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(quantized))
    assert isinstance(again.lm_head.weight.data, RoutedWeight)
    autoquant.save(again, tmp_path / "once more")
    assert torch.equal(logits(autoquant.load(tmp_path / "once more")), logits(quantized))


def test_from_pretrained_reads_what_was_saved(quantized, tmp_path):
    from transformers import AutoModelForCausalLM

    autoquant.save(quantized, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(quantized))


def test_another_module_is_loaded_into_one_of_its_architecture(tmp_path):
    model = Perceptron().to(torch.bfloat16).eval()
    autoquant.apply(plan_for(model), model)
    autoquant.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"load\(folder, model\)"):
        autoquant.load(tmp_path / "out")
    again = autoquant.load(tmp_path / "out", Perceptron().to(torch.bfloat16))
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(again(x), model(x))


def test_a_classifier_of_transformers_can_be_saved_too(tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig
    from transformers import BertForSequenceClassification as Classifier

    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        id2label={0: "bad", 1: "good", 2: "odd"},
    )
    model = Classifier(config).to(torch.bfloat16).eval()
    autoquant.apply(plan_for(model), model)
    autoquant.save(model, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "BertForSequenceClassification"
    assert again.config.id2label[2] == "odd" and torch.equal(logits(again), logits(model))


def test_a_model_without_a_plan_or_a_folder_in_use_is_refused(quantized, tmp_path):
    with pytest.raises(CheckpointError, match=r"autoquant.apply\(plan, model\) first"):
        autoquant.save(tiny_llama(), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        autoquant.save(quantized, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_saving_that_fails_leaves_nothing(quantized, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(autoquant.delivery.shards, "write_safetensors", full)
    with pytest.raises(DiskFullError, match="the disk is full: no room for"):
        autoquant.save(quantized, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "cast", [lambda m: m.float(), lambda m: m.half(), lambda m: m.to(torch.float32)]
)
def test_a_cast_model_still_computes(quantized, cast):
    expected = logits(quantized).float()
    cast = cast(copy.deepcopy(quantized))
    assert cast.model.norm.weight.dtype is not torch.bfloat16
    assert quantized.model.norm.weight.dtype is torch.bfloat16
    assert isinstance(cast.model.layers[0].mlp.up_proj.weight.data, RoutedWeight)
    off = (logits(cast).float() - expected).norm() / expected.norm()
    assert off < 0.05


def test_other_weights_than_those_that_were_searched_are_told(tmp_path):
    searched, other = tiny_llama(seed=0), tiny_llama(seed=1)
    plan = plan_for(searched)
    with pytest.warns(UserWarning, match="not checked that LlamaForCausalLM holds"):
        autoquant.apply(plan, other)
    said = []
    autoquant.apply(plan, tiny_llama(seed=1), listener=said.append)
    assert any("not checked" in getattr(event, "text", "") for event in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoquant.apply(plan, searched)


def test_a_model_from_the_folder_that_was_searched_is_known_by_its_contents(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama(tied=True).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    searched = load_model(tmp_path / "model")
    plan = plan_for(searched.module, searched.content_hash)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoquant.apply(plan, own)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    with torch.no_grad():
        own.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.warns(UserWarning, match="not checked"):
        autoquant.apply(plan, own)


@pytest.mark.parametrize("wrap", ["whole", "in place", "a part"])
def test_a_compiled_model_is_quantized_inside(wrap):
    model = tiny_llama()
    plan = plan_for(model)
    expected = logits(autoquant.apply(plan, copy.deepcopy(model)))
    if wrap == "whole":
        model = torch.compile(model, backend="eager")
    elif wrap == "in place":
        model.compile(backend="eager")
    else:
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert from_module(model).content_hash == plan.model_hash
    assert autoquant.apply(plan, model) is model
    assert isinstance(model.get_parameter("model.layers.0.mlp.up_proj.weight").data, RoutedWeight)
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.01)


def test_a_model_with_adapters_is_refused_with_what_to_do():
    class Adapter(nn.Linear):
        pass

    Adapter.__module__ = "peft.tuners.ia3.layer"
    model = tiny_llama()
    plan = plan_for(model)
    model.model.layers[0].mlp.up_proj = Adapter(32, 64)
    with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
        autoquant.apply(plan, model)


def test_adapters_of_lora_stay_beside_quantized_weights():
    kind = type("Linear", (LowRank,), {"__module__": "peft.tuners.lora.layer"})
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.up_proj = kind(layer.mlp.up_proj).bfloat16()
    expected = logits(model)
    loaded = from_module(model)
    recording = record_model(loaded, Workload.parse("prefill=8,decode=2"), ignore)
    names = {site.name for site in recording.sites}
    assert "model.layers.0.mlp.up_proj.base_layer" in names
    assert not any(name.endswith(("up_proj.up", "up_proj.down")) for name in names)
    assert sum("an adapter's" in left.reason for left in recording.skipped) == 4
    plan = plan_for(model)
    plan = replace(plan, layers=tuple(layer for layer in plan.layers if layer.name in names))
    assert autoquant.apply(plan, model) is model
    adapter = model.model.layers[0].mlp.up_proj
    assert isinstance(adapter.base_layer.weight.data, RoutedWeight)
    assert type(adapter.up.weight) is nn.Parameter
    torch.testing.assert_close(logits(model), expected, rtol=0.05, atol=0.02)


def test_a_quantized_model_with_adapters_is_not_saved_and_says_how(quantized, tmp_path):
    kind = type("Adapter", (nn.Linear,), {"__module__": "peft.tuners.lora.torchao"})
    quantized.model.layers[0].mlp.up_proj = kind(32, 64)
    with pytest.raises(ModelError, match=r"model\.save_pretrained.*model\.unload\(\)"):
        autoquant.save(quantized, tmp_path / "out")


class LowRank(nn.Module):
    """A linear with an adapter beside it, as PEFT makes it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, x):
        y = self.base_layer(x)
        return y + self.up(self.down(x.to(self.down.weight.dtype))).to(y.dtype)


def with_adapters(model):
    """The model with adapters of the same numbers in each layer, below linears that are quantized."""
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
        layer.mlp.up_proj = LowRank(layer.mlp.up_proj)
    return model


def adapter_gradients(model):
    model(IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad for name, grad in found.items() if ".up." in name or ".down." in name}


def test_adapters_are_trained_beside_quantized_weights_as_beside_their_numbers(quantized, tmp_path):
    autoquant.save(quantized, tmp_path / "out")
    plain = copy.deepcopy(quantized)
    for part in plain.modules():
        if isinstance(part, nn.Linear) and isinstance(part.weight.data, RoutedWeight):
            numbers = part.weight.data.dequantize().bfloat16()
            part.__class__, part.weight = nn.Linear, nn.Parameter(numbers, requires_grad=False)
    expected = adapter_gradients(with_adapters(plain))
    found = adapter_gradients(with_adapters(autoquant.load(tmp_path / "out")))
    assert found.keys() == expected.keys() and len(found) == 8
    for name, gradient in found.items():
        off = (gradient - expected[name]).norm() / expected[name].norm()
        assert off < 0.15, name


def test_a_quantized_weight_that_is_changed_in_place_says_what_to_do(quantized):
    weight = quantized.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"quantized.*merge.*before"), torch.no_grad():
        weight.data += torch.ones(weight.shape, dtype=weight.dtype)
