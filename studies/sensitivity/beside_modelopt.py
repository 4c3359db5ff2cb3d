"""Divergence at equal true bits: plans of nvidia-modelopt's auto_quantize beside those of
autoquant.

    python -m pip install "nvidia-modelopt==0.47.*"
    python studies/sensitivity/beside_modelopt.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT
        [--methods gradient,kl_div]

Arguments and OUT are those of compare.py, but `--methods` are nvidia-modelopt's. It scores on the
same calibration windows, the output layer left out of its search and of its count of bits, and
chooses among its own int4 and int8 (which it counts as 4 and 8 bits), then among numbers of the
bits and groups of compare.py's `FORMATS`, whose true bits it is told. Its plans are judged as it
computes them. The true bits of each (scales of 16 bits counted, over the same layers) are the
budget of two plans by the path's losses: to nearest, and with weights of fewer than 8 bits rounded
by GPTQ. To tell where the difference is from there are its own plan with the numbers that autoquant
rounds to nearest, whose steps are smaller, and autoquant's plan where layers that read the same
input get one format, as with nvidia-modelopt. Divergences are mean KL per token to the unquantized
model on the report text, in float32; the 95 % interval of the ratio is paired. OUT gets
`modelopt.json` and `modelopt.md`; losses that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import torch.nn.functional as F
from compare import FORMATS, Plan, average_bits, parse, score, set_up, subject
from front import BUDGETS, Truth, allocate, rounded_changes

from autoquant.evaluators.emulate import in_float32
from autoquant.intervals import paired_increase
from autoquant.records import Site

OWN = [mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.INT8_WEIGHT_ONLY_CFG]
OWN_TARGETS = (4.5, 5.0, 6.0)
OF_GROUP = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}
ROW_SHARES = 512  # numbers that share a scale in the narrowest layer's rows


def same_formats() -> list[dict[str, Any]]:
    """The bits and groups of `FORMATS`."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": int(bits)}
                    | ({"block_sizes": {-1: group}} if group else {"axis": 0}),
                },
            ],
            "algorithm": "max",
            "effective_bits": bits + 16 / (group or ROW_SHARES),
        }
        for _, bits, group in FORMATS.values()
    ]


def search(
    module: torch.nn.Module, formats: list[dict[str, Any]], ids: torch.Tensor, method: str
) -> dict[str, Any]:
    """nvidia-modelopt's scores, from which it solves for any budget."""
    own: dict[str, Any] = {}
    if method == "gradient":
        own["loss_func"] = lambda logits, batch: F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )
    batches = list(ids.unsqueeze(1))
    with torch.enable_grad():
        _, state = mtq.auto_quantize(
            copy.deepcopy(module),
            constraints={
                "effective_bits": 8.03,
                "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
            },
            quantization_formats=formats,
            data_loader=batches,
            forward_step=lambda model, batch: model(batch, use_cache=False).logits,
            disabled_layers=["*lm_head*"],
            num_calib_steps=1,  # its scales look at weights only
            num_score_steps=len(batches),
            method=method,
            **own,
        )
    return state


def read_plan(config: dict[str, Any], sites: Sequence[Site]) -> tuple[Plan, float]:
    """The layers' formats, and the average bits with a scale of 16 bits for each group or row.

    A layer left alone has 16.
    """
    weights = {entry["quantizer_name"]: entry for entry in config["quant_cfg"]}
    names = {(bits, group): name for name, (_, bits, group) in FORMATS.items()}
    plan: Plan = {}
    bits, numbers = 0.0, 0
    for site in sites:
        entry = weights.get(f"{site.name}.weight_quantizer", {"enable": False})
        numel = site.shape.n * site.shape.k
        if entry["enable"]:
            group = (entry["cfg"].get("block_sizes") or {}).get(-1, 0)
            plan[site.name] = names[entry["cfg"]["num_bits"], group]
            bits += average_bits(plan, [site]) * numel
        else:
            bits += 16 * numel
        numbers += numel
    return plan, bits / numbers


def their_groups(sites: Sequence[Site]) -> list[list[int]]:
    """Numbers of the sites that nvidia-modelopt gives one format: what reads the same input."""
    groups: dict[str, list[int]] = {}
    for number, site in enumerate(sites):
        block, _, name = site.name.rpartition(".")
        groups.setdefault(f"{block}.{OF_GROUP.get(name, name)}", []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def their_plans(
    module: torch.nn.Module,
    ids: torch.Tensor,
    sites: Sequence[Site],
    truth: Truth,
    methods: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row for each method, set of formats and budget."""
    for method in methods:
        for label, formats, targets in (
            ("its formats", OWN, OWN_TARGETS),
            ("the six formats", same_formats(), BUDGETS),
        ):
            began = time.monotonic()
            state = search(module, formats, ids, method)
            seconds = time.monotonic() - began
            for target in targets:
                config = mtq.get_auto_quantize_config(state, {"effective_bits": target})
                quantized = mtq.quantize(copy.deepcopy(module), config)
                mtq.fold_weight(quantized)
                plan, bits = read_plan(config, sites)
                found = {
                    "label": f"{method}, {label}",
                    "target": target,
                    "bits": bits,
                    "plan": plan,
                    "seconds": seconds,
                }
                found |= {"kl": truth.of(quantized), "same plan": truth.windows(plan)}
                print(
                    f"{found['label']}, {found['bits']:.3f} bits: {np.mean(found['kl']):.4f}",
                    flush=True,
                )
                yield found


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each of nvidia-modelopt's plans.

    Its KL, and those of others at its bits with the ratio to it.
    """
    others = {
        "same plan": "same plan, autoquant's numbers",
        "nearest, grouped": "autoquant, nearest, same groups",
        "nearest": "autoquant, nearest",
        "gptq": "autoquant, GPTQ",
    }
    heading = ["nvidia-modelopt", "its budget", "true bits", "KL", *others.values(), "seconds"]
    lines = [heading, ["---"] * len(heading)]
    for each in rows:
        cells = [
            each["label"],
            f"{each['target']:.1f}",
            f"{each['bits']:.3f}",
            f"{np.mean(each['kl']):.4f}",
        ]
        for other in others:
            ratio = paired_increase(each[other], each["kl"], logarithmic=False)
            cells.append(
                f"{np.mean(each[other]):.4f}: {ratio.value:+.1%} ({ratio.low:+.1%} to "
                f"{ratio.high:+.1%})"
            )
        lines.append([*cells, f"{each['seconds']:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    arguments = parse(__doc__, methods="gradient")
    out = set_up(arguments)
    rows = compared(arguments, out)
    (out / "modelopt.json").write_text(json.dumps(rows))
    (out / "modelopt.md").write_text(table := as_table(rows))
    print(table)


def compared(arguments: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    loaded, sites, calibration, report = subject(arguments)
    better = rounded_changes(loaded, sites, calibration, "gptq")
    nearest = score("path", loaded, sites, calibration, arguments.device, out / "path.json").losses
    gptq = score(
        "path", loaded, sites, calibration, arguments.device, out / "path-gptq.json", better
    ).losses
    ours = {
        "nearest, grouped": (nearest, None, their_groups(sites)),
        "nearest": (nearest, None, ()),
        "gptq": (gptq, better, ()),
    }
    with in_float32(loaded.module):
        truth = Truth(loaded.module, sites, report, arguments.device)
        ids = calibration.to(arguments.device)
        rows = list(their_plans(loaded.module, ids, sites, truth, arguments.methods.split(",")))
        for label, (losses, rounded, groups) in ours.items():
            truth = Truth(loaded.module, sites, report, arguments.device, rounded)
            for each in rows:
                each[label] = truth.windows(allocate(losses, sites, each["bits"], groups=groups))
                print(f"{label}, {each['bits']:.3f} bits: {np.mean(each[label]):.4f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
