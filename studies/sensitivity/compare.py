"""How well each sensitivity predicts the divergence of whole plans, and how long it takes.

    python studies/sensitivity/compare.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT [--device cuda] [--methods fisher,path]

MODEL is a Hugging Face language model; texts are UTF-8 files (also .xz). For each method: Kendall's tau and the relative error
of predicted against true KL (mean per token, nats, to the unquantized model, in float32) over random plans in three regions
of average bits. Weights are rounded to nearest; bits count a 16-bit scale for each group or row. OUT gets `truth.json`
(plans and their true KL), `METHOD.json` (every loss) and `table.md`; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import kendalltau

from autoquant.candidates import A16, Format, get_format
from autoquant.candidates.formats.low_bit import make_format
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import EVERY_LAYER, SENSITIVITIES, Change
from autoquant.evaluators.sensitivity.together import CalibrationModel
from autoquant.evaluators.text import TextParts
from autoquant.models import LoadedModel, load_model
from autoquant.profiler.record import record
from autoquant.records import Site, Workload
from autoquant.runtime.phases import make_phases
from autoquant.solver.additivity import ADDITION, LossMap, fit_loss_map, together_pairs

WINDOW_TOKENS = 512
REGIONS = {"above 6 bits": (6.0, 8.0), "4 to 6": (4.0, 6.0), "below 4": (2.6, 4.0)}
PLANS_PER_REGION = 20
INT4 = tuple(make_format(4, group) for group in (32, 128))
FORMATS: Mapping[
    str, tuple[Format, float, int]
] = {  # bits of a number, how many share 16 bits of scale (0: the row)
    "int8-row": (get_format("int8-row/plain"), 8, 0),
    "int4-g32": (INT4[0], 4, 32),
    "int4-g128": (INT4[1], 4, 128),
    "int3-g64": (get_format("int3-g64/bit-planes"), 3, 64),
    "int3-g32": (get_format("int3-g32/bit-planes"), 3, 32),
    "int2-g32": (get_format("int2-g32/bit-planes"), 2, 32),
}
Losses = dict[tuple[str, str], float]
Plan = dict[str, str]


@dataclass(frozen=True)
class Scored:
    """What a method found, in how many seconds of the clock and of the processor."""

    losses: Losses
    wall_s: float
    cpu_s: float


def main() -> None:
    arguments = parse(__doc__)
    out = set_up(arguments)
    loaded = load_model(arguments.model, device=arguments.device)
    sites = searched_sites(loaded)
    plans, truth = true_divergences(loaded, sites, arguments, out / "truth.json")
    calibration = windows(loaded, arguments.calibration_text, 0, arguments.windows)
    lines = []
    for method in arguments.methods.split(","):
        scored = score(method, loaded, sites, calibration, arguments.device, out / f"{method}.json")
        lines += table_rows(method, scored, sites, plans, truth)
    heading = ["method", "map", *REGIONS, "seconds", "CPU seconds"]
    table = "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *lines]
    )
    (out / "table.md").write_text(table + "\n")
    print(table)


def set_up(arguments: argparse.Namespace) -> Path:
    """Have float32 computed as such, and no gradients kept; returns the folder for what is found, made if need be."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    return out


class Subject(NamedTuple):
    """What a study is about: a model, and the windows of two texts, token ids `[windows, 512]`."""

    loaded: LoadedModel
    sites: Sequence[Site]
    calibration: torch.Tensor
    report: torch.Tensor


def subject(arguments: argparse.Namespace) -> Subject:
    loaded = load_model(arguments.model, device=arguments.device)
    return Subject(
        loaded,
        searched_sites(loaded),
        windows(loaded, arguments.calibration_text, 0, arguments.windows),
        windows(loaded, arguments.report_text, arguments.skip_windows, arguments.report_windows),
    )


def parse(
    doc: str | None,
    *,
    methods: str = "isolated,fisher,path",
    rounding: bool = False,
    searches: str = "",
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration_text", "report_text", "out"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default=methods)
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    parser.add_argument("--report-windows", type=int, default=24)
    parser.add_argument(
        "--skip-windows",
        type=int,
        default=24,
        help="windows of the report text that are left out first",
    )
    parser.add_argument("--seed", type=int, default=0)
    if searches:
        parser.add_argument("--searches", default=searches)
        parser.add_argument("--seconds", type=float, default=30.0, help="of each search")
    if rounding:
        parser.add_argument("--rounding", choices=("hqq", "clip", "gptq"))
        parser.add_argument("--refine", action="store_true")
    return parser.parse_args()


def searched_sites(loaded: LoadedModel) -> list[Site]:
    """Every linear but the output layer."""
    phases = make_phases(loaded, Workload.parse("prefill=8"))
    return [site for site in record(loaded.module, phases).sites if site.name != "lm_head"]


def windows(loaded: LoadedModel, path: str, first: int, count: int) -> torch.Tensor:
    """Token ids `[count, 512]` of a text, from window `first` on."""
    open_text = lzma.open if path.endswith(".xz") else open
    opened = open_text(path, "rt", encoding="utf-8")
    wanted = (first + count) * WINDOW_TOKENS
    tokens: list[int] = []
    with opened as file:
        while len(tokens) < wanted and (text := file.read(100_000) + file.readline()):
            tokens += loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < wanted:
        raise SystemExit(f"{path} has {len(tokens)} tokens; {wanted} are needed")
    return torch.tensor(tokens[first * WINDOW_TOKENS : wanted]).reshape(count, WINDOW_TOKENS)


def quality(calibration: torch.Tensor, device: str) -> TextQuality:
    nothing = calibration[:0]
    return TextQuality(
        TextParts({"calibration": calibration, "selection": nothing, "report": nothing}), device
    )


def average_bits(plan: Plan, sites: Sequence[Site]) -> float:
    bits, numbers = 0.0, 0
    for site in sites:
        _, width, group = FORMATS[plan[site.name]]
        numel = site.shape.n * site.shape.k
        bits += (width + 16 / (group or site.shape.k)) * numel
        numbers += numel
    return bits / numbers


def random_plans(sites: Sequence[Site], seed: int) -> list[tuple[str, Plan]]:
    """Plans in each region: each draws how common every format is, then the format of every layer."""
    rng = random.Random(seed)
    plans = []
    for region, (low, high) in REGIONS.items():
        count = 0
        while count < PLANS_PER_REGION:
            weights = [rng.gammavariate(0.7, 1.0) for _ in FORMATS]
            plan = {site.name: rng.choices(list(FORMATS), weights)[0] for site in sites}
            if low < average_bits(plan, sites) <= high:
                plans.append((region, plan))
                count += 1
    return plans


Changes = Mapping[tuple[str, str], Change]


def changes(
    sites: Sequence[Site], plan: Plan | None = None, rounded: Changes | None = None
) -> list[Change]:
    """Those of a plan, or every format at every site; better rounded ones, by (site, format), where there are such."""
    return [
        (rounded or {}).get((site.name, name)) or Change(site, name, fmt, A16)
        for name, (fmt, _, _) in FORMATS.items()
        for site in sites
        if plan is None or plan[site.name] == name
    ]


def true_divergences(
    loaded: LoadedModel, sites: Sequence[Site], arguments: argparse.Namespace, path: Path
) -> tuple[list[tuple[str, Plan]], np.ndarray]:
    """Random plans with their regions, and the mean KL per token of each on the report text."""
    plans = random_plans(sites, arguments.seed)
    kl: list[float] = json.loads(path.read_text())["kl"] if path.exists() else []
    if len(kl) < len(plans):
        report = windows(
            loaded, arguments.report_text, arguments.skip_windows, arguments.report_windows
        )
        dtypes = {site.name: getattr(torch, site.shape.dtype) for site in sites}
        bits = [average_bits(plan, sites) for _, plan in plans]
        with in_float32(loaded.module):
            calibration = CalibrationModel(loaded.module, quality(report, arguments.device))
            for number, (_, plan) in enumerate(plans[len(kl) :], start=len(kl) + 1):
                kl.append(calibration.whole(calibration.sites(changes(sites, plan), dtypes)))
                path.write_text(json.dumps({"plans": plans, "bits": bits, "kl": kl}))
                print(f"plan {number} of {len(plans)}: {kl[-1]:.4f}", flush=True)
    return plans, np.array(kl)


def score(
    method: str,
    loaded: LoadedModel,
    sites: Sequence[Site],
    calibration: torch.Tensor,
    device: str,
    path: Path,
    rounded: Changes | None = None,
) -> Scored:
    if path.exists():
        kept = json.loads(path.read_text())
        losses = {(name, numerics): loss for name, numerics, loss in kept["losses"]}
        return Scored(losses, kept["wall_s"], kept["cpu_s"])
    losses: Losses = {}
    with stopwatch(device) as seconds:
        SENSITIVITIES[method].score(
            loaded.module,
            changes(sites, None, rounded),
            quality(calibration, device),
            lambda _subject, new: losses.update(new),
        )
    scored = Scored(losses, *seconds)
    rows = [[name, numerics, loss] for (name, numerics), loss in losses.items()]
    path.write_text(json.dumps({"wall_s": scored.wall_s, "cpu_s": scored.cpu_s, "losses": rows}))
    print(f"{method}: {scored.wall_s:.1f} s, {scored.cpu_s:.1f} s of CPU", flush=True)
    return scored


@contextmanager
def stopwatch(device: str) -> Iterator[list[float]]:
    """Seconds of the clock, and of the processor in all threads, once the block has ended."""
    seconds: list[float] = []
    wall, cpu = time.monotonic(), time.process_time()
    yield seconds
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds += [time.monotonic() - wall, time.process_time() - cpu]


def table_rows(
    method: str,
    scored: Scored,
    sites: Sequence[Site],
    plans: Sequence[tuple[str, Plan]],
    truth: np.ndarray,
) -> list[list[str]]:
    """A row for plain sums, and one for sums mapped by what changing all layers at once cost, where that was measured."""
    summed = np.array(
        [sum(scored.losses[name, numerics] for name, numerics in plan.items()) for _, plan in plans]
    )
    maps: dict[str, LossMap] = {"sum": ADDITION}
    if pairs := together_pairs(scored.losses, EVERY_LAYER):
        fitted = fit_loss_map(pairs)
        maps[f"s + {fitted.curvature:.3f} s^2"] = fitted
    regions = np.array([region for region, _ in plans])
    rows = []
    for name, loss_map in maps.items():
        predicted = np.array([loss_map.plan_loss(s) for s in summed])
        cells = [cell(predicted[regions == region], truth[regions == region]) for region in REGIONS]
        rows.append([method, name, *cells, f"{scored.wall_s:.0f}", f"{scored.cpu_s:.0f}"])
    return rows


def cell(predicted: np.ndarray, truth: np.ndarray) -> str:
    """Kendall's tau; median of the relative error's magnitude, and the range of the error itself."""
    error = predicted / truth - 1
    tau = kendalltau(predicted, truth).statistic
    return f"{tau:.3f}; {np.median(np.abs(error)):.1%} ({error.min():+.0%} to {error.max():+.0%})"


if __name__ == "__main__":
    main()
