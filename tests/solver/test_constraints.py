"""What the user says of single layers: patterns, contradictions, groups of one format, and what the solver makes of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from builders.records import make_site
from builders.search import CONTEXT, choice

from autoquant.errors import ConstraintError
from autoquant.solver.constraints import Bound, Constraints, bind, fused_groups
from autoquant.solver.front import front_plans
from autoquant.solver.refine import proposals
from autoquant.solver.solve import fastest
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import uniform_plans

from .test_refine import first_proofs

ORIGINAL = "bfloat16/plain"
CANDIDATES = [
    f"{ORIGINAL}/matmul",
    "int8-row/plain/int-mm",
    "int8-row/plain/pack-mm",
    "int4-g32/plain/mm",
]
NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)


def block_sites(blocks=2):
    """Blocks with q, k, v that read one input, gate and up another; and a head."""
    sites = []
    for block in range(blocks):
        names = [f"model.layers.{block}.{name}" for name in NAMES]
        siblings = {name: tuple(names[:3]) for name in names[:3]} | {
            name: tuple(names[4:]) for name in names[4:]
        }
        sites += [make_site(name, siblings=siblings.get(name, ())) for name in names]
    return [*sites, make_site("lm_head")]


def bound(keep=(), pin=(), fusable=None):
    return bind(Constraints.parse(keep, pin, fusable), block_sites(), CANDIDATES, ORIGINAL)


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
            {"pin": ["*.0.*.q_proj=int4*", "*.0.*.k_proj=int8*"], "fusable": "vllm"},
            ["must get the same format (--fusable vllm)", "give them one format"],
        ),
        ({"fusable": "mlx"}, ["no engine 'mlx'; choose one of vllm"]),
    ],
)
def test_what_matches_nothing_or_contradicts_itself_is_refused_in_one_line(options, words):
    with pytest.raises(ConstraintError) as caught:
        bound(**options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_layers_of_one_module_that_read_one_input_are_a_group():
    first = [tuple(f"model.layers.0.{name}" for name in names) for names in (NAMES[:3], NAMES[4:])]
    assert fused_groups(block_sites(1)) == first


def test_names_do_not_make_a_group_and_other_modules_do_not_belong_to_one():
    apart = [make_site("a.q_proj"), make_site("a.k_proj")]
    assert fused_groups(apart) == []
    names = (
        "b.attn.q",
        "b.attn.k",
        "b.mlp.fc1",
    )  # a block whose attention and perceptron read the same norm
    assert fused_groups([make_site(name, siblings=names) for name in names]) == [
        ("b.attn.q", "b.attn.k")
    ]


def test_all_experts_of_a_layer_are_one_group():
    names = [
        f"l.{layer}.mlp.experts.{e}.{p}"
        for layer in (0, 1)
        for e in range(3)
        for p in ("up", "down")
    ]
    groups = fused_groups([make_site(name, siblings=(name,)) for name in names])
    assert groups == [tuple(names[:6]), tuple(names[6:])]


def options_of(names, seed=0):
    """Layers with three formats, two of them by two routes, of random cost."""
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
                )
                for kernel in ("one", "two")
            ]
        made.append(layer)
    return made


@pytest.mark.parametrize("seed", range(8))
def test_the_solver_gives_a_group_one_format_and_finds_the_best_that_does(seed):
    options = options_of(["a", "b", "c", "d"], seed)
    group = ("a", "b", "c")
    problem = SearchSpace(options, replace(CONTEXT, bound=Bound((group,)))).problem
    for max_loss in (None, 0.05, 0.15):
        picks = fastest(problem, max_loss=max_loss)
        best = min(
            problem.totals(each)[0]
            for each in itertools.product(*(range(len(layer)) for layer in options))
            if len({options[layer][each[layer]].format for layer in range(3)}) == 1
            and (max_loss is None or problem.totals(each)[1] <= max_loss)
        )
        assert len({options[layer][picks[layer]].format for layer in range(3)}) == 1
        assert problem.totals(picks)[0] == pytest.approx(best)


def test_a_format_that_one_member_lacks_is_taken_from_all_of_its_group():
    options = options_of(["a", "b", "c"])
    options[1] = [c for c in options[1] if c.format != "int4/plain"]
    narrowed = Bound((("a", "b"),)).narrowed(options)
    assert [{c.format for c in layer} for layer in narrowed] == [{ORIGINAL, "int8/plain"}] * 2 + [
        {ORIGINAL, "int8/plain", "int4/plain"}
    ]
    options[0], options[1] = options[0][:1], options[1][1:]
    with pytest.raises(ConstraintError, match="no format can be used for all"):
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
    return formats[0] == ORIGINAL and formats[1] == "int8/plain" and formats[2] == formats[3]


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
    assert Constraints.parse(["layer"], fusable="vllm").allow(plan)
    assert Constraints.parse(pin=["layer=bfloat16*"]).allow(plan)
    assert not Constraints.parse(pin=["layer=int8*"]).allow(plan)


def test_constraints_survive_the_identity_of_a_study():
    constraints = Constraints.parse(["a", "a"], ["b=int8*"], "vllm")
    assert constraints.keep == ("a",)
    assert Constraints.of_identity({"constraints": constraints.as_object()}) == constraints
    assert Constraints.parse().as_object() == {} and Constraints.of_identity({}) == Constraints()
