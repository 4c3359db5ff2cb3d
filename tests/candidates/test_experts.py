"""Quantized weights of experts: in every way that transformers computes them, and compiled."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from builders.mixtures import KINDS, mixtral
from torch import nn

from autoquant.candidates import InputStatistics, get_format, routed
from autoquant.candidates.apart_experts import ApartExperts
from autoquant.candidates.calls import LinearHook, expert_rows, product, product_back
from autoquant.candidates.experts import (
    ExpertInputs,
    ExpertsOperand,
    ExpertsWeight,
    cannot_hold_experts,
    multiply_experts,
    store_for_inputs,
)
from autoquant.candidates.flat import same_bits
from autoquant.candidates.linears import take_apart
from autoquant.records import RouteStep

IDS = torch.arange(3, 23).unsqueeze(0)
ENDS = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
INT8 = get_format("int8-row/plain")
INT4 = get_format("int4-g32/lanes")


def quantized(weight, fmt=INT8, turned=False, kernel=None):
    straight = weight.transpose(-2, -1) if turned else weight
    stored = fmt.store(straight.flatten(0, 1))
    route = (RouteStep(upper_m=None, kernel=kernel or fmt.kernels[0].id),)
    return ExpertsWeight.of(stored, fmt, route, weight.dtype, len(weight), turned)


def quantize_experts(module, fmt=INT8):
    turned = module.config.model_type == "gpt_oss"
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim == 3:
                weight = quantized(parameter.data, fmt, turned)
                owner._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return module


def with_numbers(module):
    """The same model with plain weights that hold the numbers of the quantized ones."""
    plain = copy.deepcopy(module)
    for owner in plain.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter.data, ExpertsWeight):
                numbers = parameter.data.dequantize().to(torch.bfloat16).contiguous()
                owner._parameters[name] = nn.Parameter(numbers, requires_grad=False)
    return plain


def distance(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@pytest.fixture(params=list(KINDS))
def model(request):
    return KINDS[request.param]()


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=lambda fmt: fmt.values)
@torch.no_grad()
def test_each_row_is_multiplied_with_its_own_experts_numbers(fmt):
    weight = torch.randn(4, 48, 64).bfloat16()
    held = quantized(weight, fmt)
    x = torch.randn(10, 64).bfloat16()
    y = F.grouped_mm(x, held.transpose(-2, -1), offs=ENDS)
    numbers = held.dequantize()
    assert numbers.shape == weight.shape and 0 < distance(numbers, weight) < 0.2
    for expert, start, end in [(0, 0, 3), (2, 3, 8), (3, 8, 10)]:
        assert distance(y[start:end], x[start:end].float() @ numbers[expert].t()) < 0.02
    assert list(expert_rows(ENDS)) == [(0, 0, 3), (2, 3, 8), (3, 8, 10)]


def test_rows_of_no_expert_give_zeros():
    held = quantized(torch.randn(4, 48, 64).bfloat16())
    y = F.grouped_mm(torch.randn(14, 64).bfloat16(), held.transpose(-2, -1), offs=ENDS)
    assert y.shape == (14, 48) and bool((y[10:] == 0).all()) and bool((y[:10] != 0).any())


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm", "eager"])
@torch.no_grad()
def test_every_implementation_of_transformers_computes_with_them(model, how):
    before = model(IDS).logits
    plain = with_numbers(quantize_experts(model))
    model.set_experts_implementation(how)
    y, expected = model(IDS).logits, plain(IDS).logits
    assert distance(y, expected) < 0.02 < distance(expected, before) * 4


@torch.no_grad()
def test_taken_apart_they_compute_the_same_also_after_a_copy_and_a_move(model):
    expected = quantize_experts(model)(IDS).logits
    take_apart(model)
    experts = [part for part in model.modules() if isinstance(part, ApartExperts)]
    assert len(experts) == 2 and all(len(each.operands) == 2 for each in experts)
    assert distance(model(IDS).logits, expected) < 0.01
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(copy.deepcopy(model).to("cpu")(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_a_layer_with_one_quantized_weight_of_two_is_taken_apart_too():
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    experts._parameters["down_proj"] = nn.Parameter(
        quantized(experts.down_proj.data), requires_grad=False
    )
    expected = model(IDS).logits
    take_apart(model)
    assert list(experts.operands) == ["down_proj"]
    assert distance(model(IDS).logits, expected) < 0.01


@pytest.mark.slow
@torch.no_grad()
def test_compiled_without_a_break_they_compute_the_same(model):
    take_apart(quantize_experts(model))
    compiled = torch.compile(model, fullgraph=True)
    for ids in (IDS, IDS[:, :9]):
        assert distance(compiled(ids).logits, model(ids).logits) < 0.03


def test_a_hook_sees_the_parameter_itself_and_may_replace_the_product(model):
    class Watcher(LinearHook):
        def __init__(self):
            super().__init__()
            self.calls = []

        def on_linear(self, call):
            if call.ends is None:
                return None
            self.calls.append(call)
            straight = call.straight()
            assert straight.shape[1:] in {(192, 64), (64, 96)}
            return product(call.x, straight, call.ends)

    parameters = {id(each): name for name, each in model.named_parameters()}
    with torch.no_grad():
        expected = model(IDS).logits
        with Watcher() as watcher:
            y = model(IDS).logits
    assert distance(y, expected) < 0.02
    assert [parameters[id(call.weight)].rpartition(".")[2] for call in watcher.calls] == [
        "gate_up_proj",
        "down_proj",
    ] * 2
    assert all(call.ends[-1] == 2 * IDS.numel() for call in watcher.calls)


def test_gradients_pass_back_through_each_rows_own_expert():
    weight = torch.randn(4, 48, 64)
    x = torch.randn(14, 64, requires_grad=True)
    gradient = torch.randn(14, 48)
    y = torch.zeros(14, 48)
    rows = [y[:0]]
    for expert, start, end in expert_rows(ENDS):
        rows.append(F.linear(x[start:end], weight[expert]))
    torch.cat(rows).backward(gradient[:10])
    of_x = product_back(gradient, weight, ENDS)
    assert torch.allclose(of_x, x.grad, atol=1e-5)


def test_each_expert_is_rounded_for_its_own_inputs_and_an_idle_one_to_nearest():
    fmt = get_format("int4-g32-gptq/lanes")
    weight = torch.randn(3, 48, 64).bfloat16()
    rows = [torch.randn(200, 64) @ torch.randn(64, 64) for _ in range(2)]
    inputs = [InputStatistics(x.t() @ x) for x in rows]
    stored = store_for_inputs(fmt, weight, ExpertInputs([inputs[0], None, inputs[1]], False))
    held = ExpertsWeight.of(stored, fmt, (), torch.bfloat16, 3)
    alone = [
        fmt.store(weight[0], inputs[0]),
        INT4.store(weight[1]),
        fmt.store(weight[2], inputs[1]),
    ]
    assert all(same_bits(held.expert(n).stored, own) for n, own in enumerate(alone))
    turned = weight.transpose(-2, -1).contiguous()
    again = store_for_inputs(fmt, turned, ExpertInputs([inputs[0], None, inputs[1]], True))
    assert same_bits(again, stored)


def test_gradients_of_adapters_pass_through_experts_that_were_taken_apart(model):
    take_apart(quantize_experts(model))
    plain = with_numbers(model)
    of = []
    for each in (model, plain):
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=inputs).logits.float().square().sum().backward()
        of.append(inputs.grad)
    assert of[0].any() and distance(*of) < 0.05


def test_compiled_code_has_the_gradients_of_an_eager_call():
    weight = quantized(torch.randn(4, 48, 64).bfloat16(), INT4)
    operand = ExpertsOperand(weight)
    of = []
    for multiplied in (operand.product, lambda x, ends: multiply_experts(x, weight, ends)):
        torch.manual_seed(1)
        x = torch.randn(14, 64).bfloat16().requires_grad_()
        multiplied(x, ENDS).float().square().sum().backward()
        of.append(x.grad)
    assert of[0][:10].any() and torch.equal(*of)
    torch.library.opcheck(
        torch.ops.autoquant.grouped_product, (x, ENDS, operand.parts, operand.make)
    )


@torch.no_grad()
def test_weights_that_are_put_in_place_later_are_those_that_compute():
    model = mixtral()
    expected = model(IDS).logits
    before = copy.deepcopy(model.state_dict())
    take_apart(quantize_experts(model))
    assert distance(model(IDS).logits, expected) > 0.002
    model.load_state_dict(before, assign=True)
    assert distance(model(IDS).logits, expected) < 0.002


@torch.no_grad()
def test_a_route_that_changes_later_is_the_one_that_computes(monkeypatch):
    """Quality is measured so, with the kernels whose numerics lose most."""
    model = take_apart(quantize_experts(mixtral()))
    expected = model(IDS).logits
    other = INT8.kernels[0].linear
    key = (INT8.id, "another")
    monkeypatch.setitem(
        routed._KERNEL_FUNCTIONS, key, lambda x, stored, bias: 2 * other(x, stored, bias)
    )
    weights = [each for each in model.parameters() if isinstance(each, ExpertsWeight)]
    assert len(weights) == 4
    for weight in weights:
        weight.route = ((None, "another"),)
    assert distance(model(IDS).logits, expected) > 0.1


def test_a_format_whose_tensors_do_not_lie_row_by_row_cannot_hold_experts():
    for fmt in (INT8, INT4, get_format("bfloat16/plain")):
        assert cannot_hold_experts(fmt, "cpu") == ""
    assert "row by row" in cannot_hold_experts(get_format("int4-g32/cpu-packed"), "cpu")


def test_a_gpu_takes_formats_whose_kernels_multiply_several_experts_at_once():
    for name in ("int4-g64/tiled", "int4s-g32/tiled", "float8-row/plain", "bfloat16/plain"):
        assert cannot_hold_experts(get_format(name), "cuda") == ""
    assert "several experts at once" in cannot_hold_experts(INT8, "cuda")


@pytest.mark.parametrize("name", ["float8-row/plain", "bfloat16/plain"])
@torch.no_grad()
def test_products_of_all_experts_at_once_are_those_of_each(name):
    """Those that are plain PyTorch run on a CPU, too."""
    fmt, weight = get_format(name), torch.randn(4, 48, 128).bfloat16()
    x = torch.randn(14, 128).bfloat16()
    (kernel,) = [each for each in fmt.kernels if each.id in ("dequantize-matmul", "matmul")]
    y = kernel.grouped(x, fmt.store(weight.flatten(0, 1)), ENDS)
    held = quantized(weight, fmt, kernel=kernel.id)
    assert distance(y[:10], multiply_experts(x, held, ENDS)[:10]) < 0.01


def test_what_cannot_be_computed_says_so():
    held = quantized(torch.randn(4, 48, 64).bfloat16())
    x = torch.randn(10, 48).bfloat16()
    with pytest.raises(TypeError, match="rows of their own"):
        F.grouped_mm(x, held, offs=ENDS)  # [experts, n, k], not its transpose
    with pytest.raises(TypeError, match="last two dimensions"):
        held.transpose(0, 1)
