"""Export plans whose layers are chosen by hand: W8A8, or that beside symmetric int4.

    python studies/engines/vllm/by_hand.py PLAN.db MODEL OUT w8a8|mixed

PLAN.db is of a search that proved a uniform plan of int8 rows. The head stays unquantized. `w8a8`
rounds the input of all other layers to int8, as vLLM does; `mixed` has `int4s-g64` in MLPs.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from autoquant.delivery.exporting import export_to_disk
from autoquant.records import LayerChoice, RouteStep
from autoquant.study.study import Study

_HEAD = "lm_head"


def main() -> None:
    database, model, out, how = sys.argv[1:]
    study = Study.open(database)
    plans = {plan.label: plan for plan in study.plans()}
    uniform = next(plan for label, plan in plans.items() if label.startswith("uniform int8-row"))
    head = [layer for layer in plans["original"].layers if layer.name == _HEAD]
    layers = [chosen(each, how) for each in uniform.layers if each.name != _HEAD]
    plan = replace(uniform, label=how, layers=(*layers, *head))
    report = export_to_disk(plan, model, out, to="compressed-tensors", facts=study.facts)
    print(dict(report.schemes), report.likeness)


def chosen(layer: LayerChoice, how: str) -> LayerChoice:
    """Return the layer as int8 with rounded activations, or as symmetric int4."""
    if how == "mixed" and ".mlp." in layer.name:
        return quantized(layer, "int4s-g64/lanes", "unpack-matmul", "int4s-g64+a16")
    return quantized(layer, "int8-row/plain", "int-mm", "int8-row+a8-row")


def quantized(layer: LayerChoice, format_id: str, kernel: str, numerics: str) -> LayerChoice:
    """Return the layer in a format, by one kernel for any number of rows."""
    route = (RouteStep(upper_m=None, kernel=kernel),)
    return replace(layer, format=format_id, route=route, numerics=numerics)


if __name__ == "__main__":
    main()
