"""What the engine of a search takes: candidates before work, the kind of model, and layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import make_site
from torch import nn

from autoquant.engines import ENGINES, engine
from autoquant.errors import CandidateError, ConstraintError, ModelError
from autoquant.solver.constraints import Bound, Constraints
from autoquant.solver.served import DIVISIBLE
from autoquant.tuner.choices import FormatFacts
from autoquant.tuner.notices import engine_notices
from autoquant.tuner.serving import bind_sites, check_model, facts_for, served_candidates


def chosen(name, *globs, device="cpu"):
    return served_candidates(name, globs, device)[0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ENGINES)
def test_every_candidate_is_one_that_the_engine_holds_with_its_numerics(name, device):
    found = chosen(name, "*", device=device)
    assert {"bfloat16", "int8-row"} <= {each.format.values for each in found}
    for each in found:
        values, numerics = each.format.values, each.kernel.numerics
        assert engine(name).refuses(values, numerics, DIVISIBLE, device=device) is None
        assert numerics != "w8-a8-float8-row", "no engine rounds stored weights again"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_symmetric_int4_is_tried_by_default_and_asymmetric_where_it_is_held(device):
    def int4(name):
        found = chosen(name, "*", device=device)
        return {each.format.values for each in found if each.format.values.startswith("int4")}

    assert int4("vllm") == {f"int4s-g{group}" for group in (32, 64, 128)}
    assert int4("llama.cpp") == {"int4-g32", "int4s-g32", "int4s-g32-gptq"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gguf_is_searched_with_what_is_most_exact_at_each_of_its_sizes(device):
    found = chosen("llama.cpp", "*", device=device)
    values = {each.format.values for each in found}
    assert {"int4s-g32-gptq", "int5s-g32-gptq", "int5-g32-gptq", "int6s-g16"} <= values
    assert not any(
        each.startswith("int5") for each in {c.format.values for c in chosen("vllm", "*")}
    )
    # In the layouts that are usual there, and in no others.
    layouts = {c.format.id.partition("/")[2] for c in found if c.format.values == "int4s-g32"}
    tried = {c.format.id.partition("/")[2] for c in found if c.format.values == "int4s-g32-gptq"}
    assert tried == layouts


def test_groups_whose_scales_a_gguf_repeats_are_left_out_unless_they_are_named():
    found, not_held = served_candidates("llama.cpp", ["*"], "cpu")
    assert "int4-g64" not in {each.format.values for each in found}
    assert "groups of 32 are as small" in not_held["int4-g64"]
    named, not_held = served_candidates("llama.cpp", ["*", "int4-g64"], "cpu")
    assert "int4-g64" in {each.format.values for each in named} and "int4-g64" not in not_held


def test_bytes_of_formats_are_those_of_the_engines_files():
    facts = {
        ("int4-g128/lanes", DIVISIBLE): FormatFacts(1, 0.1),
        ("x/y", DIVISIBLE): FormatFacts(2, 0),
    }
    assert facts_for(None, facts) is facts
    assert facts_for("vllm", facts) == facts
    found = facts_for("llama.cpp", facts)
    assert found["int4-g128/lanes", DIVISIBLE] == FormatFacts(4096 * 4096 * 5 // 8, 0.1)
    assert found["x/y", DIVISIBLE] == FormatFacts(2, 0)


def test_named_formats_that_are_not_held_are_refused_together_with_the_nearest():
    with pytest.raises(CandidateError) as caught:
        chosen("vllm", "int4-g32", "int4-g64", "int8-row", "float16")
    line = str(caught.value)
    assert "\n" not in line and "int8-row" not in line.replace("nearest", "")
    assert line.startswith("--candidates: vllm cannot hold float16: ")
    assert "int4-g32, int4-g64: " in line and line.endswith("nearest: int4s-g32, int4s-g64")


def test_a_pattern_keeps_what_is_held_and_the_rest_is_named():
    found, not_held = served_candidates("vllm", ["int4*", "int8*"], "cpu")
    assert {each.format.values for each in found} == {
        "int8-row",
        *(f"int4s-g{group}" for group in (32, 64, 128)),
    }
    assert set(not_held) == {*(f"int4-g{group}" for group in (32, 64, 128)), "int8-row+a16"}


def test_an_unknown_engine_is_refused_before_anything_else():
    with pytest.raises(ConstraintError, match="did you mean vllm"):
        served_candidates("vlm", ["nothing"], "cpu")


def test_a_model_that_cannot_be_exported_for_the_engine_is_refused(setup):
    with pytest.raises(ModelError, match=r"--for vllm: .* language models .* leave out --for"):
        check_model("vllm", setup.settled.loaded)


def test_a_search_for_llama_cpp_needs_no_base(setup):
    check_model("llama.cpp", setup.settled.loaded)


def test_a_weight_that_is_not_of_a_linear_stays_unquantized(setup):
    settled = setup.settled
    request = replace(settled.request, constraints=Constraints.parse(engine="transformers"))
    settled = replace(settled, request=request)
    settled.loaded.module.down = nn.Module()
    shared = make_site("up", parameters=("up.weight", "again.weight"))
    free = make_site("free", parameters=("free",))
    bound = bind_sites(settled, [make_site("gate"), make_site("down"), shared, free])
    assert set(bound.refused) == {"down", "up", "free"}
    assert bound.reasons["down"].endswith("its module is a Module, not a linear")
    assert bound.reasons["up"].endswith("its weight is shared, or is not that of a linear module")
    assert bound.reasons["free"] == bound.reasons["up"]


def test_what_is_left_out_is_said_once_for_each_reason():
    sites = [make_site(name) for name in ("a", "b", "c")]
    refused = {"int4s-g64/lanes/x": "k=32; nearest: int4s-g32", "int8-row/plain/y": "k=32"}
    bound = Bound((("a", "b"),), {}, {"a": refused, "c": refused})
    not_held = {"int4-g32": "real zeros; nearest: int4s-g32", "int4-g64": "real zeros"}
    assert list(engine_notices("vllm", not_held, bound, sites)) == [
        "for vllm: left out int4-g32, int4-g64: real zeros; nearest: int4s-g32",
        "for vllm: int4s-g64, int8-row not considered for 2 of 3 layers (a): k=32; nearest:"
        " int4s-g32",
        "for vllm: 2 layers get the scheme of those that it computes as one with them: a, b",
    ]
