"""What better rounding is worth: the divergence of uniform plans, by bits and rounding.

    python studies/rounding/compare.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT

MODEL is a Hugging Face language model; texts are UTF-8 files (also .xz). Every linear but the output layer is rounded; KL is the
mean per token in nats to the unquantized model, in float32, on windows of 512 tokens of the report text. Its ratio to that of
rounding to nearest has a 95 % interval from the jackknife over windows, paired. OUT gets `plans.json`, where what is there
already is not measured again, and `table.md`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from scipy.stats import t as student
from torch import nn

from autoquant.candidates import Format, InputStatistics, known_formats
from autoquant.candidates.flat import stored_bytes
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.quality import next_token_logits
from autoquant.models import LoadedModel, load_model

WINDOW_TOKENS = 512
STORAGE = ("int4-g32", "int4-g64", "int4-g128", "int3-g32", "int3-g64", "int2-g32")
ROUNDINGS = ("", "hqq", "clip", "gptq")
Plans = dict[str, dict[str, object]]


def main() -> None:
    arguments = parse()
    torch.set_grad_enabled(False)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plans.json"
    plans: Plans = json.loads(path.read_text()) if path.exists() else {}
    wanted = [name for name in map(format_name, *zip(*cases(), strict=True)) if name not in plans]
    if wanted:
        loaded = load_model(arguments.model, device=arguments.device)
        measure(loaded, wanted, arguments, plans, path)
    table = "\n".join(table_lines(plans))
    (out / "table.md").write_text(table + "\n")
    print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "calibration_text", "report_text", "out"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--report-windows", type=int, default=16)
    parser.add_argument(
        "--skip-windows",
        type=int,
        default=24,
        help="windows of the report text that are left out first",
    )
    return parser.parse_args()


def cases() -> list[tuple[str, str]]:
    return [(storage, rounding) for storage in STORAGE for rounding in ROUNDINGS]


def format_name(storage: str, rounding: str) -> str:
    return f"{storage}-{rounding}" if rounding else storage


def format_of(values: str, device_type: str) -> Format:
    """The first layout of these values that the device can store."""
    layouts = {"cpu": ("cpu-packed", "bit-planes"), "cuda": ("gemlite", "bit-planes")}[device_type]
    return next(
        fmt for fmt in known_formats().values() if fmt.values == values and fmt.id.endswith(layouts)
    )


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


def measure(
    loaded: LoadedModel,
    wanted: Sequence[str],
    arguments: argparse.Namespace,
    plans: Plans,
    path: Path,
) -> None:
    """Add the plans that are wanted to those known, one by one."""
    module = loaded.module
    head = module.get_output_embeddings()
    linears = {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    began = time.monotonic()
    calibration = Calibration(windows(loaded, arguments.calibration_text, 0, arguments.windows))
    inputs = dict(calibration.inputs(module, list(linears)))
    print(f"inputs of {len(inputs)} layers: {time.monotonic() - began:.1f} s", flush=True)
    originals = {name: layer.weight.data for name, layer in linears.items()}
    report = windows(
        loaded, arguments.report_text, arguments.skip_windows, arguments.report_windows
    )
    report = report.to(arguments.device)
    with in_float32(module):
        references = [next_token_logits(module, ids.unsqueeze(0)) for ids in report]
        for values in wanted:
            fmt = format_of(values, torch.device(arguments.device).type)
            with rounded(linears, originals, inputs, fmt) as plan:
                kl = [
                    divergence_sum(reference, next_token_logits(module, ids.unsqueeze(0)))
                    / WINDOW_TOKENS
                    for reference, ids in zip(references, report, strict=True)
                ]
            plans[values] = plan | {"kl": kl}
            path.write_text(json.dumps(plans, indent=1))
            print(f"{values}: KL {sum(kl) / len(kl):.4f}, {plan['seconds']:.1f} s", flush=True)


@contextmanager
def rounded(
    linears: Mapping[str, nn.Linear],
    originals: Mapping[str, torch.Tensor],
    inputs: Mapping[str, InputStatistics],
    fmt: Format,
) -> Iterator[dict[str, float]]:
    """While active, the linears have the numbers of a format. Says what rounding took, in all and for the slowest layer."""
    kept = {name: layer.weight.data for name, layer in linears.items()}
    seconds, size = [], 0
    for found in set(inputs.values()):  # each format pays for its own factors
        vars(found).pop("inverse_factor", None)
    for name, layer in linears.items():
        began = time.monotonic()
        stored = fmt.store(originals[name], inputs[name])
        seconds.append(time.monotonic() - began)
        size += stored_bytes(stored)
        layer.weight.data = fmt.dequantize(stored)
    bits = 8 * size / sum(weight.numel() for weight in originals.values())
    yield {"bits": bits, "seconds": sum(seconds), "slowest_layer_s": max(seconds)}
    for name, layer in linears.items():
        layer.weight.data = kept[name]


def ratio(kl: Sequence[float], nearest: Sequence[float]) -> tuple[float, float, float]:
    """Mean KL over that of rounding to nearest on the same windows, with its 95 % interval (jackknife of the logarithm)."""
    count = len(kl)
    whole = math.log(sum(kl) / sum(nearest))
    left_out = [
        math.log((sum(kl) - a) / (sum(nearest) - b)) for a, b in zip(kl, nearest, strict=True)
    ]
    mean = sum(left_out) / count
    error = math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in left_out))
    reach = float(student.ppf(0.975, count - 1)) * error
    return math.exp(whole), math.exp(whole - reach), math.exp(whole + reach)


def table_lines(plans: Plans) -> list[str]:
    heading = [
        "storage",
        "bits",
        "rounding",
        "KL",
        "to nearest",
        "95 % interval",
        "seconds",
        "slowest layer, s",
    ]
    rows = [heading, ["---"] * len(heading)]
    for storage, rounding in cases():
        plan = plans[format_name(storage, rounding)]
        value, low, high = ratio(plan["kl"], plans[storage]["kl"])
        kl = sum(plan["kl"]) / len(plan["kl"])
        change = f"{value:.3f}" if rounding else ""
        interval = f"{low:.3f} to {high:.3f}" if rounding else ""
        took = [f"{plan['seconds']:.1f}", f"{plan['slowest_layer_s']:.2f}"]
        rows.append(
            [
                storage,
                f"{plan['bits']:.3f}",
                rounding or "nearest",
                f"{kl:.4f}",
                change,
                interval,
                *took,
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    main()
