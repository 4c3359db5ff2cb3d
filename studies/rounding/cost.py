"""What it costs a search to try one more rounding: seconds for the inputs, for rounding, and for
scoring beside those of nearest.

    python studies/rounding/cost.py MODEL TEXT

The text is split as a search splits it; scoring is the `isolated` sensitivity of every linear but
the output layer.
"""

from __future__ import annotations

import sys
import time

import torch

from autoquant.candidates import A16, get_format
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.sensitivity import SENSITIVITIES, Change
from autoquant.evaluators.text import read_text
from autoquant.models import load_model
from autoquant.profiler.record import record
from autoquant.records import Workload
from autoquant.runtime.phases import make_phases

NEAREST, GPTQ = get_format("int4-g64/cpu-packed"), get_format("int4-g64-gptq/cpu-packed")


def main() -> None:
    torch.set_grad_enabled(False)
    loaded = load_model(sys.argv[1])
    parts = read_text(
        sys.argv[2], loaded.tokenizer, max_positions=loaded.max_positions, inputs=True
    )
    phases = make_phases(loaded, Workload.parse("prefill=8"))
    sites = [site for site in record(loaded.module, phases).sites if site.name != "lm_head"]
    names = [site.parameters[0] for site in sites]
    calibration = Calibration(parts.inputs)
    began = time.monotonic()
    inputs = dict(calibration.inputs(loaded.module, names))
    print(
        f"inputs of {len(inputs)} layers on {len(parts.inputs)} windows: "
        f"{time.monotonic() - began:.1f} s",
        flush=True,
    )
    began = time.monotonic()
    for name in names:
        GPTQ.store(loaded.module.get_parameter(name), inputs[name])
    print(f"rounding by GPTQ: {time.monotonic() - began:.1f} s", flush=True)
    changes = [Change(site, NEAREST.values, NEAREST, A16) for site in sites]
    began = time.monotonic()
    quality = TextQuality(parts, "cpu")
    SENSITIVITIES["isolated"].score(loaded.module, changes, quality, lambda _name, _losses: None)
    print(f"isolated scores of one format: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
