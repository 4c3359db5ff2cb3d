"""Models compiled part by part."""

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from models.tiny_models import as_loaded, tiny_llama
from torch import nn
from torch._dynamo.utils import counters

from autoquant.evaluators.quality import next_token_logits
from autoquant.models.copies import shallow_copy
from autoquant.records import Workload
from autoquant.runtime import parts
from autoquant.runtime.compiled import ready_to_compile
from autoquant.runtime.parts import compile_parts
from autoquant.runtime.phases import make_phases
from runtime.test_compiled import (
    INT8,
    INT8_DEQUANTIZED,
    Blocks,
    X,
    quantize,
    quantized_blocks,
    siblings,
)

WORKLOAD = Workload.parse("prefill=4,decode=3")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(parts, "FUNCTIONS", {})


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that would be compiled; they are run as they are."""
    found = []

    def compile_fx(graph, _inputs):
        found.append(graph)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


def in_parts(module):
    return compile_parts(ready_to_compile(module, regions=False))


def run(module, x=X):
    with torch.no_grad():
        return module(x)


def deep_llama(layers):
    module = tiny_llama()
    blocks = module.model.layers
    while len(blocks) < layers:
        blocks.append(tiny_llama(seed=len(blocks)).model.layers[1])
        blocks[-1].self_attn.layer_idx = len(blocks) - 1
    module.config.num_hidden_layers = layers
    return module.requires_grad_(False)


def steps(module):
    """What each phase gives, in parts and as the model itself gives it, with how far the cache was filled after each."""
    phases = make_phases(as_loaded(module), WORKLOAD, compiled=True)
    filled = phases._decoder._state.filled
    found = []
    for phase in WORKLOAD.phases:
        for _ in range(2):  # traced, then run again
            phases.reset(phase.name)
            expected, length = phases.run_eager(phase.name), filled.clone()
            phases.reset(phase.name)
            result = phases.run(phase.name)
            found.append((result, expected, filled.clone(), length))
    return found


def test_steps_in_parts_compute_what_the_model_computes():
    module = deep_llama(2)
    for layer in module.model.layers:
        quantize(layer.mlp.up_proj, INT8)
    for result, expected, length, expected_length in steps(module):
        torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        assert length == expected_length


def test_as_many_parts_are_compiled_for_many_layers_as_for_few(graphs):
    counts = []
    for layers in (2, 5):
        parts.FUNCTIONS.clear()
        graphs.clear()
        for result, expected, length, expected_length in steps(deep_llama(layers)):
            torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
            assert length == expected_length
        counts.append(len(graphs))
    # Embedding, positions, block and norm, for each of two phases, and the head of one token.
    assert counts == [9, 9]


def test_the_next_plan_compiles_only_what_no_plan_had_before(graphs):
    module = quantized_blocks(None, None, None)
    run(in_parts(module))
    assert len(graphs) == 1
    plan = shallow_copy(module)
    quantize(plan.layers[1].up, INT8)
    run(in_parts(plan))
    assert len(graphs) == 2
    again = shallow_copy(module)
    quantize(again.layers[2].up, INT8)
    torch.testing.assert_close(run(in_parts(again)), run(again))
    assert len(graphs) == 2


def test_blocks_of_different_makes_are_compiled_by_themselves(graphs):
    module = quantized_blocks(INT8, INT8_DEQUANTIZED, None, INT8)
    torch.testing.assert_close(run(in_parts(module)), run(module))
    assert len(graphs) == 3


def test_blocks_that_differ_in_a_number_are_compiled_by_themselves(graphs):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor, self.linear = factor, nn.Linear(64, 64, dtype=torch.bfloat16)

        def forward(self, x):
            return self.linear(x) * self.factor

    module = nn.Sequential(Scaled(2.0), Scaled(3.0), Scaled(2.0)).requires_grad_(False)
    assert torch.equal(run(in_parts(nn.Sequential(module))), run(module))
    assert len(graphs) == 2


def test_a_part_is_traced_anew_for_other_shapes_and_other_arguments(graphs):
    class Switch(nn.Module):
        def forward(self, x, flag=True):
            return x + 1 if flag else x - 1

    module = compile_parts(nn.Sequential(Switch()))[0]
    ones = torch.ones(3)
    assert module(ones).tolist() == [2, 2, 2] and module(ones, flag=False).tolist() == [0, 0, 0]
    assert module(torch.ones(2)).tolist() == [2, 2] and module(ones).tolist() == [2, 2, 2]
    assert len(graphs) == 3


@pytest.mark.parametrize(
    ("joined", "expected"), [(("q",), 3), (("q", "k"), 2), (("q", "k", "v"), 2)]
)
def test_joined_weights_of_one_input_are_multiplied_as_one(joined, expected, graphs):
    module = siblings(joined)  # v reads another input than q and k
    torch.testing.assert_close(
        run(in_parts(nn.Sequential(module))), run(module), rtol=0.02, atol=0.02
    )
    (graph,) = graphs
    assert sum(node.target in PRODUCTS for node in graph.graph.nodes) == expected


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def test_a_linear_of_a_strided_input_is_a_product_of_matrices(graphs):
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.linear(x[:, -1:])

    module, x = nn.Sequential(Sliced()).requires_grad_(False), torch.randn(4, 7, 64)
    torch.testing.assert_close(run(in_parts(module), x), run(module, x))
    assert [
        node.target for node in graphs[0].graph.nodes if node.target in (*PRODUCTS, BATCHED)
    ] == [PRODUCTS[0]]


BATCHED = torch.ops.aten.bmm.default


def test_a_linear_that_is_called_by_keywords_is_one_too(graphs):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 64))

        def forward(self, x):
            return nn.functional.linear(input=x[:, -1:], weight=self.weight)

    module, x = nn.Sequential(Named()).requires_grad_(False), torch.randn(4, 7, 64)
    torch.testing.assert_close(run(in_parts(module), x), run(module, x))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Mixing(nn.Module):
    def forward(self, pair, *, named, factor):
        return (pair.first - pair.second) * factor + named["plus"][0]


def test_tensors_are_found_in_arguments_of_any_form(graphs):
    module, plain = compile_parts(nn.ModuleDict({"mixing": Mixing()})), Mixing()
    for scale, rows, factor in ((1.0, 3, 2), (4.0, 3, 2), (1.0, 5, 2), (1.0, 3, 2.0), (1.0, 3, 7)):
        pair = Pair(torch.full((rows, 2), scale), torch.ones(rows, 2))
        rest = {"named": {"plus": [torch.full((2,), scale)]}, "factor": factor}
        expected = plain(pair, **rest)
        assert torch.equal(module["mixing"](pair, **rest), expected)
    assert len(module["mixing"].forward._compiled) == 4


def test_a_part_whose_graph_begins_with_its_own_tensors_is_compiled(graphs):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.arange(6.0))
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x):
            return self.weight * self.scale + x

    module = compile_parts(nn.Sequential(Scaled()))
    assert run(module, torch.ones(6)).tolist() == [1, 3, 5, 7, 9, 11]
    graphs[0].graph.lint()
    assert [node.op for node in graphs[0].graph.nodes][:3] == ["placeholder"] * 3


def test_a_part_that_decides_by_a_tensors_value_is_refused(graphs):
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.ones(()))

        def forward(self, x):
            return x + 1 if self.count > 0 else x

    module = compile_parts(nn.Sequential(Deciding()))
    with pytest.raises(RuntimeError):
        run(module)


def test_the_model_itself_is_left_as_it_is(graphs):
    module = Blocks().to(torch.bfloat16)
    run(in_parts(module))
    assert not any("forward" in vars(child) for child in module.modules())
    assert not torch.compiler.is_compiling()


def test_a_compiled_part_keeps_no_activations(graphs):
    module = in_parts(quantized_blocks(None, None))
    x = X.clone()
    gone = weakref.ref(x)
    run(module, x)
    del x
    gc.collect()
    assert gone() is None


def test_the_compiler_finds_on_disk_what_an_earlier_process_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = Blocks().bfloat16().requires_grad_(False)
    expected = run(module)
    found = []
    for _ in range(2):
        monkeypatch.setattr(parts, "FUNCTIONS", {})  # as in a new process
        counters.clear()
        torch.testing.assert_close(run(in_parts(module)), expected)
        found.append(
            (counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
        )
    (compiled, _), again = found
    assert compiled > 0 and again == (0, compiled)


def test_parts_that_cannot_be_called_from_cpp_are_called_from_python(monkeypatch, caplog):
    asked = []
    compile_graph = parts.compile_graph

    def picky(graph, inputs, *, settings=None):
        asked.append(dict(settings or {}))
        if settings:
            raise NotImplementedError("not for the wrapper")
        return compile_graph(graph, inputs)

    monkeypatch.setattr(parts, "compile_graph", picky)
    with caplog.at_level("INFO"):
        for result, expected, *_ in steps(deep_llama(2)):
            torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
    assert {"cpp_wrapper": True} in asked and {} in asked
    assert "compiled without cpp_wrapper: not for the wrapper" in caplog.text


def test_a_token_is_replayed_without_the_models_own_code():
    module = deep_llama(2)
    phases = make_phases(as_loaded(module), WORKLOAD, compiled=True)
    phases.reset("decode")
    phases.run("decode")
    calls = []
    phases._decoder._parts.model.register_forward_hook(lambda *_: calls.append(1))
    phases.run_launched("decode")
    assert len(calls) == 1
    phases.run("decode")
    assert len(calls) == 1


def prompt_of(module, workload=WORKLOAD, **options):
    options = {"compiled": True, "division": "parts", **options}
    return make_phases(as_loaded(module), workload, **options).compiled_prompt()


def test_a_compiled_prompt_gives_all_logits_of_every_window(graphs):
    module = deep_llama(3)
    quantize(module.model.layers[1].mlp.up_proj, INT8)
    prompt = prompt_of(module)
    assert prompt.tokens == 4
    for ids in (torch.tensor([[1, 5, 2, 7]]), torch.tensor([[9, 3, 3, 4]])):
        expected = next_token_logits(module, ids)
        torch.testing.assert_close(next_token_logits(prompt, ids), expected, rtol=0.05, atol=0.05)


def test_windows_compile_nothing_but_what_only_the_last_token_went_through(graphs):
    phases = make_phases(as_loaded(deep_llama(3)), WORKLOAD, compiled=True, division="parts")
    phases.reset("prefill")
    phases.run("prefill")
    before = len(graphs)
    phases.compiled_prompt()(torch.tensor([[1, 5, 2, 7]]))
    assert len(graphs) == before + 1  # the head


@pytest.mark.parametrize(
    "options",
    [{"compiled": False}, {"division": "regions"}, {"workload": Workload.parse("prefill=4", 2)}],
)
def test_only_single_prompts_in_parts_read_windows(options):
    assert prompt_of(deep_llama(2), **options) is None
