"""What the user says of single layers: patterns, contradictions, groups of one format, and what the solver makes of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from builders.records import SHAPE, WORKLOAD, make_site
from builders.search import CONTEXT, choice

from autoquant.errors import ConstraintError
from autoquant.solver.constraints import Bound, Constraints, bind
from autoquant.solver.front import front_plans
from autoquant.solver.planning import request_ms
from autoquant.solver.refine import proposals
from autoquant.solver.served import Served
from autoquant.solver.solve import fastest
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import uniform_choice, uniform_plans

from .test_refine import first_proofs

ORIGINAL = "bfloat16/plain"
NUMERICS = {
    f"{ORIGINAL}/matmul": "a16",
    "int8-row/plain/int-mm": "a8-row",
    "int8-row/plain/pack-mm": "a16",
    "int4-g32/plain/mm": "a16",
}
CANDIDATES = list(NUMERICS)
NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)


def block_sites(blocks=2, **changes):
    """Blocks with q, k, v, o, gate and up; and a head."""
    names = [f"model.layers.{block}.{name}" for block in range(blocks) for name in NAMES]
    return [make_site(name, **changes) for name in [*names, "lm_head"]]


def bound(keep=(), pin=(), engine=None, sites=None, **served):
    constraints = Constraints.parse(keep, pin, engine)
    sites = sites or block_sites()
    names = [site.name for site in sites]
    by = Served.of(engine, "cuda", names, **served) if engine else None
    return bind(constraints, sites, NUMERICS, ORIGINAL, by)


def test_kept_layers_admit_nothing_but_the_unquantized_weight():
    constraints = Constraints.parse(["lm_head", "*.o_proj"])
    assert constraints.admits("lm_head", CANDIDATES[0], ORIGINAL)
    assert not any(
        constraints.admits("lm_head", candidate, ORIGINAL) for candidate in CANDIDATES[1:]
    )
    assert all(
        constraints.admits("model.layers.0.mlp.up_proj", candidate, ORIGINAL)
        for candidate in CANDIDATES
    )
    assert bound(["lm_head"]).reasons == {"lm_head": "kept unquantized by --keep lm_head"}


@pytest.mark.parametrize(
    ("formats", "admitted"),
    [
        ("int8-row*", [1, 2]),
        ("int8-row", [1, 2]),
        ("int8-row/plain/int-mm", [1]),
        ("int*", [1, 2, 3]),
    ],
)
def test_a_pin_matches_formats_as_candidates_are_matched(formats, admitted):
    constraints = Constraints.parse(pin=[f"*.q_proj={formats}"])
    found = [
        number for number, c in enumerate(CANDIDATES) if constraints.admits("a.q_proj", c, ORIGINAL)
    ]
    assert found == admitted


def test_a_layer_meets_all_of_its_pins():
    constraints = Constraints.parse(pin=["*=int*", "*.q_proj=*row*"])
    assert constraints.admits("a.q_proj", CANDIDATES[1], ORIGINAL)
    assert not constraints.admits("a.q_proj", CANDIDATES[3], ORIGINAL)
    assert (
        constraints.reason("a.q_proj")
        == "pinned by --pin *=int* and pinned by --pin *.q_proj=*row*"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"keep": ["*.down"]},
            ["--keep: no searched layer matches '*.down'", "model.layers.0.self_attn.q_proj"],
        ),
        ({"pin": ["nothing=int8*"]}, ["--pin: no searched layer matches 'nothing'"]),
        (
            {"pin": ["lm_head=float4*"]},
            ["no candidate of this search matches 'float4*'", "autoquant candidates"],
        ),
        ({"pin": ["lm_head"]}, ["cannot read 'lm_head'", "'*.q_proj=int8-row*'"]),
        (
            {"keep": ["lm_head"], "pin": ["lm_head=int8*"]},
            ["lm_head is kept unquantized", "contradict", "leave out one"],
        ),
        (
            {"pin": ["*=int4*", "lm_head=int8*"]},
            ["lm_head is pinned by --pin *=int4* and pinned", "contradict"],
        ),
        (
            {"keep": ["*.0.*.q_proj"], "pin": ["*.0.*.k_proj=int8*"], "engine": "vllm"},
            ["must get the same scheme (--for vllm)", "give them one format"],
        ),
        (
            {"pin": ["*q_proj=*int-mm", "*k_proj=*pack-mm"], "engine": "vllm"},
            ["must get the same scheme", "is pinned by --pin *q_proj=*int-mm"],
        ),
        (
            {"pin": ["lm_head=int4*"], "engine": "vllm"},
            ["lm_head is pinned by --pin lm_head=int4*, which cannot be served", "int4s-g32"],
        ),
        ({"engine": "mlx"}, ["no engine 'mlx'", "choose one of vllm"]),
    ],
)
def test_what_matches_nothing_or_contradicts_itself_is_refused_in_one_line(options, words):
    with pytest.raises(ConstraintError) as caught:
        bound(**options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_an_engine_computes_as_one_gets_one_scheme():
    found = bound(engine="vllm")
    assert found.groups[:2] == tuple(
        tuple(f"model.layers.0.{name}" for name in names) for names in (NAMES[:3], NAMES[4:])
    )
    reason = found.reasons["model.layers.1.self_attn.q_proj"]
    assert reason == "same scheme as k_proj, v_proj (--for vllm)"
    assert bound(engine="llama.cpp").groups == ()


def test_an_engine_is_given_only_what_it_holds_and_the_unquantized_weight():
    found = bound(engine="vllm")
    assert "int4s-g32" in found.refuses("lm_head", "int4-g32/plain/mm")
    assert not any(found.refuses("lm_head", candidate) for candidate in CANDIDATES[:3])
    assert bound(engine="llama.cpp").refused == {}, "Q4_1 holds asymmetric int4"


def test_a_layer_is_given_only_what_the_engine_holds_at_its_sizes():
    odd = make_site("odd", shape=replace(SHAPE, k=40))
    found = bound(engine="llama.cpp", sites=[*block_sites(), odd])
    assert set(found.refused) == {"odd"}
    assert set(found.refused["odd"]) == set(CANDIDATES[1:])


def test_a_layer_that_the_engine_takes_unquantized_only_says_why():
    found = bound(engine="vllm", left_alone={"lm_head": "its module is a Router"})
    assert set(found.refused["lm_head"]) == set(CANDIDATES[1:])
    assert found.reasons["lm_head"] == "left unquantized for vllm: its module is a Router"


@pytest.mark.parametrize(("values", "refused"), [("float16", True), ("bfloat16", False)])
def test_unquantized_layers_keep_the_dtype_of_the_model(values, refused):
    why = Served.of("llama.cpp", "cuda", ["a"]).refuses("a", values, "a16", SHAPE)
    assert (why is not None) == refused


@pytest.mark.parametrize(
    ("values", "activation", "held"),
    [
        ("int8-row", "a8-row", True),
        ("int8-row", "a16", True),
        ("int4s-g32", "a16", True),
        ("int4s-g32", "w8-a8-float8-row", False),
        ("float8-row", "a8-float8-row", True),
    ],
)
def test_activations_that_the_engine_does_not_round_so_are_in_no_plan(values, activation, held):
    served = Served.of("vllm", "cuda", ["a"])
    assert (served.refuses("a", values, activation, SHAPE) is None) == held


def options_of(names, seed=0):
    """Layers with three formats, two of them with two numerics, of random cost."""
    draw = random.Random(seed)
    made = []
    for name in names:
        layer = [choice(name)]
        for fmt, memory in (("int8/plain", 50), ("int4/plain", 25)):
            layer += [
                choice(
                    name,
                    fmt,
                    us=draw.uniform(100, 900),
                    loss=draw.uniform(0.001, 0.1),
                    memory=memory,
                    kernel=kernel,
                    numerics=f"{fmt.partition('/')[0]}+{activation}",
                )
                for kernel, activation in (("one", "a16"), ("two", "a8-row"))
            ]
        made.append(layer)
    return made


def scheme(choice):
    return choice.format, choice.numerics


@pytest.mark.parametrize("seed", range(8))
def test_the_solver_gives_a_group_one_scheme_and_finds_the_best_that_does(seed):
    options = options_of(["a", "b", "c", "d"], seed)
    group = ("a", "b", "c")
    problem = SearchSpace(options, replace(CONTEXT, bound=Bound((group,)))).problem
    for max_loss in (None, 0.05, 0.15):
        picks = fastest(problem, max_loss=max_loss)
        best = min(
            problem.totals(each)[0]
            for each in itertools.product(*(range(len(layer)) for layer in options))
            if len({scheme(options[layer][each[layer]]) for layer in range(3)}) == 1
            and (max_loss is None or problem.totals(each)[1] <= max_loss)
        )
        assert len({scheme(options[layer][picks[layer]]) for layer in range(3)}) == 1
        assert problem.totals(picks)[0] == pytest.approx(best)


def test_a_format_that_one_member_lacks_is_taken_from_all_of_its_group():
    options = options_of(["a", "b", "c"])
    options[1] = [c for c in options[1] if c.format != "int4/plain"]
    narrowed = Bound((("a", "b"),)).narrowed(options)
    assert [{c.format for c in layer} for layer in narrowed] == [{ORIGINAL, "int8/plain"}] * 2 + [
        {ORIGINAL, "int8/plain", "int4/plain"}
    ]
    options[0], options[1] = options[0][:1], options[1][1:]
    with pytest.raises(ConstraintError, match="none can be used for all"):
        Bound((("a", "b"),)).narrowed(options)


def constrained():
    """Six layers: the first kept, the second pinned to int8, the next two of one format; with a context that says so."""
    options = options_of([f"l.{number}.x" for number in range(6)], seed=3)
    options[0] = options[0][:1]
    options[1] = [c for c in options[1] if c.format == "int8/plain"]
    names = [layer[0].name for layer in options]
    reasons = {
        names[0]: "kept unquantized by --keep x",
        names[1]: "pinned by --pin y",
        names[2]: "same",
        names[3]: "same",
    }
    return options, replace(CONTEXT, bound=Bound(((names[2], names[3]),), reasons))


def is_honoured(plan):
    formats = [layer.format for layer in plan.layers]
    same = scheme(plan.layers[2]) == scheme(plan.layers[3])
    return formats[0] == ORIGINAL and formats[1] == "int8/plain" and same


def test_uniform_and_front_plans_honour_constraints_and_say_so():
    options, context = constrained()
    originals = [choice(layer[0].name) for layer in options]
    space = SearchSpace(options, context, originals)
    plans = [
        *uniform_plans(space),
        *front_plans(space, count=6, max_loss=0.1, max_memory_bytes=None),
    ]
    assert len(plans) > 5 and all(is_honoured(plan) for plan in plans)
    for plan in plans:
        assert plan.layers[0].reason.startswith("kept unquantized by --keep x")
    assert all(
        "pinned by --pin y" in plan.layers[1].reason for plan in plans if plan.kind == "front"
    )


def test_refinement_honours_constraints(tmp_path):
    options, context = constrained()
    known = first_proofs(options_of([layer[0].name for layer in options]))
    running = proposals(
        SearchSpace(options, context),
        storage_url=f"sqlite:///{tmp_path / 'o.db'}",
        seed=0,
        known=known,
        max_memory_bytes=None,
    )
    plans = []
    for plan, tell in itertools.islice(running, 6):
        plans.append(plan)
        tell(None)
    assert plans and all(is_honoured(plan) for plan in plans)


def test_only_the_unquantized_model_may_fail_a_pin():
    from builders.search import make_plan

    plan = make_plan("original", "original", "original")  # its one layer is called `layer`
    assert Constraints.parse(["layer"], engine="vllm").allow(plan)
    assert Constraints.parse(pin=["layer=bfloat16*"]).allow(plan)
    assert not Constraints.parse(pin=["layer=int8*"]).allow(plan)


def test_constraints_survive_the_identity_of_a_study():
    constraints = Constraints.parse(["a", "a"], ["b=int8*"], "vllm")
    assert constraints.keep == ("a",)
    assert Constraints.of_identity({"constraints": constraints.as_object()}) == constraints
    assert Constraints.parse().as_object() == {} and Constraints.of_identity({}) == Constraints()


def test_uniform_plans_give_a_group_one_scheme_where_a_layer_lacks_one_of_them():
    """The second layer has int8 with rounded activations only, and the third has no int4."""
    options = options_of(["a", "b", "c"], seed=1)
    options[1] = [c for c in options[1] if c.numerics != "int8+a16"]
    options[2] = [c for c in options[2] if c.format != "int4/plain"]
    context = replace(CONTEXT, bound=Bound((("a", "b", "c"),)))
    space = SearchSpace(context.bound.narrowed(options), context, [choice(n) for n in "abc"])
    schemes = [{scheme(layer) for layer in plan.layers} for plan in uniform_plans(space)]
    assert schemes == [{("int8/plain", "int8+a8-row")}]


@pytest.mark.parametrize("seed", range(6))
def test_a_uniform_plan_of_a_group_takes_the_numerics_that_are_faster_in_sum(seed):
    options = [[c for c in layer if c.format == "int8/plain"] for layer in options_of("abc", seed)]
    space = SearchSpace(options, replace(CONTEXT, bound=Bound((tuple("abc"),))))
    chosen = [uniform_choice(space, layer, ("int4/plain", "int4+a16")) for layer in options]
    sums = {
        each: sum(request_ms(c, WORKLOAD) for layer in options for c in layer if scheme(c) == each)
        for each in map(scheme, options[0])
    }
    assert {scheme(c) for c in chosen} == {min(sums, key=sums.get)}
