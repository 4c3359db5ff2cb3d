"""Export plans whose layers are chosen by hand: one format everywhere, or another in MLPs.

    python studies/engines/vllm/by_hand.py PLAN.db MODEL OUT HOW [TARGET]

PLAN.db is of any search of the model. The head stays unquantized. HOW is one of `HOWS`, TARGET as
`autoquant export --to` takes it.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from autoquant.delivery.exporting import export_to_disk
from autoquant.records import LayerChoice, RouteStep
from autoquant.study.study import Study

_HEAD = "lm_head"
W8A8 = ("int8-row/plain", "int-mm", "int8-row+a8-row")
W8A16 = ("int8-row/plain", "dequantize-matmul", "int8-row+a16")
INT4 = ("int4s-g64/lanes", "unpack-matmul", "int4s-g64+a16")
FLOAT8 = ("float8-row/plain", "dequantize-matmul", "float8-row+a16")
MXFP8 = ("mxfp8/swizzled", "emulated", "mxfp8+a-mxfp8")
NVFP4 = ("nvfp4/swizzled", "dequantize-matmul", "nvfp4+a16")
HOWS = {  # in attention, in MLPs
    "w8a8": (W8A8, W8A8),
    "w8a16": (W8A16, W8A16),
    "mixed": (W8A8, INT4),
    "mixed-a16": (W8A16, INT4),
    "float8": (FLOAT8, FLOAT8),
    "float8-int8": (FLOAT8, W8A16),
    "mxfp8": (MXFP8, MXFP8),
    "nvfp4": (NVFP4, NVFP4),
}


def main() -> None:
    database, model, out, how, *rest = sys.argv[1:]
    target = rest[0] if rest else "compressed-tensors"
    study = Study.open(database)
    original = next(plan for plan in study.plans() if plan.kind == "original")
    layers = tuple(chosen(each, *HOWS[how]) for each in original.layers)
    plan = replace(original, label=how, kind="front", layers=layers)
    report = export_to_disk(plan, model, out, to=target, facts=study.facts)
    print(dict(report.schemes), report.likeness or report.unread)
    print(*report.notes, sep="\n")


def chosen(
    layer: LayerChoice, attention: tuple[str, str, str], mlp: tuple[str, str, str]
) -> LayerChoice:
    """Return the layer in one of two formats, by one kernel for any number of rows."""
    if layer.name == _HEAD:
        return layer
    format_id, kernel, numerics = mlp if ".mlp." in layer.name else attention
    route = (RouteStep(upper_m=None, kernel=kernel),)
    return replace(layer, format=format_id, route=route, numerics=numerics)


if __name__ == "__main__":
    main()
