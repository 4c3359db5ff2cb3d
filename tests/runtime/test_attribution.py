"""Kernels of a step, attributed to layers."""

import sys
from types import BuiltinFunctionType, SimpleNamespace

import pytest
import torch
from models.tiny_models import as_loaded, tiny_llama
from torch import nn
from torch._C._autograd import DeviceType
from torch._C._profiler import _EventType

from autoquant.devices import backend
from autoquant.errors import DeviceError
from autoquant.records import Workload
from autoquant.runtime.attribution import (
    _STEP,
    _device_step,
    _launches,
    _runs,
    attribute,
    match_launches,
)
from autoquant.runtime.operators import Weights, named_kernels, operators
from autoquant.runtime.phases import make_phases
from autoquant.runtime.steps import LINEAR, UNKNOWN

from .test_compiled import INT8, INT8_DEQUANTIZED, X, quantize, quantized_blocks, siblings


def phases_of(module, *, inputs=(X,), compiled):
    loaded = as_loaded(module, "module", inputs)
    return make_phases(loaded, Workload.single(), compiled=compiled, division="regions")


def profiled(module, layers=None, *, inputs=(X,), compiled=True):
    """One step of the module's only phase, once it is warm."""
    torch._dynamo.reset()
    phases = phases_of(module, inputs=inputs, compiled=compiled)
    (phase,) = phases.workload.phases
    for _ in range(
        2
    ):  # the first call may show that joined layers read different inputs, which is compiled anew
        phases.run(phase.name)
    return attribute(phases, module, layers or {}, "cpu")[phase.name]


def linears(module):
    return {name for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def test_blocks_that_share_their_code_are_told_apart():
    module = quantized_blocks(INT8, INT8, INT8_DEQUANTIZED, None)
    step = profiled(module)
    assert set(step.layer_us({})) == linears(module)
    assert all(time_us > 0 for time_us in step.layer_us({}).values())
    attributed = sum(step.layer_us({}).values()) + sum(step.glue_us().values()) + step.gaps_us()
    assert attributed == pytest.approx(step.step_us)


def test_compiled_kernels_count_for_the_layer_whose_weight_they_dequantize_and_so_do_products():
    step = profiled(quantized_blocks(INT8_DEQUANTIZED, INT8_DEQUANTIZED))
    for layer in ("layers.0.up", "layers.1.down"):
        names = [kernel.name for kernel in step.kernels if kernel.layers == (layer,)]
        assert any(name.startswith("cpp_") for name in names) and any(
            name.endswith("mm") for name in names
        )


def test_layers_computed_as_one_have_their_kernels_together():
    step = profiled(siblings(("q", "k", "v")))
    assert ("q", "k", "v") in {
        kernel.layers for kernel in step.kernels if kernel.name.endswith("mm")
    }


def test_in_a_model_of_parts_every_layer_has_its_kernels_and_a_step_is_replayed_afterwards():
    torch._dynamo.reset()
    module = tiny_llama().requires_grad_(False)
    quantize(module.model.layers[0].mlp.up_proj, INT8_DEQUANTIZED)
    workload = Workload.parse("prefill=4,decode=3")
    phases = make_phases(as_loaded(module), workload, compiled=True)
    phases.reset("decode")
    phases.run("decode")
    step = attribute(phases, module, {}, "cpu")["decode"]
    assert set(step.layer_us({})) == linears(module)
    phases.reset("decode")
    assert torch.equal(phases.run("decode").argmax(), phases_run_again(phases).argmax())


def phases_run_again(phases):
    phases.reset("decode")
    return phases.run_launched("decode")


def test_the_compilers_kernels_are_left_as_they_were():
    profiled(quantized_blocks(INT8_DEQUANTIZED, INT8_DEQUANTIZED))

    def kernels():
        modules = sys.modules["torch._inductor.codecache"].PyCodeCache.modules
        return [
            value
            for module in modules
            for name, value in vars(module).items()
            if name.startswith("cpp_fused")
        ]

    assert kernels() and all(isinstance(kernel, BuiltinFunctionType) for kernel in kernels())
    with named_kernels():
        assert not any(isinstance(kernel, BuiltinFunctionType) for kernel in kernels())


def test_without_a_compiler_a_layer_has_all_that_runs_while_it_is_called():
    module = quantized_blocks(INT8_DEQUANTIZED, INT8)
    step = profiled(module, compiled=False)
    assert set(step.layer_us({})) == linears(module)
    by_layer = {kernel.name for kernel in step.kernels if kernel.layers == ("layers.0.up",)}
    assert {"aten::mul", "aten::linear"} <= by_layer
    assert [kernel.kind for kernel in step.kernels if kernel.name == "aten::relu"] == [
        "other",
        "other",
    ]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_layers_go_by_the_names_of_the_plan_and_other_linears_by_their_own():
    step = profiled(quantized_blocks(INT8, None), {"first": "layers.0.up.weight"}, compiled=False)
    assert set(step.layer_us({})) == {"first", "layers.0.down", "layers.1.up", "layers.1.down"}


class Tied(nn.Module):
    """A token's vector, and how much it is like those of all tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.relu(self.embed(ids)))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_embedding_that_shares_the_heads_weight_is_not_the_heads_time(compiled):
    ids = torch.arange(6).unsqueeze(0)
    step = profiled(Tied().eval().requires_grad_(False), inputs=(ids,), compiled=compiled)
    assert set(step.layer_us({})) == {"head"}
    assert [kernel.kind for kernel in step.kernels if "embedding" in kernel.name] == ["other"]


class Device:
    """What the profiler says of a GPU: the host's real events, and kernels that we make up."""

    def __init__(self, results, kernels):
        self._results = results
        self._kernels = kernels

    def experimental_event_tree(self):
        return self._results.experimental_event_tree()

    def events(self):
        return self._kernels


def device_event(name, start_ns, end_ns, linked=0, annotation=False):
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start_ns,
        end_ns=lambda: end_ns,
        linked_correlation_id=lambda: linked,
        device_type=lambda: DeviceType.CUDA,
        is_user_annotation=lambda: annotation,
    )


@pytest.fixture
def launched():
    """A real run's events, as if each outermost operator of it had launched one kernel of the same
    name.
    """
    module = quantized_blocks(None, None)
    phases = phases_of(module, compiled=False)
    (phase,) = phases.workload.phases
    results = _runs(phases, phase.name, phases.run_launched, backend("cpu"))[-1]
    weights = Weights(module, {})
    step = next(event for event in results.experimental_event_tree() if event.name == _STEP)
    operators = [
        event
        for event in step.children
        if event.name in ("aten::linear", "aten::relu", "aten::add")
    ]
    kernels = [
        device_event(
            event.name.replace("aten::", "kernel_"), 10 * i, 10 * i + 5, event.correlation_id
        )
        for i, event in enumerate(operators)
    ]
    return Device(results, [*kernels, device_event(_STEP, 0, 90, annotation=True)]), weights


def test_a_replayed_graphs_kernels_are_those_that_were_launched_in_the_same_order(launched):
    results, weights = launched
    launches = _launches(results, weights)
    names = [launch.name for launch in launches]
    assert names == ["kernel_linear", "kernel_relu", "kernel_linear", "kernel_add"] * 2
    inside = [device_event(name, 1000 * i + 2000, 1000 * i + 2800) for i, name in enumerate(names)]
    strange = device_event("kernel_of_nobody", 20000, 21000)
    replayed = Device(results, [device_event("Memcpy", 1000, 1500), *inside, strange])
    step = _device_step("decode", replayed, launches, weights)
    linear = [kernel.layers for kernel in step.kernels if kernel.kind == LINEAR]
    assert linear == [("layers.0.up",), ("layers.0.down",), ("layers.1.up",), ("layers.1.down",)]
    assert [kernel.name for kernel in step.kernels if kernel.kind == UNKNOWN] == [
        "Memcpy",
        "kernel_of_nobody",
    ]
    assert step.step_us == pytest.approx(20.0)
    assert sum(kernel.duration_us for kernel in step.kernels) + step.gaps_us() == pytest.approx(
        20.0
    )


def test_time_in_which_two_kernels_run_counts_once(launched):
    results, weights = launched
    kernels = [
        device_event("a", 0, 1000),
        device_event("b", 500, 2000),
        device_event("c", 600, 700),
    ]
    step = _device_step("decode", Device(results, kernels), [], weights)
    assert [kernel.duration_us for kernel in step.kernels] == pytest.approx([1.0, 1.0, 0.0])
    assert step.step_us == pytest.approx(2.0) and step.gaps() == []


def test_a_gpu_of_which_the_profiler_sees_nothing_is_an_error_with_a_reason(launched):
    results, weights = launched
    with pytest.raises(DeviceError, match="saw no kernel on the GPU"):
        _device_step("decode", Device(results, []), [], weights)
    with pytest.raises(DeviceError, match="does not see the kernels of mps"):
        attribute(
            phases_of(quantized_blocks(None, None), compiled=False), nn.Linear(1, 1), {}, "mps"
        )


def test_kernels_are_matched_by_name_and_order_and_what_is_left_over_is_not():
    assert match_launches(["a", "b", "a", "c"], ["x", "a", "b", "a", "y", "c"]) == [
        None,
        0,
        1,
        2,
        None,
        3,
    ]


def event(name, *children, tag=_EventType.TorchOp):
    """One of the profiler's, which is given a tensor if it is a kernel."""
    fields = SimpleNamespace(
        inputs=[SimpleNamespace(storage_data_ptr=1)] if name.startswith("triton") else ()
    )
    return SimpleNamespace(
        name=name,
        children=children,
        tag=tag,
        extra_fields=fields,
        start_time_ns=0,
        end_time_ns=1,
        correlation_id=hash(name),
    )


def test_operators_that_the_profiler_files_under_a_range_of_the_gpu_are_found():
    launch = event("cuLaunchKernel", tag=_EventType.Kineto)
    on_the_gpu = event(
        "## Call CompiledFxGraph ##", event("aten::mm"), event("triton_2"), tag=_EventType.Kineto
    )
    step = event(
        _STEP, event("## Call CompiledFxGraph ##", event("triton_1", launch), on_the_gpu), launch
    )
    found = operators(step, Weights(quantized_blocks(None), {}))
    assert [operator.name for operator in found] == ["triton_1", "aten::mm", "triton_2"]
