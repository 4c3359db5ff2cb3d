"""Tables tied to a linear: chosen together, and counted once where they are one tensor."""

from dataclasses import replace

from builders.search import CONTEXT, choice

from autoquant.records import LOOKUP, RouteStep
from autoquant.solver.space import SearchSpace
from autoquant.solver.tied import beside, counted_once
from autoquant.solver.uniform import original_plan, uniform_plans
from autoquant.solver.units import units_of

ROUTE = (RouteStep(upper_m=None, kernel=LOOKUP),)
HEAD, TABLE = "lm_head", "embed"
BYTES = {"bfloat16": 100, "int8": 50, "int4": 25}


def option(name, values, loss=0.0, us=100.0):
    made = choice(name, fmt=f"{values}/plain", us=us, loss=loss, memory=BYTES[values])
    if name == TABLE:
        table = {"route": ROUTE, "numerics": f"{values}+{LOOKUP}", "tied": HEAD}
        made = replace(made, latency_us={}, **table)
    return made


def make_space(*, table=("bfloat16", "int8"), head_loss=0.01, table_loss=0.01):
    losses = {"bfloat16": 0.0, "int8": 1.0, "int4": 3.0}
    layers = [
        [option("up", "bfloat16"), option("up", "int8", 0.001)],
        [option(HEAD, each, head_loss * losses[each]) for each in BYTES],
        [option(TABLE, each, table_loss * losses[each]) for each in table],
    ]
    context = replace(CONTEXT, other_bytes=7)
    return SearchSpace(layers, context, [layer[0] for layer in layers])


def solved(space, max_loss):
    picks = space.solve("memory", max_summed_loss=max_loss, max_memory_bytes=None)
    plan = space.plan(picks, "solved", "front")
    return {layer.name: layer.format.partition("/")[0] for layer in plan.layers}, plan


def test_a_table_and_its_linear_are_one_unit_of_all_pairs():
    units = units_of(make_space().options)
    assert [unit.layers for unit in units] == [(0,), (1, 2)]
    bytes_of = {
        tuple(each.format.partition("/")[0] for each in pair): sum(c.memory_bytes for c in pair)
        for pair in units[1].options
    }
    assert bytes_of == {
        ("bfloat16", "bfloat16"): 100,
        ("bfloat16", "int8"): 150,
        ("int8", "bfloat16"): 150,
        ("int8", "int8"): 50,
        ("int4", "bfloat16"): 125,
        ("int4", "int8"): 75,
    }


def test_the_smallest_plan_shares_one_tensor_where_one_format_does_for_both():
    formats, plan = solved(make_space(), max_loss=None)
    assert formats == {"up": "int8", HEAD: "int8", TABLE: "int8"}  # int4 would need a second one
    assert plan.prediction.memory_bytes == 7 + 50 + 50
    assert [layer.memory_bytes for layer in plan.layers] == [50, 50, 0]


def test_a_tied_head_is_left_alone_where_quality_leaves_nothing_else():
    formats, plan = solved(make_space(table_loss=1.0), max_loss=0.05)
    assert formats == {"up": "int8", HEAD: "bfloat16", TABLE: "bfloat16"}
    assert plan.prediction.memory_bytes == 7 + 50 + 100


def test_bytes_of_the_unquantized_model_are_counted_once():
    plan = original_plan(make_space())
    assert plan.prediction.memory_bytes == 7 + 100 + 100


def test_uniform_plans_leave_the_table_or_share_the_heads_tensor():
    sizes = {
        tuple(layer.format.partition("/")[0] for layer in plan.layers): plan.prediction.memory_bytes
        for plan in uniform_plans(make_space())
    }
    assert sizes == {
        ("int8", "int8", "int8"): 7 + 50 + 50,
        ("bfloat16", "int4", "bfloat16"): 7 + 100 + 25 + 100,
    }


def test_a_table_is_not_shared_with_a_linear_that_is_computed_as_one_with_others():
    head = replace(option(HEAD, "int8"), joined=(HEAD, "other"))
    assert counted_once([head, option(TABLE, "int8")])[1].memory_bytes == 50


def test_alternatives_of_a_table_are_those_beside_its_linear():
    own = [option(TABLE, each) for each in BYTES]
    assert [each.memory_bytes for each in beside(own, option(HEAD, "int8"))] == [100, 0, 25]
    assert [each.memory_bytes for each in beside(own, None)] == [100, 50, 25]
