"""Mixtures of experts of transformers: recorded, scored, applied, saved, streamed and loaded."""

import json
from dataclasses import replace

import pytest
import torch
from builders.mixtures import KINDS
from builders.records import make_plan
from end_to_end.conftest import python
from models.test_model_streaming import WORKLOAD
from models.tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM

import autoquant
from autoquant.candidates import A16, InputStatistics, get_format, routed
from autoquant.candidates.apart_experts import ApartExperts
from autoquant.candidates.experts import ExpertInputs, ExpertsWeight
from autoquant.candidates.flat import same_bits, stored_bytes
from autoquant.delivery import checkpoint
from autoquant.delivery.applier import applied
from autoquant.delivery.held import scheme_of
from autoquant.delivery.kernel_check import KernelsInModel, check_kernels
from autoquant.delivery.layers import write_layers
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.devices.memory import LIMIT_VARIABLE
from autoquant.engines.targets import TARGETS, Refusal
from autoquant.errors import KernelError, ModelError
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change, fisher
from autoquant.evaluators.text import TextParts
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.profiler import record as recording_module
from autoquant.profiler.record import record_model
from autoquant.records import LayerChoice, RouteStep
from autoquant.report.names import layer_words

IDS = torch.arange(3, 23).unsqueeze(0)
WINDOWS = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(0))
INT8, INT4 = get_format("int8-row/plain"), get_format("int4-g32/lanes")
COARSE = get_format("int3-g32/bit-planes")


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    KINDS[request.param]().save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def recording(loaded):
    return record_model(loaded, WORKLOAD, ignore)


def experts_in(recording):
    return {site.name: site for site in recording.sites if site.experts > 1}


def plan_for(loaded, recording, fmt=INT8):
    layers = [
        LayerChoice(
            name=site.name,
            parameters=site.parameters,
            shape=site.shape,
            format=(fmt if site.experts > 1 else INT8).id,
            route=(
                RouteStep(upper_m=None, kernel=(fmt if site.experts > 1 else INT8).kernels[0].id),
            ),
            numerics="int8-row+a16",
            latency_us={},
            memory_bytes=0,
            loss=0.0,
            experts=site.experts,
            turned=site.turned,
        )
        for site in recording.sites
        if site.shape.n > 4  # not the routers
    ]
    return make_plan("abcd", layers=tuple(layers), model_hash=loaded.content_hash)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def distance(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def test_the_experts_of_a_layer_are_one_site_with_the_rows_that_each_gets(recording, folder):
    found = experts_in(recording)
    assert len(found) == 4 and recording.weights_share > 0.9
    turned = "gpt_oss" in folder.name
    for name, site in found.items():
        assert (site.experts, site.turned) == (4, turned) and site.parameters == (name,)
        assert (site.shape.n, site.shape.k) == ((192, 64) if "gate" in name else (64, 96))
        prefill, decode = site.uses
        assert prefill.calls <= 4 and prefill.m == round(32 / prefill.calls)
        assert (decode.m, decode.calls) == (1, 2)  # two experts a token
        assert site.weights == 4 * site.shape.n * site.shape.k and site.siblings == (name,)
    assert min(recording.flops_share.values()) > 0.8


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_single_expert_is_left_alone_and_the_reason_said(kind, tmp_path):
    model = KINDS[kind](experts=1)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    recording = record_model(load_model(tmp_path), WORKLOAD, ignore)
    assert not [site for site in recording.sites if "experts" in site.name]
    reasons = {skipped.name: skipped.reason for skipped in recording.skipped}
    for name in ("gate_up_proj", "down_proj"):
        assert "a single expert" in reasons[f"model.layers.1.mlp.experts.{name}"]


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=lambda fmt: fmt.values)
def test_what_is_saved_loads_again_with_and_without_autoquant_load(
    loaded, recording, folder, tmp_path, fmt
):
    plan = plan_for(loaded, recording, fmt)
    module = applied(plan, loaded.module, None)
    assert sum(isinstance(part, ApartExperts) for part in module.modules()) == 2
    expected = logits(module)
    assert 0 < distance(expected, logits(loaded.module)) < 0.5
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.write(replace(loaded, module=module), plan, out)
    for model in (autoquant.load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert torch.equal(logits(model), expected)
        weight = model.model.layers[0].mlp.experts.gate_up_proj.data
        assert isinstance(weight, ExpertsWeight) and weight.format_id == fmt.id


def test_a_new_process_generates_what_this_one_does(loaded, recording, tmp_path):
    plan = plan_for(loaded, recording)
    module = applied(plan, loaded.module, None)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.write(replace(loaded, module=module), plan, out)
    code = (
        f"import torch, autoquant; model = autoquant.load({str(out)!r});"
        " ids = torch.arange(3, 23).unsqueeze(0);"
        " print(model.generate(ids, max_new_tokens=6, do_sample=False)[0, 20:].tolist())"
    )
    said = json.loads(python("-c", code).stdout.splitlines()[-1])
    ids = IDS
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert said == ids[0, 20:].tolist()


def test_files_are_quantized_layer_by_layer_as_in_memory(
    folder, recording, loaded, tmp_path, monkeypatch
):
    plan = plan_for(loaded, recording)
    expected = logits(applied(plan, loaded.module, None))
    monkeypatch.setenv(LIMIT_VARIABLE, "300kB")
    streamed = load_model(folder)
    assert streamed.stream is not None
    out = tmp_path / "out"
    out.mkdir()
    write_layers(plan, streamed, out, calibration=None, listener=ignore)
    monkeypatch.delenv(LIMIT_VARIABLE)
    assert torch.equal(logits(autoquant.load(out)), expected)


def test_a_streamed_model_has_the_sites_of_a_whole_one(folder, recording, monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "300kB")
    streamed = load_model(folder)
    found = record_model(streamed, WORKLOAD, ignore)
    assert [site.name for site in found.sites] == [site.name for site in recording.sites]
    assert {s.experts for s in found.sites} == {s.experts for s in recording.sites}


@pytest.mark.parametrize("method", ["fisher", "path"])
def test_their_losses_are_predicted_as_those_of_other_linears(
    loaded, recording, method, monkeypatch
):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 2400)
    windows = dict.fromkeys(("calibration", "selection", "report"), WINDOWS)
    quality = TextQuality(TextParts(windows), "cpu")
    sites = list(experts_in(recording).values())
    changes = [Change(site, "int8-row+a16", INT8, A16) for site in sites]
    found, exact = {}, {}
    SENSITIVITIES[method].score(loaded.module, changes, quality, lambda _n, of: found.update(of))
    SENSITIVITIES["isolated"].score(
        loaded.module, changes, quality, lambda _n, of: exact.update(of)
    )
    assert all(loss > 0 for loss in exact.values())
    ratios = sorted(found[key] / exact[key] for key in exact)
    assert ratios[0] > 0.5 and ratios[-1] < 2, ratios


def test_each_expert_is_rounded_for_what_it_reads(loaded, recording):
    fmt = get_format("int4-g32-gptq/lanes")
    name, site = next(iter(experts_in(recording).items()))
    read = {}

    class Reader(recording_module.LinearHook):
        def on_linear(self, call):
            if call.weight is loaded.module.get_parameter(name):
                for expert, start, end in recording_module.expert_rows(call.ends):
                    rows = call.x[start:end].float()
                    read[expert] = read.get(expert, 0) + rows.t() @ rows

    made = Calibration(WINDOWS)
    assert made.prepare(loaded.module, {name: [fmt]}) == {}
    with torch.no_grad(), Reader():
        for ids in WINDOWS:
            loaded.module(ids.unsqueeze(0))
    weight = loaded.module.get_parameter(name).data
    straight = weight.transpose(-2, -1) if site.turned else weight
    held = ExpertsWeight.of(made.stored(name, fmt), fmt, (), weight.dtype, 4)
    for expert in range(4):
        alone = fmt.store(straight[expert], InputStatistics(read[expert]))
        assert same_bits(held.expert(expert).stored, alone)
    assert made.idle == {}


def test_an_expert_that_the_text_does_not_reach_is_named(loaded, recording):
    fmt = get_format("int4-g32-gptq/lanes")
    made = Calibration(WINDOWS[:1, :1])  # one token, so two of four experts
    name = next(iter(experts_in(recording)))
    assert made.prepare(loaded.module, {name: [fmt]}) == {}
    assert len(made.idle[name]) == 2
    assert ExpertInputs([None, InputStatistics(torch.eye(2))], False).idle == [0]


def test_kernels_are_checked_with_the_rows_of_each_expert(loaded, recording):
    module = applied(plan_for(loaded, recording), loaded.module, None)
    assert check_kernels(module) > 0
    seen = []
    with torch.no_grad(), KernelsInModel(module, lambda *what: seen.append(what)):
        logits(module)
    assert any("experts.gate_up_proj" in layer for layer, _, _ in seen)


def test_a_kernel_that_computes_wrong_numbers_for_an_expert_is_found(
    loaded, recording, monkeypatch
):
    module = applied(plan_for(loaded, recording), loaded.module, None)
    weight = module.model.layers[1].mlp.experts.down_proj.data
    right = get_format(weight.format_id).kernel(weight.route[0][1]).linear
    key = (weight.format_id, weight.route[0][1])

    def wrong(x, stored, bias):
        return right(x, stored, bias) * (1.5 if stored.shape[1] == 96 else 1)

    monkeypatch.setitem(routed._KERNEL_FUNCTIONS, key, wrong)
    wrong_numbers = pytest.raises(KernelError, match=r"experts\.down_proj")
    with torch.no_grad(), wrong_numbers, KernelsInModel(module):
        logits(module)


def test_memory_counts_every_expert(loaded, recording):
    module = applied(plan_for(loaded, recording), loaded.module, None)
    for name, site in experts_in(recording).items():
        one = INT8.store(torch.zeros(site.shape.n, site.shape.k, dtype=torch.bfloat16))
        assert stored_bytes(module.get_parameter(name).data) == 4 * stored_bytes(one)


def test_another_number_of_experts_is_refused_before_anything_is_changed(loaded, recording, folder):
    plan = plan_for(loaded, recording)
    other = KINDS["gpt_oss" if "gpt_oss" in folder.name else "mixtral"](experts=3)
    with pytest.raises(ModelError, match="the plan is for another model"):
        autoquant.apply(plan, other)


def test_files_for_engines_refuse_them_and_say_what_they_are(loaded, recording):
    layer = next(each for each in plan_for(loaded, recording).layers if each.experts > 1)
    found = scheme_of(layer, TARGETS["compressed-tensors"])
    assert isinstance(found, Refusal) and "not that of a linear module" in found.reason
    assert layer_words(layer, 2) == "2 layers of 192 x 64 for 4 experts, bfloat16"
