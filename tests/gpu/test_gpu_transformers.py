"""What apply wrote on a GPU, loaded there by every way, and moved there."""

from __future__ import annotations

import pytest
import torch
from end_to_end.applied import save_applied
from end_to_end.tiny import save_llama
from transformers import AutoModelForCausalLM, pipeline

import autoquant
from autoquant.candidates.joined import whole_of
from autoquant.records import RouteStep

pytestmark = pytest.mark.gpu

IDS = torch.arange(12).unsqueeze(0)
ANY_ROWS = (RouteStep(upper_m=None, kernel="dequantize-matmul"),)


@pytest.fixture(scope="module", params=["int8-row/plain", "float8-row/plain"])
def quantized(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("quantized")
    weights = (request.param, ANY_ROWS)
    return save_applied(
        save_llama(place / "original"), place / "out", "cuda", eight=weights, four=weights
    )


def by_device_map(folder):
    pytest.importorskip("accelerate")
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")


def by_the_best_device(folder):
    pytest.importorskip("accelerate")
    return AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


WAYS = {
    "device_map": by_device_map,
    "auto": by_the_best_device,
    "moved": lambda folder: AutoModelForCausalLM.from_pretrained(folder).to("cuda"),
    "loaded and moved": lambda folder: autoquant.load(folder).cuda(),
    "pipeline": lambda folder: pipeline("text-generation", model=str(folder)).model,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_logits_and_keeps_the_layers_as_one(quantized, way):
    expected = autoquant.load(quantized, device="cuda")
    model = WAYS[way](quantized)
    assert model.device.type == "cuda"
    with torch.no_grad():
        assert torch.equal(model(IDS.cuda()).logits, expected(IDS.cuda()).logits)
    assert whole_of(model.model.layers[0].self_attn.v_proj.weight.data).start == 96


def test_what_is_saved_on_a_gpu_loads_again(quantized, tmp_path):
    model = autoquant.load(quantized, device="cuda")
    model.save_pretrained(tmp_path / "out")
    again = autoquant.load(tmp_path / "out", device="cuda")
    with torch.no_grad():
        assert torch.equal(model(IDS.cuda()).logits, again(IDS.cuda()).logits)
