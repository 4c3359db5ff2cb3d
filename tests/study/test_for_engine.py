"""A finished search solved for an inference engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders.records import SHAPE, STUDY, put_study
from builders.search import CONTEXT, choice, make_plan, make_proof

from autoquant.errors import ConstraintError, PlanError
from autoquant.solver.constraints import scheme_of
from autoquant.solver.limits import Limits
from autoquant.solver.space import SearchSpace
from autoquant.study.solve_again import solve_again
from autoquant.study.study import Study

Q, K, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
WITHIN = Limits(max_ppl_increase=0.5)
INT8 = {"a16": (500.0, 0.001), "a8-row": (400.0, 0.002)}


def layer(name, **times):
    """Unquantized, int8 with and without rounded activations, and asymmetric int4, the fastest."""
    options = [choice(name)]
    options += [
        choice(
            name,
            "int8-row/plain",
            times.get(activation, us),
            loss,
            50,
            kernel=activation,
            numerics=f"int8-row+{activation}",
        )
        for activation, (us, loss) in INT8.items()
    ]
    return [*options, choice(name, "int4-g32/lanes", 100.0, 0.003, 25)]


@pytest.fixture
def study(store):
    """Make a study of these layers, of which one plan was proven."""

    def make(*layers, identity=None):
        if identity:
            put_study(store, "5tudy002", identity=identity)
        key = "5tudy002" if identity else STUDY
        space = SearchSpace(layers, replace(CONTEXT, study_id=key), logarithmic=True)
        store.put_options(key, space.options, space.about())
        store.put_plan(replace(make_plan("a", "uniform a", "uniform", loss=0.01), study_id=key))
        store.put_proof("a", make_proof("a", increase=0.02, high=0.02))
        return Study(store, key)

    return make


def formats(solved):
    return {layer.name: layer.format for layer in solved.plan.layers}


def test_only_what_the_engine_holds_is_used(study):
    made = study(layer(Q), layer(O))
    assert set(formats(solve_again(made, WITHIN)).values()) == {"int4-g32/lanes"}
    assert set(formats(solve_again(made, WITHIN, engine="llama.cpp")).values()) == {
        "int4-g32/lanes"
    }
    solved = solve_again(made, WITHIN, engine="sglang")
    assert set(formats(solved).values()) == {"int8-row/plain"}
    assert solved.engine == "sglang" and solved.plan.label.startswith("solved for sglang: ")
    assert solved.notes == (
        "for sglang: left out int4-g32+a16: compressed-tensors holds zero points that are"
        " integers, and those of int4 are not; nearest: int4s-g32",
    )


def test_layers_that_it_computes_as_one_get_one_scheme(study):
    """Each alone would take other numerics; together they take those that are faster in sum."""
    made = study(layer(Q, a16=10.0), layer(K), layer(V), layer(O))
    solved = solve_again(made, WITHIN, engine="sglang")
    schemes = [scheme_of(each) for each in solved.plan.layers]
    assert schemes[:3] == [("int8-row/plain", "int8-row+a16")] * 3
    assert schemes[3] == ("int8-row/plain", "int8-row+a8-row")
    apart = solve_again(made, WITHIN, engine="transformers").plan.layers
    assert len({scheme_of(each) for each in apart[:3]}) == 2
    assert "same scheme as k_proj, v_proj (--for sglang)" in solved.plan.layers[0].reason


def test_a_layer_of_which_only_the_unquantized_weight_is_held_is_named(study):
    only = [each for each in layer(K) if not each.format.startswith("int8")]
    solved = solve_again(study(layer(O), only), WITHIN, engine="sglang")
    assert formats(solved)[K] == "bfloat16/plain"
    assert any(f"nothing else is left for {K}: unquantized" in note for note in solved.notes)


@pytest.mark.parametrize("pinned", [False, True])
def test_without_a_plan_for_it_the_reason_and_the_search_to_run_are_said(study, pinned):
    only = [each for each in layer(O) if not each.format.startswith("int8")]
    with pytest.raises(PlanError) as caught:
        solve_again(study(only[1:] if pinned else only), WITHIN, engine="vllm")
    line = str(caught.value)
    assert "no plan is for vllm" in line and "nearest: int4s-g32" in line
    assert line.endswith("run the same search with --for vllm, which tries what it holds")


def test_layers_as_one_are_dropped_where_one_of_them_cannot_be_held(study):
    """vLLM has int4 on a CPU for multiples of 32 rows only."""

    def joined(name, n):
        shape = replace(SHAPE, n=n)
        whole = choice(name, "int4s-g32/lanes", 10.0, 0.001, 20, joined=(Q, O))
        return [replace(each, shape=shape) for each in (*layer(name), whole)]

    solved = solve_again(study(joined(Q, 64), joined(O, 48)), WITHIN, engine="vllm")
    assert set(formats(solved).values()) == {"int8-row/plain"}
    assert not any(each.joined for each in solved.plan.layers)


@pytest.mark.parametrize("asked", [None, "sglang"])
def test_a_search_for_an_engine_is_solved_for_it_and_nothing_is_left_out_again(study, asked):
    made = study(layer(O), identity={"constraints": {"engine": "sglang"}})
    solved = solve_again(made, WITHIN, engine=asked)
    assert (solved.engine, solved.notes) == ("sglang", ())


def test_a_limit_of_memory_names_the_search_that_may_keep_to_it(study):
    limits = Limits(max_ppl_increase=0.5, max_memory_bytes=1060)
    assert solve_again(study(layer(Q), layer(O)), limits).plan
    with pytest.raises(PlanError, match="search with --for sglang, which tries what it holds"):
        solve_again(study(layer(Q), layer(O)), limits, engine="sglang")


def test_an_unknown_engine_is_refused(study):
    with pytest.raises(ConstraintError, match="no engine 'mlx'"):
        solve_again(study(layer(O)), WITHIN, engine="mlx")


WIDE = replace(SHAPE, k=128)
AS_WRITTEN = "memory is that of the weights as --to gguf writes them"


def sized(name, *, kept_bytes=0, shape=WIDE):
    """Formats with their bytes in autoquant; a tied weight is kept beside each."""
    weights = shape.n * shape.k
    wide = choice(name, "int4-g128/lanes", 100.0, 0.003, int(weights * 4.25) // 8 + kept_bytes)
    narrow = choice(name, "int4s-g32/lanes", 100.0, 0.004, int(weights * 4.5) // 8 + kept_bytes)
    unquantized = choice(name, memory=2 * weights)
    return [replace(each, shape=shape) for each in (unquantized, wide, narrow)]


def test_least_memory_is_that_of_the_engines_file(study):
    """Here groups of 128 are smaller. A GGUF repeats their scales, so there groups of 32 are."""
    made, least = study(sized(O)), Limits(max_ppl_increase=0.5, minimize="memory")
    assert formats(solve_again(made, least))[O] == "int4-g128/lanes"
    solved = solve_again(made, least, engine="llama.cpp")
    assert formats(solved)[O] == "int4s-g32/lanes"
    other = CONTEXT.other_bytes
    weights = WIDE.n * WIDE.k
    assert solved.plan.prediction.memory_bytes == int(weights * 4.5) // 8 + other
    assert f"for llama.cpp: {AS_WRITTEN}" in solved.notes


def test_a_limit_of_memory_is_one_of_the_engines_file(study):
    weights, other = WIDE.n * WIDE.k, CONTEXT.other_bytes
    limits = Limits(max_ppl_increase=0.5, max_memory_bytes=int(weights * 4.75) // 8 + other)
    found = solve_again(study(sized(O)[:2]), limits)
    assert formats(found)[O] == "int4-g128/lanes"
    with pytest.raises(PlanError, match=f"the smallest formats take {weights * 5 // 8 + other:,}"):
        solve_again(study(sized(O)[:2]), limits, engine="llama.cpp")


def test_a_tied_head_is_counted_twice_unless_it_stands_for_both(study):
    head = sized("lm_head", kept_bytes=2 * WIDE.n * WIDE.k)
    made, least = study(head), Limits(max_ppl_increase=0.5, minimize="memory")
    assert formats(solve_again(made, least, engine="llama.cpp"))["lm_head"] == "bfloat16/plain"
    solved = solve_again(made, least, engine="llama.cpp", one_head=True)
    assert formats(solved)["lm_head"] == "int4s-g32/lanes"
    assert solved.plan.layers[0].memory_bytes == int(WIDE.n * WIDE.k * 4.5) // 8
    assert f"for llama.cpp: {AS_WRITTEN}, a tied head once for both" in solved.notes


def test_bytes_of_another_engines_file_are_said(study):
    made = study(sized(O), identity={"constraints": {"engine": "llama.cpp"}})
    solved = solve_again(made, WITHIN, engine="sglang")
    assert f"for sglang: {AS_WRITTEN}, which the search was for" in solved.notes
