"""What symmetric int4 loses: by the choice of its scale, and against int4 with zero points.

    python studies/rounding/symmetric.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT

As `compare.py`, with uniform plans of `int4s-*` and `int4-*`. OUT gets `symmetric.json`, where what
is there already is not measured again, and after each plan `symmetric.md`. Scales are compared by
the error of all weights and by KL, rounded to nearest:

- spanned: the largest magnitude lies half a step beyond 7.
- least: the largest magnitude lies on 7, or up to 40 % beyond it, with the least squared error. It
  is the format's (`nearest` of `autoquant/candidates/formats/rounding.py`).
- weighted: the same, each weight's error counted by its square plus the group's mean square.
- signed: the largest magnitude is -8, so that half of all scales are negative (llama.cpp's Q4_0).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from compare import WINDOW_TOKENS, Plans, parse, ratio, rounded, windows
from torch import nn

from autoquant.candidates import Format, known_formats
from autoquant.candidates.formats.rounding import Grid
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.quality import next_token_logits
from autoquant.models import load_model

GROUPS = (32, 64, 128)
ROUNDINGS = ("", "-hqq", "-clip", "-gptq")
Scale = Callable[[torch.Tensor, Grid, torch.dtype], torch.Tensor]
"""Maps groups `[n, groups, group]`, a grid and a dtype to scales `[n, groups, 1]`."""


def spanned(groups: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    return grid.fitted(*grid.ends(groups), dtype)[0]


def signed(groups: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest / -grid.half).to(dtype).float()
    return torch.where(scale == 0, 1e-12, scale)


def least(groups: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    return searched(groups, grid, dtype, torch.ones(1))


def weighted(groups: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    squares = groups.square()
    return searched(groups, grid, dtype, squares + squares.mean(-1, keepdim=True))


def searched(
    groups: torch.Tensor, grid: Grid, dtype: torch.dtype, importance: torch.Tensor
) -> torch.Tensor:
    widest = (grid.half - 0.5) / (grid.half - 1)
    shrinks = [widest / stretch for stretch in torch.linspace(1, 1.4, 12).tolist()]
    return grid.best(groups, importance, dtype, shrinks)[0]


SCALES: tuple[Scale, ...] = (spanned, least, weighted, signed)


def numbers(groups: torch.Tensor, grid: Grid, scale: torch.Tensor) -> torch.Tensor:
    return grid.integers(groups, scale, torch.zeros(1)) * scale


def main() -> None:
    arguments = parse()
    torch.set_grad_enabled(False)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "symmetric.json"
    plans: Plans = json.loads(path.read_text()) if path.exists() else {}
    measure(arguments, plans, path)
    print(path.with_suffix(".md").read_text())


def measure(arguments: argparse.Namespace, plans: Plans, path: Path) -> None:
    """Add the plans that are not known, one by one."""
    wanted = [name for name in names() if name not in plans]
    if not wanted:
        return
    loaded = load_model(arguments.model)
    module, head = loaded.module, loaded.module.get_output_embeddings()
    linears = {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    calibration = Calibration(windows(loaded, arguments.calibration_text, 0, arguments.windows))
    inputs = dict(calibration.inputs(module, list(linears)))
    originals = {name: layer.weight.data for name, layer in linears.items()}
    report = windows(
        loaded, arguments.report_text, arguments.skip_windows, arguments.report_windows
    )
    with in_float32(module):
        references = [next_token_logits(module, ids.unsqueeze(0)) for ids in report]
        for name in wanted:
            change = (
                scaled(linears, originals, name)
                if "/" in name
                else rounded(linears, originals, inputs, format_of(name))
            )
            with change as plan:
                error = weight_error(linears, originals)
                kl = [
                    divergence_sum(reference, next_token_logits(module, ids.unsqueeze(0)))
                    / WINDOW_TOKENS
                    for reference, ids in zip(references, report, strict=True)
                ]
            plans[name] = plan | {"error": error, "kl": kl}
            path.write_text(json.dumps(plans, indent=1))
            table = [*scale_lines(plans), "", *format_lines(plans)]
            path.with_suffix(".md").write_text("\n".join(table) + "\n")
            print(f"{name}: error {error:.4f}, KL {sum(kl) / len(kl):.4f}", flush=True)


def names() -> list[str]:
    """All plans: `SCALE/GROUP`, and formats' values."""
    scales = [f"{scale.__name__}/{group}" for group in GROUPS for scale in SCALES]
    families = ("int4s-g32", "int4-g64", "int4s-g64", "int4-g128", "int4-g32", "int4s-g128")
    return [*scales, *(f"{name}{rounding}" for name in families for rounding in ROUNDINGS)]


def format_of(values: str) -> Format:
    return next(fmt for fmt in known_formats().values() if fmt.id == f"{values}/lanes")


@contextmanager
def scaled(
    linears: Mapping[str, nn.Linear], originals: Mapping[str, torch.Tensor], name: str
) -> Iterator[dict[str, float]]:
    """While active, the linears are rounded to nearest with scales of one choice."""
    choice, _, group = name.partition("/")
    grid = Grid(bits=4, group=int(group), symmetric=True)
    scale_of = {scale.__name__: scale for scale in SCALES}[choice]
    kept = {name: layer.weight.data for name, layer in linears.items()}
    for name, layer in linears.items():
        weight = originals[name]
        padded = F.pad(weight.float(), (0, -weight.shape[1] % grid.group))
        groups = padded.reshape(len(weight), -1, grid.group)
        found = numbers(groups, grid, scale_of(groups, grid, weight.dtype))
        layer.weight.data = found.flatten(1)[:, : weight.shape[1]].contiguous()
    yield {"bits": 4 + 16 / grid.group}
    for name, layer in linears.items():
        layer.weight.data = kept[name]


def weight_error(linears: Mapping[str, nn.Linear], originals: Mapping[str, torch.Tensor]) -> float:
    """Root mean square error of all weights over their root mean square."""
    off = sum(
        (layer.weight.data - originals[name].float()).square().sum().item()
        for name, layer in linears.items()
    )
    return float(
        (off / sum(each.float().square().sum().item() for each in originals.values())) ** 0.5
    )


def mean(kl: list[float]) -> float:
    return sum(kl) / len(kl)


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def scale_lines(plans: Plans) -> list[str]:
    """Weight error and KL by the choice of the scale."""
    lines = [row("scale", *(f"g{group}: error, KL" for group in GROUPS)), row(*["---"] * 4)]
    for scale in SCALES:
        found = [plans.get(f"{scale.__name__}/{group}") for group in GROUPS]
        cells = [f"{plan['error']:.4f}, {mean(plan['kl']):.4f}" if plan else "" for plan in found]
        lines.append(row(scale.__name__, *cells))
    return lines


def format_lines(plans: Plans) -> list[str]:
    """KL by storage and rounding, and over that of as many bits with zero points."""
    lines = [row("storage", "bits", *(each[1:] or "nearest" for each in ROUNDINGS))]
    lines.append(row(*["---"] * 6))
    for family in ("int4", "int4s"):
        for group in GROUPS:
            cells = [cell(plans, family, group, rounding) for rounding in ROUNDINGS]
            bits = 4 + (16 if family == "int4s" else 32) / group
            lines.append(row(f"{family}-g{group}", f"{bits:.3f}", *cells))
    return lines


def cell(plans: Plans, family: str, group: int, rounding: str) -> str:
    plan = plans.get(f"{family}-g{group}{rounding}")
    if plan is None:
        return ""
    equal = plans.get(f"int4-g{2 * group}{rounding}")
    text = f"{mean(plan['kl']):.4f}"
    if family == "int4" or equal is None:
        return text
    value, low, high = ratio(plan["kl"], equal["kl"])
    return f"{text} ({value:.2f}, {low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
