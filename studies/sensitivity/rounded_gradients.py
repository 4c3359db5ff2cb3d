"""What rounding factors, as a search does, changes in the shares of `path`.

    python studies/sensitivity/rounded_gradients.py MODEL [--windows 2] [--device cpu]

Scores three numerics in turn with factors in float32 and as a search does, twice each. It prints
the seconds, the sums of the shares, and how far single shares differ. A search rounds factors of
gradients' products, and on a GPU those of all products.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import nn

from autoquant.candidates import get_format, select
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import Change, gradients
from autoquant.evaluators.sensitivity.path import path_shares
from autoquant.evaluators.sensitivity.together import CalibrationModel, dtypes_of
from autoquant.events import ignore
from autoquant.models import ModelRequest, load_request
from autoquant.profiler.record import record_model
from autoquant.records import Workload
from autoquant.tuner.judge import Asked, make_judge

NUMERICS = (("int8-row/plain", "a16"), ("int8-row/plain", "a8-row"), ("int4-g64/{}", "a16"))
PACKINGS = {"cpu": "cpu-packed", "cuda": "tiled"}
ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    loaded = load_request(ModelRequest(model=options.model, device=options.device))
    kind = torch.device(loaded.device).type
    judge = make_judge(Asked.of(None, None, None), loaded, select(["*"], kind), 0, ignore)
    assert isinstance(judge.quality, TextQuality)
    windows = dict(judge.quality.parts.windows)
    windows["calibration"] = windows["calibration"][: options.windows]
    object.__setattr__(judge.quality.parts, "windows", windows)
    sites = record_model(loaded, Workload.parse("prefill=512,decode=128"), ignore).sites
    for format_id, activation in NUMERICS:
        fmt = get_format(format_id.format(PACKINGS[kind]))
        taking = [site for site in sites if fmt.unsupported(site.shape, 1, kind) is None]
        changes = [Change(site, fmt.values, fmt, activation) for site in taking]
        dtypes = dtypes_of(loaded.module, changes)
        with torch.no_grad(), in_float32(loaded.module):
            found = compared(loaded.module, judge.quality, changes, dtypes)
        print(f"{fmt.values} {activation}: {found}", flush=True)


def compared(
    module: nn.Module,
    quality: TextQuality,
    changes: list[Change],
    dtypes: dict[str, torch.dtype],
) -> str:
    """Return seconds, sums and differences of shares with exact and with rounded factors."""
    exact_s, rounded_s = [], []
    for _ in range(ROUNDS):
        with patch.object(gradients, "_quick_products", nullcontext):
            exact, took_s = timed(calibrated(module, quality), changes, dtypes)
            exact_s.append(f"{took_s:.1f}")
        with gradients.scoring_products(module):
            rounded, took_s = timed(calibrated(module, quality), changes, dtypes)
            rounded_s.append(f"{took_s:.1f}")
    off = {name: abs(rounded[name] - share) for name, share in exact.items()}
    total = sum(exact.values())
    most = max(off[name] / max(share, 1e-12) for name, share in exact.items())
    return (
        f"{' and '.join(exact_s)} s exact, {' and '.join(rounded_s)} s rounded; shares sum to"
        f" {total:.4g} and {sum(rounded.values()):.4g}; differences are"
        f" {sum(off.values()) / total:.3%} of all, at most {most:.2%} of one"
    )


def calibrated(module: nn.Module, quality: TextQuality) -> CalibrationModel:
    """Return the calibration with the unquantized model's logits, which are not timed."""
    calibration = CalibrationModel(module, quality)
    for number in range(len(calibration.batches)):
        calibration.reference(number)
    return calibration


def timed(
    calibration: CalibrationModel, changes: list[Change], dtypes: dict[str, torch.dtype]
) -> tuple[dict[str, float], float]:
    started = time.perf_counter()
    return path_shares(
        calibration, calibration.sites(changes, dtypes)
    ), time.perf_counter() - started


if __name__ == "__main__":
    main()
