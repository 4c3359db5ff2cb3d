"""What single-layer timings say of the whole model, against what was measured: python predict.py. Needs pandas, no GPU.

Reads the table of studies/gpu_linears and the first row that whole_model.py measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
LINEARS = HERE.parent / "gpu_linears"
sys.path.insert(0, str(LINEARS))

import pandas as pd  # noqa: E402
from analyse import CELL, LAYERS, PER_LAYER, STEPS, fastest, model_ms, unquantized  # noqa: E402

HEAD = (128256, 4096, 1)  # once in the prompt, once in each step
BANDWIDTH_BYTES_PER_S = 4.15e12  # the rooflines of the linears' study: 4.13 to 4.16


def request_ms(latency_us: pd.Series) -> tuple[float, float]:
    """Milliseconds of a decode step's linears, and of a request's, the head among them."""
    sums, head_ms = model_ms(latency_us), latency_us[HEAD] / 1e3
    return sums["decode"] + head_ms, sums["request"] + (1 + STEPS) * head_ms


def main() -> None:
    """Print the prediction, and the memory's limit."""
    table = pd.read_csv(LINEARS / "results" / "table.csv")
    table["candidate"] = table.format + "/" + table.kernel
    measured = json.loads((HERE / "results" / "rows-1.jsonl").read_text().splitlines()[0])
    plain_step, plain = request_ms(unquantized(table))
    step, request = request_ms(fastest(table[table.format == "float8-row/plain"], CELL).latency_us)
    before, after = measured["bf16_request_ms"], measured["request_ms"]
    print(
        f"linears of a request: bf16 {plain:.0f} ms, float8 rows {request:.0f} ms; of a step: {plain_step:.2f}, {step:.2f}"
    )
    print(
        f"predicted request: {before:.0f} - {plain:.0f} + {request:.0f} = "
        f"{before - plain + request:.0f} ms; measured {after:.0f} ms"
    )
    weights = LAYERS * sum(count * n * k for (n, k), count in PER_LAYER.items()) + HEAD[0] * HEAD[1]
    for name, width, linears_ms, step_ms in (
        ("8 bits", 1, step, measured["decode_ms"]),
        ("bf16", 2, plain_step, measured["bf16_decode_ms"]),
    ):
        limit_ms = width * weights / BANDWIDTH_BYTES_PER_S * 1e3
        print(
            f"{name}: a token's weights need {limit_ms:.2f} ms; linears {linears_ms / limit_ms:.2f} times, "
            f"step {step_ms / limit_ms:.2f} times that"
        )


if __name__ == "__main__":
    main()
