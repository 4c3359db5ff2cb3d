"""What each target holds of a layer, and what it says where it cannot."""

from __future__ import annotations

import pytest

from autoquant.engines import TARGETS, Refusal, Scheme, Values, rounded_activation, target
from autoquant.engines.targets import PLAIN
from autoquant.errors import PlanError
from autoquant.records import LinearShape


def shape(n=64, k=128):
    return LinearShape(n=n, k=k, bias=False, dtype="bfloat16")


@pytest.mark.parametrize(
    "name", ["int4-g64", "int4s-g32-gptq", "int3-g32-clip", "int8-row", "float8-tensor", "mxfp4"]
)
def test_values_are_read_as_they_are_written(name):
    assert str(Values.parse(name)) == name
    assert Values.parse(f"{name}/layout") == Values.parse(name)


def test_a_group_and_a_rounding_are_parts_of_the_values():
    assert Values.parse("int4s-g32-gptq") == Values("int4s", 32, "gptq")


def test_of_a_route_the_rounded_activation_counts():
    assert rounded_activation(["a16", "a8-row", "a16"]) == "a8-row"
    assert rounded_activation(["a16"]) == "a16"


@pytest.mark.parametrize(
    ("name", "values", "numerics", "expected"),
    [
        ("compressed-tensors", "int8-row", "a8-row", Scheme("int-quantized", "a8-row")),
        ("compressed-tensors", "int8-row", "a16", Scheme("pack-quantized")),
        (
            "compressed-tensors",
            "float8-row",
            "a8-float8-row",
            Scheme("float-quantized", "a8-float8-row"),
        ),
        (
            "compressed-tensors",
            "float8-tensor",
            "a8-float8-tensor",
            Scheme("float-quantized", "a8-float8-row"),
        ),
        ("compressed-tensors", "int4s-g64-gptq", "a16", Scheme("pack-quantized")),
        ("compressed-tensors", "nvfp4", "a-nvfp4", Scheme("nvfp4-pack-quantized")),
        ("gguf", "int8-row", "a8-row", Scheme("Q8_0")),
        ("gguf", "int4s-g128", "a16", Scheme("Q4_0")),
        ("gguf", "int4-g64", "a16", Scheme("Q4_1")),
        ("gguf", "int5s-g32-gptq", "a16", Scheme("Q5_0")),
        ("gguf", "int5-g32-gptq", "a16", Scheme("Q5_1")),
        ("transformers", "int8-row", "a8-row", Scheme("Int8Tensor", "a8-row")),
        ("transformers", "int3-g32", "a16", Scheme("IntxUnpackedToInt8Tensor")),
    ],
)
def test_a_layer_gets_the_scheme_of_its_values_and_its_activation(name, values, numerics, expected):
    assert target(name).scheme(values, numerics, shape()) == expected


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_leaves_a_layer_unquantized(name):
    assert target(name).scheme("bfloat16", "a16", shape(k=7)) == Scheme(PLAIN)


def test_an_activation_that_the_target_cannot_round_so_is_left_alone():
    found = target("compressed-tensors").scheme("int4s-g32", "w8-a8-float8-row", shape())
    assert found == Scheme("pack-quantized", "a16")


def test_what_is_not_held_is_refused_with_the_nearest_that_is():
    found = target("compressed-tensors").scheme("int4-g64-hqq", "a16", shape())
    assert isinstance(found, Refusal) and found.nearest == "int4s-g64-hqq"
    assert str(found).endswith("those of int4 are not; nearest: int4s-g64-hqq")
    assert target("gguf").scheme("float8-row", "a16", shape()).nearest == "int8-row"
    assert target("gguf").scheme("int4-g64-gptq", "a16", shape()).nearest == "int4-g64"


@pytest.mark.parametrize(
    ("k", "nearest"), [(128, ""), (64, "int4s-g64"), (96, "int4s-g32"), (72, "int8-row")]
)
def test_a_group_has_to_divide_the_row(k, nearest):
    found = target("compressed-tensors").scheme("int4s-g128", "a16", shape(k=k))
    assert getattr(found, "nearest", "") == nearest


def test_the_nearest_has_to_fit_the_shape_as_well():
    found = target("transformers").scheme("int4-g128", "a16", shape(k=96))
    assert found.nearest == "int4s-g32"


def test_a_row_has_to_be_whole_blocks():
    found = target("gguf").scheme("int8-row", "a16", shape(k=48))
    assert str(found) == "k=48 is not a multiple of 32, the blocks of Q8_0"


def test_numbers_of_another_package_are_refused():
    assert "not known to gguf" in str(target("gguf").scheme("ternary", "a16", shape()))


@pytest.mark.parametrize("found", TARGETS.values(), ids=TARGETS)
def test_every_family_has_a_scheme_for_activations_that_are_not_rounded(found):
    assert all("a16" in schemes for schemes in found.holds.values())
    assert not set(found.holds) & set(found.instead)


def test_an_unknown_target_is_refused_with_a_hint():
    with pytest.raises(PlanError, match="did you mean gguf"):
        target("ggf")


def test_an_engine_in_place_of_a_target_is_told_what_it_reads():
    with pytest.raises(PlanError, match="vllm is no target, it reads compressed-tensors"):
        target("vllm")


@pytest.mark.parametrize(
    ("name", "values", "bits"),
    [
        ("gguf", "int8-row", 8.5),
        ("gguf", "int4s-g128-gptq", 4.5),
        ("gguf", "int2-g32", 4.5),
        ("gguf", "int4-g32", 5),
        ("gguf", "int4-g128", 5),
        ("gguf", "int5s-g32", 5.5),
        ("gguf", "int5-g32", 6),
        ("gguf", "int6s-g16", 6.5625),
        ("transformers", "int4s-g32", 8.75),
        ("transformers", "int2-g32", 8.75),
        ("executorch", "int3-g32", 4.5),
    ],
)
def test_bytes_are_those_that_the_files_have(name, values, bits):
    assert target(name).stored_bytes(values, shape(n=48, k=256)) * 8 == 48 * 256 * bits


def test_files_that_hold_what_the_plan_does_have_its_bytes():
    assert target("compressed-tensors").stored_bytes("int4s-g32", shape()) is None
    assert target("gguf").stored_bytes("bfloat16", shape()) is None


def test_a_gguf_repeats_the_scales_of_groups_that_are_wider_than_its_blocks():
    assert target("gguf").repeats_scales("int4-g64") and target("gguf").repeats_scales("int3-g64")
    assert not any(map(target("gguf").repeats_scales, ("int4-g32-gptq", "int6s-g16", "int8-row")))
    assert not target("compressed-tensors").repeats_scales("int4s-g128")


@pytest.mark.parametrize("name", TARGETS)
def test_what_only_a_gguf_holds_is_known_to_every_target(name):
    for values in ("int5s-g32-gptq", "int5-g32", "int6s-g16"):
        found = target(name).scheme(values, "a16", shape(k=256))
        assert isinstance(found, Scheme) if name == "gguf" else found.nearest
