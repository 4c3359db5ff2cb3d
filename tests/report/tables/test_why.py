"""The table of what else layers could have had."""

import io
from dataclasses import replace

from builders.records import make_choice, make_plan
from rich.console import Console

from autoquant.records import RouteStep
from autoquant.report.tables.why import together, why_table
from autoquant.solver.alternatives import Alternative


def choice(name, fmt, kernel):
    return make_choice(name, fmt, route=(RouteStep(upper_m=None, kernel=kernel),))


LAYERS = tuple(
    choice(f"model.layers.{number}.mlp.down_proj", "int8/plain", "int-mm") for number in range(12)
)
PLAN = make_plan(layers=LAYERS)
EXACT = Alternative(
    gains=("more exact",),
    choice=choice("x", "bfloat16/plain", "matmul"),
    request_us=250.0,
    memory_bytes=1024,
    loss=-0.001,
)
CHEAP = Alternative(
    gains=("faster", "smaller"), choice=choice("x", "int4/plain", "packed-mm"), request_us=-0.5,
    memory_bytes=-10, loss=0.01
)  # fmt: skip


def lines(found, width=80):
    file = io.StringIO()
    Console(file=file, width=width).print(why_table(PLAN, found))
    return file.getvalue().splitlines()


def test_layers_with_the_same_alternatives_are_one_block_with_the_sums():
    found = {layer.name: (EXACT, CHEAP) for layer in LAYERS}
    text = lines(found)
    assert max(map(len, text)) <= 80
    exact = next(line for line in text if "more exact:" in line)
    assert exact.split()[-5:] == ["+3.00", "ms", "-0.012", "+12.0", "KiB"]
    cheap = next(line for line in text if "faster, smaller:" in line)
    assert "-6.00 µs" in cheap and "+0.12" in cheap and "-120 B" in cheap
    column = text[0].index("Instead")
    names = "".join(line[:column].strip() for line in text[2:])
    assert names.startswith("model.layers.0-11.mlp.down_projint8/plainint-mm")


def test_layers_whose_alternatives_differ_are_blocks_of_their_own():
    found = {layer.name: (EXACT, CHEAP) for layer in LAYERS} | {LAYERS[0].name: (CHEAP,)}
    text = lines(found)
    assert sum("faster, smaller:" in line for line in text) == 2
    assert (
        next(line for line in text if "+3.00 ms" in line or "+2.75 ms" in line).count("+2.75 ms")
        == 1
    )


def test_where_nothing_is_better_in_anything_that_is_said():
    assert any(
        "nothing is more exact" in line for line in lines({layer.name: () for layer in LAYERS})
    )


def test_a_choice_that_is_joined_is_another_block():
    first = replace(LAYERS[0], joined=(LAYERS[0].name, LAYERS[1].name))
    plan = replace(PLAN, layers=(first, *LAYERS[1:]))
    file = io.StringIO()
    Console(file=file, width=120).print(why_table(plan, {layer.name: (CHEAP,) for layer in LAYERS}))
    assert file.getvalue().count("faster, smaller:") == 2


def test_an_alternative_that_computes_layers_as_one_says_with_which():
    names = tuple(layer.name for layer in LAYERS[:2])
    fused = replace(CHEAP, choice=replace(CHEAP.choice, name=names[0], joined=names))
    found = {layer.name: (CHEAP,) for layer in LAYERS}
    assert not together(PLAN, found)
    found[names[0]] = (fused,)
    assert together(PLAN, found)
    assert any("as one with" in line for line in lines(found))
