"""A plan changed to what a target holds: which layers, to what, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import make_plan

from autoquant.candidates import get_format
from autoquant.delivery.held import held_layers
from autoquant.delivery.requantizing import requantized
from autoquant.engines import target
from autoquant.records import LayerChoice, LinearShape, RouteStep


def choice(name, fmt, *kernels, shape=None, joined=()):
    uppers = [*range(1, len(kernels)), None]
    return LayerChoice(
        name=name,
        parameters=(f"{name}.weight",),
        shape=shape or LinearShape(n=64, k=128, bias=False, dtype="bfloat16"),
        format=fmt,
        route=tuple(
            RouteStep(upper_m=upper, kernel=kernel)
            for upper, kernel in zip(uppers, kernels, strict=True)
        ),
        numerics=f"{get_format(fmt).values}+a16",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
        joined=joined,
    )


def plan(*layers):
    return replace(make_plan("abcd", layers=tuple(layers)), dtype="bfloat16")


INT8 = choice("head", "int8-row/plain", "dequantize-matmul", "int-mm")


@pytest.mark.parametrize(
    ("to", "fmt", "expected"),
    [
        ("compressed-tensors", "int4-g32/lanes", "int4s-g32"),
        ("compressed-tensors", "int4-g64-hqq/lanes", "int4s-g64-hqq"),
        ("gguf", "float8-row/plain", "int8-row"),
        ("transformers", "mxfp4/swizzled", "int4s-g32"),
        ("executorch", "mxfp8/swizzled", "int8-row"),
    ],
)
def test_a_layer_gets_the_nearest_values_that_the_target_names(to, fmt, expected):
    kernel = get_format(fmt).kernels[0].id
    made = requantized(plan(choice("a", fmt, kernel), INT8), target(to), "cpu")
    first, head = made.plan.layers
    assert get_format(first.format).values == expected and head == INT8
    [((before, after, why), count)] = made.changes.items()
    assert (before, after, count) == (get_format(fmt).values, expected, 1) and why
    assert len(held_layers(made.plan, target(to))) == 2


def test_the_reason_and_the_count_are_those_of_the_refusal():
    layers = [choice(name, "int4-g32/lanes", "unpack-matmul") for name in "abc"]
    [(key, count)] = requantized(plan(*layers), target("transformers"), "cpu").changes.items()
    assert count == 3 and "those of int4 are not" in key[2]


def test_a_layer_that_nothing_is_near_to_is_left_unquantized():
    odd = LinearShape(n=64, k=24, bias=False, dtype="bfloat16")
    layer = choice("a", "int8-row/plain", "dequantize-matmul", shape=odd)
    made = requantized(plan(layer, INT8), target("gguf"), "cpu")
    assert made.plan.layers[0].format == "bfloat16/plain"
    assert [key[1] for key in made.changes] == ["bfloat16"]


def test_rounded_activations_stay_rounded_if_a_kernel_does():
    layer = choice("a", "float8-row/plain", "dequantize-matmul")
    made = requantized(plan(layer), target("gguf"), "cpu").plan.layers[0]
    assert made.numerics == "int8-row+a16"


def test_a_plan_that_is_held_is_the_same():
    held = plan(INT8)
    made = requantized(held, target("compressed-tensors"), "cpu")
    assert made.plan is held and not made.changes


def test_layers_that_were_computed_as_one_are_apart_if_one_is_changed():
    joined = ("a", "b")
    layers = [
        choice("a", "int4-g32/lanes", "unpack-matmul", joined=joined),
        choice("b", "int4-g32/lanes", "unpack-matmul", joined=joined),
    ]
    made = requantized(plan(*layers, INT8), target("compressed-tensors"), "cpu")
    assert [each.joined for each in made.plan.layers] == [(), (), ()]
    assert made.plan.plan_id != "abcd" and "rounded anew" in made.plan.label
