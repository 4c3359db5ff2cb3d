"""How many windows of a text the shares of `path` need.

    python studies/sensitivity/windows.py MODEL

Computes each layer's share on single windows: those of the calibration part, which a search scores
by, and 24 others, whose mean stands for the text. Random choices of 2, 4, 6 and 8 calibration
windows are compared with that mean: the sum of the shares, how they correlate, and the mean
difference of a share where all are scaled to the same sum.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from autoquant.candidates import A16, get_format
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import Change
from autoquant.evaluators.sensitivity.gradients import scoring_products
from autoquant.evaluators.sensitivity.path import path_shares
from autoquant.evaluators.sensitivity.together import CalibrationModel, dtypes_of
from autoquant.evaluators.text import DEFAULT_TEXT, PARTS, TextParts, read_text
from autoquant.events import ignore
from autoquant.models import ModelRequest, load_request
from autoquant.profiler.record import record_model
from autoquant.records import Workload

FORMATS = ("int4-g32/lanes", "int8-row/plain")
WINDOWS = {"calibration": 8, "selection": 12, "report": 12}
CHOICES = 200


def main() -> None:
    loaded = load_request(ModelRequest(model=sys.argv[1], device="cpu"))
    parts = read_text(DEFAULT_TEXT, loaded.tokenizer, windows=WINDOWS).windows
    every = torch.cat([parts["calibration"], parts["selection"], parts["report"]])
    sites = record_model(loaded, Workload.parse("prefill=64,decode=2"), ignore).sites
    for format_id in FORMATS:
        changes = [Change(site, format_id, get_format(format_id), A16) for site in sites]
        dtypes = dtypes_of(loaded.module, changes)
        rows = []
        with torch.no_grad(), in_float32(loaded.module), scoring_products(loaded.module):
            for window in every.split(1):
                quality = TextQuality(TextParts(dict.fromkeys(PARTS, window)), "cpu")
                model = CalibrationModel(loaded.module, quality)
                rows.append(list(path_shares(model, model.sites(changes, dtypes)).values()))
        print(f"{format_id}: windows, sum by the text's (spread), correlation, difference")
        for line in summary(np.array(rows)):
            print(line, flush=True)


def summary(shares: NDArray[np.float64]) -> Iterator[str]:
    """Yield a line for each number of windows, from shares `[windows, layers]`."""
    text = shares[WINDOWS["calibration"] :].mean(0)
    generator = np.random.default_rng(0)
    for count in (2, 4, 6, 8):
        found = []
        for _ in range(CHOICES):
            chosen = generator.choice(WINDOWS["calibration"], count, replace=False)
            mean = shares[chosen].mean(0)
            scaled = mean / mean.sum() * text.sum()
            difference = np.abs(scaled - text).sum() / text.sum()
            found.append((mean.sum() / text.sum(), np.corrcoef(mean, text)[0, 1], difference))
        ratio, correlation, difference = np.mean(found, axis=0)
        spread = np.std([each[0] for each in found])
        yield f"  {count}  {ratio:.3f} ({spread:.3f})  {correlation:.5f}  {difference:.3f}"


if __name__ == "__main__":
    main()
