"""Plans made without measuring each layer's latency: the structural heuristic, and the allocation by bits alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from builders.search import CONTEXT, choice

from autoquant.records import LinearShape
from autoquant.solver.baselines import bits_plan, favoured_layers, structural_plan
from autoquant.solver.constraints import Bound
from autoquant.solver.limits import Limits
from autoquant.solver.planning import make_plan
from autoquant.solver.space import SearchSpace

BLOCKS = 16
SHAPES = {"attn.q": (64, 64), "attn.o": (64, 64), "mlp.up": (256, 64), "mlp.down": (64, 256)}
FORMATS = {
    "int8/plain": (600.0, 0.002, 0.5),
    "int4/plain": (300.0, 0.03, 0.25),
    "int3/plain": (290.0, 0.2, 0.19),
}


def shape(n, k):
    return LinearShape(n=n, k=k, bias=False, dtype="bfloat16")


NAMES = [f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in SHAPES] + ["lm_head"]
OF = [shape(*SHAPES[name]) for _ in range(BLOCKS) for name in SHAPES] + [shape(512, 64)]


def layers():
    made = []
    for name, of in zip(NAMES, OF, strict=True):
        size = of.n * of.k // 64
        options = [choice(name, memory=2 * size)]
        options += [
            choice(name, fmt, us, loss, int(2 * size * share))
            for fmt, (us, loss, share) in FORMATS.items()
        ]
        made.append([replace(each, shape=of) for each in options])
    return made


def favoured():
    return {name: why for name, why in zip(NAMES, favoured_layers(NAMES, OF), strict=True) if why}


def test_more_bits_go_to_the_ends_the_down_projections_and_the_head():
    reasons = favoured()
    assert reasons.pop("lm_head") == "in no block"
    ends = {name for name, why in reasons.items() if why == "in the first or last blocks"}
    assert ends == {f"model.layers.{block}.{name}" for block in (0, 1, 14, 15) for name in SHAPES}
    assert {name for name in reasons if name not in ends} == {
        f"model.layers.{b}.mlp.down" for b in range(2, 14)
    }


def test_a_shallow_model_has_one_block_at_each_end_and_other_names_do():
    names = [
        f"encoder.layer.{block}.{part}" for block in range(4) for part in ("query", "out.dense")
    ]
    shapes = [shape(64, 64), shape(64, 256)] * 4
    reasons = favoured_layers(names, shapes)
    assert [bool(why) for why in reasons] == [True, True, False, True, False, True, True, True]
    assert favoured_layers(["0", "1", "2", "head"], [shape(8, 8)] * 4)[1] == ""


def test_the_heuristic_takes_the_pair_of_formats_that_is_fastest_within_the_limits():
    plan = structural_plan(
        SearchSpace(layers(), CONTEXT), limits=Limits(max_ppl_increase=0.1), max_loss=1.6
    )
    wanted = {name: "int8/plain" if name in favoured() else "int4/plain" for name in NAMES}
    assert {layer.name: layer.format for layer in plan.layers} == wanted
    assert plan.kind == "heuristic" and plan.prediction.loss <= 1.6
    assert {layer.reason for layer in plan.layers} == {
        "in no block: more bits", "in the first or last blocks: more bits", "down projection: more bits",
        "fewer bits than the others",
    }  # fmt: skip


def test_a_tighter_limit_gives_the_heuristic_more_bits_and_a_memory_limit_fewer():
    tight = structural_plan(SearchSpace(layers(), CONTEXT), limits=Limits(), max_loss=0.07)
    assert set(tight.formats()) == {"bfloat16/plain", "int8/plain"}
    size = tight.prediction.memory_bytes // 2
    small = structural_plan(
        SearchSpace(layers(), CONTEXT), limits=Limits(max_memory_bytes=size), max_loss=None
    )
    assert small.prediction.memory_bytes <= size
    most_exact = structural_plan(
        SearchSpace(layers(), CONTEXT), limits=Limits(max_memory_bytes=1), max_loss=None
    )
    assert set(most_exact.formats()) == {"bfloat16/plain", "int8/plain"}, (
        "where nothing fits, the most exact"
    )


def test_without_two_sizes_there_is_no_heuristic():
    assert (
        structural_plan(
            SearchSpace([layer[:1] for layer in layers()], CONTEXT), limits=Limits(), max_loss=None
        )
        is None
    )


@pytest.mark.parametrize(
    "formats", [("int8/plain", "int4/plain"), ("bfloat16/plain", "int3/plain")]
)
def test_bits_alone_are_spent_for_least_loss_in_the_bytes_of_the_recommended_plan(formats):
    few = [
        [replace(each, loss=each.loss * (1 + number)) for each in layer]
        for number, layer in enumerate(layers()[:5])
    ]
    mixed = [next(c for c in layer if c.format == formats[i % 2]) for i, layer in enumerate(few)]
    recommended = make_plan(mixed, "front 1", "front", CONTEXT)
    plan = bits_plan(SearchSpace(few, CONTEXT), recommended)
    budget = sum(layer.memory_bytes for layer in mixed)
    best = min(
        sum(c.loss for c in each)
        for each in itertools.product(*few)
        if sum(c.memory_bytes for c in each) <= budget
    )
    assert plan.kind == "bits" and sum(layer.memory_bytes for layer in plan.layers) <= budget
    assert plan.prediction.loss == pytest.approx(best)
    assert "a weight" in plan.label and "whatever its latency" in plan.layers[0].reason


def test_bits_alone_are_blind_to_latency():
    """The more exact of two formats of one size is taken, though it is slower than leaving the layer as it is."""
    options = [
        [
            choice("a"),
            choice("a", "fast/plain", 10.0, 0.1, 50),
            choice("a", "slow/plain", 9000.0, 0.09, 50),
        ]
    ]
    recommended = make_plan([options[0][1]], "front 1", "front", CONTEXT)
    assert bits_plan(SearchSpace(options, CONTEXT), recommended).layers[0].format == "slow/plain"


def test_baselines_honour_groups_of_one_format():
    options = layers()[:8]
    options[1] = [c for c in options[1] if c.format != "int4/plain"]
    group = (NAMES[0], NAMES[1])
    context = replace(CONTEXT, bound=Bound((group,), {}))
    plans = [
        structural_plan(SearchSpace(options, context), limits=Limits(), max_loss=limit)
        for limit in (None, 0.05, 0.5)
    ]
    plans += [bits_plan(SearchSpace(options, context), plan) for plan in plans]
    assert all(plan.layers[0].format == plan.layers[1].format for plan in plans)


def test_the_heuristic_favours_all_layers_of_a_group_or_none():
    """Of two that read the widest input of their block, one makes it narrower: it leads back."""
    names, shapes = [NAMES[0], NAMES[1]], [shape(256, 256), shape(64, 256)]
    names = [name.replace(".0.", f".{block}.") for block in range(BLOCKS) for name in names]
    options = []
    for name, of in zip(names, shapes * BLOCKS, strict=True):
        layer = [choice(name), choice(name, "int8/plain", 600.0, 0.002, 50)]
        layer.append(choice(name, "int4/plain", 300.0, 0.03, 25))
        options.append([replace(each, shape=of) for each in layer])
    groups = tuple(zip(names[::2], names[1::2], strict=True))
    context = replace(CONTEXT, bound=Bound(groups))
    plan = structural_plan(SearchSpace(options, context), limits=Limits(), max_loss=0.7)
    formats = [layer.format for layer in plan.layers]
    assert formats[::2] == formats[1::2]
