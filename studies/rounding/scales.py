"""What scales of a layer's inputs are worth: AWQ's for weights of few bits, SmoothQuant's for int8 activations; and static
ranges of activations, NF4 and 2:4 sparsity beside them.

    python studies/rounding/scales.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT [--report-windows 8] [--storage int4-g64 ...]

As `compare.py`; OUT gets `scales.txt`. Each layer has scales of its own, which no norm before several layers could hold for all of
them: that is the most that folding could gain. KL is the mean per token in nats, and the last number the increase of perplexity.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from compare import windows
from torch import nn
from variants import EXPONENTS, clipped, compensated, nearest

from autoquant.candidates import A16, Format, InputStatistics, get_format
from autoquant.candidates.base import FLOAT8_MAX, round_row_int8
from autoquant.candidates.formats import masks
from autoquant.candidates.formats.nf4 import LEVELS
from autoquant.candidates.formats.rounding import Grid
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.quality import next_token_logits
from autoquant.models import load_model

GRIDS = {
    "int4-g32": Grid(bits=4, group=32, symmetric=False),
    "int4-g64": Grid(bits=4, group=64, symmetric=False),
    "int4-g128": Grid(bits=4, group=128, symmetric=False),
    "int3-g64": Grid(bits=3, group=64, symmetric=True),
}
MADE = (
    "static-int8/plain",
    "static-float8/plain",
    "smooth-int8/plain",
    "awq-int4-g64/lanes",
    "awq-int4-g128/lanes",
    "nf4-g64/packed",
)
Seen = Callable[[torch.Tensor], torch.Tensor]
Changed = tuple[torch.Tensor, Seen | None]
"""The weight to multiply with, and what happens to the input."""
Variant = Callable[[torch.Tensor, InputStatistics, torch.Tensor], Changed]
"""Takes a weight, its inputs, and the rows of a sample of them."""


def output_error(found: torch.Tensor, weight: torch.Tensor, inputs: InputStatistics) -> float:
    off = found - weight.float()
    return ((off @ inputs.hessian) * off).sum().item()


def best_scale(weight: torch.Tensor, grid: Grid, inputs: InputStatistics) -> torch.Tensor:
    """AWQ's scale: the power of the size of the inputs with the least error of the output, clipped as `clip` does."""
    size = inputs.hessian.diagonal().sqrt()
    size = (size / size.mean()).clamp(min=1e-4)
    tried = []
    for exponent in EXPONENTS[::2]:
        scale = size**exponent
        scale = scale / (scale.max() * scale.min()).sqrt()
        seen = InputStatistics(inputs.hessian / scale / scale.unsqueeze(1))
        found = clipped((weight.float() * scale).to(weight.dtype), grid, seen) / scale
        tried.append((output_error(found, weight, inputs), scale))
    return min(tried, key=lambda pair: pair[0])[1]


def weight_only(rounding: Callable[..., torch.Tensor], grid: Grid, *, scales: bool) -> Variant:
    def change(weight: torch.Tensor, inputs: InputStatistics, _rows: torch.Tensor) -> Changed:
        if not scales:
            return rounding(weight, grid, inputs), None
        scale = best_scale(weight, grid, inputs)
        seen = InputStatistics(inputs.hessian / scale / scale.unsqueeze(1))
        return rounding((weight.float() * scale).to(weight.dtype), grid, seen) / scale, None

    return change


def int8_weight(weight: torch.Tensor) -> torch.Tensor:
    q, scale = round_row_int8(weight)
    return q.float() * scale


def by_row(x: torch.Tensor) -> torch.Tensor:
    q, scale = round_row_int8(x.reshape(-1, x.shape[-1]))
    return (q.float() * scale).reshape(x.shape)


def smooth(
    weight: torch.Tensor,
    _inputs: InputStatistics,
    rows: torch.Tensor,
    exponents: tuple[float, ...],
) -> Changed:
    """SmoothQuant: of these exponents the one with the least error of the output on the sample."""
    largest, own = rows.abs().amax(0).clamp(min=1e-5), weight.float().abs().amax(0).clamp(min=1e-5)
    expected = rows @ weight.float().t()
    tried = []
    for exponent in exponents:
        scale = (largest**exponent / own ** (1 - exponent)).clamp(min=1e-5)
        scale = (
            scale / (scale.max() * scale.min()).sqrt() if exponent >= 0 else torch.ones_like(own)
        )
        found = int8_weight(weight.float() * scale)
        off = by_row(rows / scale) @ found.t() - expected
        tried.append((off.square().sum().item(), found, scale))
    _, found, scale = min(tried, key=lambda each: each[0])
    return found, lambda x: by_row(x / scale)


def static_int8(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


def static_float8(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float() * scale


def static(
    weight: torch.Tensor, _inputs: InputStatistics, rows: torch.Tensor, how: str, kind: str
) -> Changed:
    """One range for all of a layer's inputs, by the largest, by a share of them, or by the least squared error,
    of all rows or relative to each row."""
    stored = int8_weight(weight) if kind == "int8" else float8_weight(weight)
    rounding, most = (static_int8, 127.0) if kind == "int8" else (static_float8, FLOAT8_MAX)
    largest = rows.abs().max().item()
    if "%" in how:
        flat = rows.abs().flatten()
        share = float(how.rstrip("% ")) / 100
        largest = flat.kthvalue(math.ceil(share * flat.numel())).values.item()
    elif "error" in how:
        energy = rows.square().mean(-1, keepdim=True).clamp(min=1e-12) if "row" in how else 1.0
        tried = [largest * 2 ** (-step / 4) for step in range(40)]
        largest = min(
            tried,
            key=lambda each: ((rounding(rows, each / most) - rows).square() / energy).sum().item(),
        )
    return stored, partial(rounding, scale=largest / most)


def float8_weight(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (weight.float() / scale).to(torch.float8_e4m3fn).float() * scale


def float8_by_row(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def sparse(
    weight: torch.Tensor, inputs: InputStatistics, _rows: torch.Tensor, mask: str, kind: str
) -> Changed:
    """Two of every four weights along k are zero: the smallest, or those of least |w| times the norm of the input."""
    score = weight.float().abs()
    if mask == "wanda":
        score = score * inputs.hessian.diagonal().sqrt()
    fours = score.reshape(len(weight), -1, 4)
    kept = torch.zeros_like(fours).scatter_(-1, fours.topk(2, dim=-1).indices, 1.0)
    left = weight.float() * kept.reshape(weight.shape)
    return {"float": lambda w: w, "int8": int8_weight}[kind](left), None


def sparse_solved(weight: torch.Tensor, inputs: InputStatistics, _rows: torch.Tensor) -> Changed:
    """SparseGPT: the columns behind make up for what is dropped."""
    return masks.compensated(weight, inputs), None


def normal_float(
    weight: torch.Tensor, _inputs: InputStatistics, _rows: torch.Tensor, group: int
) -> Changed:
    table = torch.tensor(LEVELS)
    groups = weight.float().reshape(len(weight), -1, group)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12).to(weight.dtype).float()
    codes = torch.bucketize(groups / scale, (table[1:] + table[:-1]) / 2)
    return (table[codes] * scale).reshape(weight.shape), None


def made(
    weight: torch.Tensor, inputs: InputStatistics, _rows: torch.Tensor, fmt: Format, numerics: str
) -> Changed:
    """What the project's own format makes of the layer."""
    stored = fmt.store(weight, inputs)
    return fmt.dequantize(stored), fmt.activation_rounding(numerics, stored)


def numerics_of(fmt: Format) -> list[str]:
    """How its kernels round the activation, or not at all if none does."""
    found = [kernel.numerics for kernel in fmt.kernels if kernel.numerics != A16]
    return list(dict.fromkeys(found)) or [A16]


def variants(storage: list[str]) -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for name in storage:
        grid = GRIDS[name]
        for how in (nearest, clipped, compensated):
            found[f"{name} {how.__name__}"] = weight_only(how, grid, scales=False)
        for how in (clipped, compensated):
            found[f"{name} scaled, {how.__name__}"] = weight_only(how, grid, scales=True)
    found["nf4-g64"] = partial(normal_float, group=64)
    found["int8-row"] = lambda w, _i, _r: (int8_weight(w), None)
    found["int8-row a8-row"] = lambda w, _i, _r: (int8_weight(w), by_row)
    for exponent in (0.25, 0.5, 0.75):
        found[f"int8-row a8-row smooth {exponent}"] = partial(smooth, exponents=(exponent,))
    found["int8-row a8-row smooth best"] = partial(smooth, exponents=(-1, 0, 0.25, 0.5, 0.75))
    for kind in ("int8", "float8"):
        for how in ("largest", "99.99 %", "99.9 %", "error", "row error"):
            found[f"{kind}-row static {how}"] = partial(static, how=how, kind=kind)
    found["float8-row a8-float8-row"] = lambda w, _i, _r: (float8_weight(w), float8_by_row)
    for fmt in map(get_format, MADE):
        found |= {f"{fmt.id} {k}": partial(made, fmt=fmt, numerics=k) for k in numerics_of(fmt)}
    for mask in ("magnitude", "wanda"):
        for kind in ("float", "int8"):
            found[f"sparse24 {mask} {kind}"] = partial(sparse, mask=mask, kind=kind)
    found["sparse24 solved float"] = sparse_solved
    return found


class Sample:
    """Rows of the inputs of linears: every eighth of the first windows."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.rows: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
        self.handles = [
            layer.register_forward_pre_hook(partial(self._add, name))
            for name, layer in linears.items()
        ]

    def _add(self, name: str, _layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.rows[name].append(args[0].reshape(-1, args[0].shape[-1])[::8].float())


def main() -> None:
    arguments = parse()
    torch.set_grad_enabled(False)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(arguments.model)
    module = loaded.module
    head = module.get_output_embeddings()
    linears = {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    text = windows(loaded, arguments.calibration_text, 0, arguments.windows)
    inputs = dict(Calibration(text).inputs(module, list(linears)))
    sample = Sample(linears)
    for ids in text[:8]:
        next_token_logits(module, ids.unsqueeze(0))
    for handle in sample.handles:
        handle.remove()
    rows = {name: torch.cat(found) for name, found in sample.rows.items()}
    originals = {name: layer.weight.data for name, layer in linears.items()}
    report = windows(
        loaded, arguments.report_text, arguments.skip_windows, arguments.report_windows
    )
    lines: list[str] = []
    with in_float32(module):
        widened = {name: layer.weight.data for name, layer in linears.items()}
        references = [next_token_logits(module, ids.unsqueeze(0)) for ids in report]
        before = sum(map(loss, references, report)) / len(report)
        for title, variant in variants(arguments.storage).items():
            if not title.startswith(tuple(arguments.only)):
                continue
            handles = []
            for name, layer in linears.items():
                layer.weight.data, seen = variant(originals[name], inputs[name], rows[name])
                if seen is not None:
                    handles.append(layer.register_forward_pre_hook(partial(_on_input, seen)))
            logits = [next_token_logits(module, ids.unsqueeze(0)) for ids in report]
            for handle in handles:
                handle.remove()
            kl = sum(map(divergence_sum, references, logits)) / report.numel()
            increase = math.exp(sum(map(loss, logits, report)) / len(report) - before) - 1
            lines.append(f"{title:32} KL {kl:.5f}  {increase:+.2%}")
            print(lines[-1], flush=True)
            (out / "scales.txt").write_text("\n".join(lines) + "\n")
        for name, layer in linears.items():
            layer.weight.data = widened[name]


def _on_input(seen: Seen, _layer: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return seen(args[0])


def loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return F.cross_entropy(logits[:-1].float(), ids[1:]).item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration_text", "report_text", "out"):
        parser.add_argument(name)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--report-windows", type=int, default=8)
    parser.add_argument("--skip-windows", type=int, default=40, help="windows left out first")
    parser.add_argument("--storage", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--only", nargs="+", default=[""], help="measure what begins so")
    return parser.parse_args()


if __name__ == "__main__":
    main()
