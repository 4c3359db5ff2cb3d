"""Layers that get the same choice."""

from builders.search import CONTEXT, choice

from autoquant.solver.space import SearchSpace
from autoquant.solver.units import MAKES, units_of

ROLES = ("attn.q", "mlp.up")


def options(blocks, *, without=()):
    """Two layers a block and a head, each exact or in int8; the later, the more int8 loses."""
    names = [f"model.layers.{block}.{role}" for block in range(blocks) for role in ROLES]
    made = []
    for number, name in enumerate([*names, "head"]):
        int8 = choice(name, fmt="int8/plain", us=300.0, loss=0.001 * (number + 1), memory=25)
        made.append([choice(name), *([] if name in without else [int8])])
    return made


def blocks_of(unit, made):
    return [int(made[at][0].name.split(".")[2]) for at in unit.layers]


def test_neighbouring_blocks_get_the_same_and_the_first_and_last_are_apart():
    made = options(24)
    units = units_of(made)
    assert len(units) == len(ROLES) * MAKES + 1
    ups = [unit for unit in units if made[unit.layers[0]][0].name.endswith("up")]
    assert [blocks_of(unit, made) for unit in ups] == [
        list(range(3)),
        list(range(3, 12)),
        list(range(12, 21)),
        list(range(21, 24)),
    ]
    (head,) = (unit for unit in units if made[unit.layers[0]][0].name == "head")
    assert len(head.layers) == 1 and len(head.options) == 2


def test_few_blocks_choose_for_themselves():
    assert all(len(unit.layers) == 1 for unit in units_of(options(MAKES)))


def test_a_layer_with_other_options_chooses_for_itself_and_costs_the_others_none():
    made = options(16, without=("model.layers.7.mlp.up",))
    (alone,) = (unit for unit in units_of(made) if len(unit.options) == 1)
    assert blocks_of(alone, made) == [7]
    (others,) = (unit for unit in units_of(made) if len(unit.layers) == 5)
    assert blocks_of(others, made) == [2, 3, 4, 5, 6] and len(others.options) == 2


def test_a_solution_gives_every_layer_of_a_unit_its_choice_and_counts_all_of_them():
    made = options(16)
    space = SearchSpace(made, CONTEXT)
    everything = sum(of[-1].loss for of in made)
    picks = space.solve("time", max_summed_loss=everything / 2, max_memory_bytes=None)
    plan = space.plan(picks, "plan", "front")
    assert [layer.name for layer in plan.layers] == [of[0].name for of in made]
    formats = [{plan.layers[at].format for at in unit.layers} for unit in space.units]
    assert {len(of_unit) for of_unit in formats} == {1} and len({*map(tuple, formats)}) == 2
    time_ms, loss, memory = space.problem.totals(picks)
    assert loss == sum(layer.loss for layer in plan.layers) <= everything / 2
    assert memory == sum(layer.memory_bytes for layer in plan.layers)
    assert abs(time_ms - plan.prediction.linear_ms) < 1e-9
