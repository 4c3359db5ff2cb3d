"""Roundings that were tried and are not formats: AWQ's scales of the inputs, and GPTQ in the order
of activation.

    python studies/rounding/variants.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT [--windows 32]
        [--report-windows 4]

As `compare.py`, but OUT gets `variants.txt`. AWQ's scales divide the inputs, which is one more
operation for the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from compare import WINDOW_TOKENS, parse, windows
from torch import nn

from autoquant.candidates import InputStatistics
from autoquant.candidates.formats.rounding import Grid, clip, gptq
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.quality import next_token_logits
from autoquant.models import load_model

GRIDS = {
    "int4-g128": Grid(bits=4, group=128, symmetric=False),
    "int3-g64": Grid(bits=3, group=64, symmetric=True),
    "int2-g32": Grid(bits=2, group=32, symmetric=True),
}
Variant = Callable[[torch.Tensor, Grid, InputStatistics], torch.Tensor]
EXPONENTS = torch.linspace(0, 0.95, 20).tolist()


def nearest(weight: torch.Tensor, grid: Grid, inputs: InputStatistics) -> torch.Tensor:
    groups = weight.float().reshape(len(weight), -1, grid.group)
    scale, zero = grid.fitted(*grid.ends(groups), weight.dtype)
    return (grid.integers(groups, scale, zero) * scale + zero).reshape(weight.shape)


def clipped(weight: torch.Tensor, grid: Grid, inputs: InputStatistics) -> torch.Tensor:
    found = clip(weight, grid, inputs)
    groups = found.q.reshape(len(weight), -1, grid.group)
    return (groups * found.scale.float().unsqueeze(-1) + found.zero.float().unsqueeze(-1)).reshape(
        weight.shape
    )


def compensated(weight: torch.Tensor, grid: Grid, inputs: InputStatistics) -> torch.Tensor:
    found = gptq(weight, grid, inputs)
    groups = found.q.reshape(len(weight), -1, grid.group)
    return (groups * found.scale.float().unsqueeze(-1) + found.zero.float().unsqueeze(-1)).reshape(
        weight.shape
    )


def by_activation(weight: torch.Tensor, grid: Grid, inputs: InputStatistics) -> torch.Tensor:
    """GPTQ, the columns with the largest inputs first; every group's scale is chosen beforehand."""
    importance = inputs.hessian.diagonal()
    order = importance.argsort(descending=True)
    factor = InputStatistics(inputs.hessian[order][:, order]).inverse_factor
    groups = weight.float().reshape(len(weight), -1, grid.group)
    scale, zero = grid.best(groups, importance.reshape(1, -1, grid.group), weight.dtype)
    left = weight.float().t()[order].contiguous()
    found = torch.empty_like(left)
    for column, original in enumerate(order.tolist()):
        own = scale[:, original // grid.group, 0], zero[:, original // grid.group, 0]
        found[column] = grid.integers(left[column], *own) * own[0] + own[1]
        error = (left[column] - found[column]) / factor[column, column]
        left[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return found[order.argsort()].t().contiguous()


def scaled(
    weight: torch.Tensor, grid: Grid, inputs: InputStatistics, rounding: Variant = nearest
) -> torch.Tensor:
    """AWQ: columns multiplied by a power of the size of their inputs, the one that gives the least
    error of the output.
    """
    size = inputs.hessian.diagonal().sqrt()
    size = (size / size.mean()).clamp(min=1e-4)
    tried = []
    for exponent in EXPONENTS:
        scale = size**exponent
        scale = scale / (scale.max() * scale.min()).sqrt()
        seen = InputStatistics(inputs.hessian / scale / scale.unsqueeze(1))
        found = rounding((weight.float() * scale).to(weight.dtype), grid, seen) / scale
        off = found - weight.float()
        tried.append((((off @ inputs.hessian) * off).sum().item(), found))
    return min(tried, key=lambda pair: pair[0])[1]


def scaled_and_clipped(weight: torch.Tensor, grid: Grid, inputs: InputStatistics) -> torch.Tensor:
    return scaled(weight, grid, inputs, clipped)


VARIANTS: tuple[Variant, ...] = (
    nearest,
    clipped,
    scaled,
    scaled_and_clipped,
    compensated,
    by_activation,
)


def main() -> None:
    arguments = parse()
    torch.set_grad_enabled(False)
    loaded = load_model(arguments.model)
    module = loaded.module
    head = module.get_output_embeddings()
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
    lines = []
    with in_float32(module):
        widened = {name: layer.weight.data for name, layer in linears.items()}
        references = [next_token_logits(module, ids.unsqueeze(0)) for ids in report]
        for storage, grid in GRIDS.items():
            for variant in VARIANTS:
                for name, layer in linears.items():
                    layer.weight.data = variant(originals[name], grid, inputs[name])
                kl = sum(
                    divergence_sum(reference, next_token_logits(module, ids.unsqueeze(0)))
                    for reference, ids in zip(references, report, strict=True)
                ) / (len(report) * WINDOW_TOKENS)
                lines.append(f"{storage:10} {variant.__name__:20} KL {kl:.4f}")
                print(lines[-1], flush=True)
        for name, layer in linears.items():
            layer.weight.data = widened[name]
    (Path(arguments.out) / "variants.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
