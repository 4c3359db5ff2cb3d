"""Linears under other names: recorded, applied, saved and loaded, with the numbers they had."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from builders.records import make_plan
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear

import autoquant
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.applier import applied
from autoquant.delivery.comparison import same_tensors
from autoquant.delivery.held import check_linears
from autoquant.errors import CheckpointError, ModelError, PlanError
from autoquant.events import ignore
from autoquant.models.copies import unwrapped
from autoquant.models.load import from_module
from autoquant.models.shown import shown_names
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, RouteStep, Workload

WIDTH = 64
_KERNELS = {"int8-row/plain": "int8pack-mm", "float32/plain": "matmul"}
IDS = torch.arange(24).view(3, 8)
PADDING = torch.zeros(3, 8, dtype=torch.bool)
PADDING[0, -3:] = True


class Product(nn.Module):
    """A user's own linear, with a matrix the other way round and names of its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 8)
        self.b = nn.Parameter(torch.randn(2 * WIDTH))

    def forward(self, x):
        return torch.addmm(self.b, x.flatten(0, 1), self.w).view(*x.shape[:2], -1)


class Everything(nn.Module):
    """An encoder, a decoder that reads it, and linears of three other kinds."""

    def __init__(self):
        super().__init__()
        options = {"batch_first": True, "dropout": 0.1, "dim_feedforward": 128}
        self.embed = nn.Embedding(64, WIDTH)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, **options), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, **options), 1)
        self.up, self.down = Product(), FalconLinear(2 * WIDTH, WIDTH)

    def forward(self, ids, padding=None):
        x = self.embed(ids)
        memory = self.encoder(x, src_key_padding_mask=padding)
        x = self.decoder(x, memory, memory_key_padding_mask=padding)
        return self.down(self.up(x).relu())


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Everything().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def recorded(loaded):
    return record_model(loaded, Workload.single(), ignore)


def plan_for(loaded, formats=("int8-row/plain",)):
    layers = [
        LayerChoice(
            name=site.name,
            parameters=site.parameters,
            shape=site.shape,
            format=(fmt := formats[number % len(formats)]),
            route=(RouteStep(upper_m=None, kernel=_KERNELS[fmt]),),
            numerics="int8-row+a16",
            latency_us={},
            memory_bytes=0,
            loss=0.0,
        )
        for number, site in enumerate(recorded(loaded).sites)
    ]
    return make_plan("abcd", layers=tuple(layers), model_hash=loaded.content_hash, dtype="float32")


@torch.no_grad()
def test_all_linears_are_recorded_under_the_names_that_they_have(model):
    expected = model(IDS)
    loaded = from_module(model, sample_inputs=(IDS,))
    recording = recorded(loaded)
    parameters = {name for site in recording.sites for name in site.parameters}
    linear = {name for name, value in model.named_parameters() if value.ndim == 2}
    crossed = "decoder.layers.0.multihead_attn."
    apart = {f"{crossed}{name}_proj_weight" for name in "qkv"}
    assert parameters == linear - {"embed.weight", f"{crossed}in_proj_weight"} | apart
    assert recording.weights_share > 0.94
    assert torch.allclose(loaded.module(IDS), expected, atol=1e-4)
    assert torch.equal(model(IDS), expected) and shown_names(model) == []
    assert loaded.content_hash == from_module(model).content_hash


@pytest.mark.parametrize(
    "formats", [("int8-row/plain",), ("float32/plain", "int8-row/plain")], ids=str
)
@torch.no_grad()
def test_a_plan_is_applied_to_the_users_model_saved_and_loaded(model, formats, tmp_path):
    untouched, full = copy.deepcopy(model), model(IDS)
    loaded = from_module(model, sample_inputs=(IDS,))
    plan = plan_for(loaded, formats)
    expected = applied(plan, loaded.module, None)(IDS)
    assert 0 < (expected - full).norm() < 0.1 * full.norm()
    assert autoquant.apply(plan, model, listener=ignore) is model
    assert torch.equal(model(IDS), expected)
    crossed = model.decoder.layers[0].multihead_attn
    assert crossed.in_proj_weight is None
    autoquant.save(model, tmp_path / "saved")
    again = autoquant.load(tmp_path / "saved", untouched)
    assert torch.equal(again(IDS), expected)
    assert same_tensors(again, model)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(IDS), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_an_encoder_of_which_only_later_layers_are_quantized_takes_padding(model):
    plan = plan_for(from_module(model, sample_inputs=(IDS,)))
    kept = [layer for layer in plan.layers if not layer.name.startswith("encoder.layers.0")]
    expected = model(IDS, PADDING)
    autoquant.apply(replace(plan, layers=tuple(kept)), model, listener=ignore)
    found = model(IDS, PADDING)
    assert (found - expected).norm() < 0.1 * expected.norm()


WRAPPERS = {
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda module: torch.compile(nn.DataParallel(module)),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@torch.no_grad()
def test_a_wrapped_module_is_searched_applied_to_and_filled(wrap, tmp_path):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, 64), parametrizations.weight_norm(nn.Linear(64, 32))
        ).eval()

    x = torch.randn(5, 64)
    wrapped, other = WRAPPERS[wrap](made()), WRAPPERS[wrap](made())
    loaded = from_module(wrapped, sample_inputs=(x,))
    assert loaded.content_hash == from_module(made(), sample_inputs=(x,)).content_hash
    plan = plan_for(loaded)
    expected = applied(plan, loaded.module, None)(x)
    assert autoquant.apply(plan, wrapped, listener=ignore) is wrapped
    autoquant.save(wrapped, tmp_path / "saved")
    assert autoquant.load(tmp_path / "saved", other) is other
    inner = unwrapped(other)
    assert torch.equal(inner(x), expected)
    assert all(isinstance(inner[number].weight, RoutedWeight) for number in range(2))


@torch.no_grad()
def test_convolutions_of_one_point_are_applied_saved_and_loaded(tmp_path):
    def made():
        torch.manual_seed(0)
        layers = nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 8, 3)
        return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)

    x = torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last)
    model, other = made(), made()
    full, loaded = model(x), from_module(model, sample_inputs=(x,))
    plan = plan_for(loaded)
    assert [layer.name for layer in plan.layers] == ["0", "2"]
    assert ("3.weight", "not used as a linear: conv2d") in {
        (left.name, left.reason) for left in recorded(loaded).skipped
    }
    expected = applied(plan, loaded.module, None)(x)
    assert 0 < (expected - full).norm() < 0.05 * full.norm()
    assert torch.equal(autoquant.apply(plan, model, listener=ignore)(x), expected)
    autoquant.save(model, tmp_path / "saved")
    again = autoquant.load(tmp_path / "saved", other)
    assert torch.equal(again(x), expected)
    assert torch.allclose(again(x.contiguous()), expected, atol=1e-4)
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_plan_for_another_module_changes_nothing(model):
    plan = plan_for(from_module(model, sample_inputs=(IDS,)))
    other = Everything().eval()
    other.down = FalconLinear(2 * WIDTH, WIDTH // 2)
    expected = other(IDS)
    with pytest.raises(ModelError, match=r"down\.weight is"):
        autoquant.apply(plan, other, listener=ignore)
    assert torch.equal(other(IDS), expected) and shown_names(other) == []


def test_a_manifest_shows_no_other_module(model, tmp_path):
    loaded = from_module(model, sample_inputs=(IDS,))
    autoquant.apply(plan_for(loaded), model, listener=ignore)
    autoquant.save(model, tmp_path / "saved")
    path = tmp_path / "saved" / "autoquant.json"
    manifest = json.loads(path.read_text())
    assert (
        "up" in manifest["turned"]
        and "decoder.layers.0.multihead_attn.q_proj_weight" in manifest["turned"]
    )
    path.write_text(json.dumps(manifest | {"turned": ["embed", "encoder", "nothing", ""]}))
    with pytest.raises(CheckpointError, match="another architecture"):
        autoquant.load(tmp_path / "saved", Everything())


def test_files_for_engines_are_refused_with_a_weight_of_an_attention(model):
    loaded = from_module(model, sample_inputs=(IDS,))
    loaded.module.up = nn.Identity()
    layers = plan_for(from_module(model, sample_inputs=(IDS,))).layers
    with pytest.raises(PlanError, match=r"self_attn\.in_proj_weight.* are none"):
        check_linears(loaded.module, [layer for layer in layers if "in_proj" in layer.name])
