"""What single-layer timings say of the whole model, against what was measured: python predict.py.
Needs pandas, no GPU.

Reads the table of studies/gpu_linears and the rows that whole_model.py measured.
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


FUSED = {
    (6144, 4096): 1,
    (4096, 4096): 1,
    (28672, 4096): 1,
    (4096, 14336): 1,
}  # q + k + v, o, gate + up, down


def request_ms(
    latency_us: pd.Series, per_layer: dict[tuple[int, int], int] = PER_LAYER
) -> tuple[float, float]:
    """Milliseconds of a decode step's linears, and of a request's, the head among them."""
    sums, head_ms = model_ms(latency_us, per_layer), latency_us[HEAD] / 1e3
    return sums["decode"] + head_ms, sums["request"] + (1 + STEPS) * head_ms


def measured(name: str, label: str) -> dict[str, float]:
    """The row of `label` in a file of results."""
    rows = map(json.loads, (HERE / "results" / name).read_text().splitlines())
    return next(row for row in rows if row["label"] == label)


def main() -> None:
    """Print the predictions, and the memory's limit."""
    tables = [LINEARS / "results" / "table.csv", HERE / "results" / "gate_up.csv"]
    table = pd.concat([pd.read_csv(path) for path in tables], ignore_index=True)
    table["candidate"] = table.format + "/" + table.kernel
    plain_step, plain = request_ms(unquantized(table))
    float8 = fastest(table[table.format == "float8-row/plain"], CELL).latency_us
    apart, fused = (
        measured("rows-1.jsonl", "8 bits"),
        measured("rows-1-fused.jsonl", "8 bits, fused"),
    )
    apart_too = measured("rows-1-fused.jsonl", "8 bits")
    tiled = measured("rows-1-tiled.jsonl", "any bits, fused")
    steps = {}
    print(f"linears of bf16: {plain:.0f} ms a request, {plain_step:.2f} a step")
    for name, row, per_layer in (
        ("8 bits", apart, PER_LAYER),
        ("8 bits, another machine", apart_too, PER_LAYER),
        ("8 bits, fused", fused, FUSED),
    ):
        steps[name], linears = request_ms(float8, per_layer)
        before = row["bf16_request_ms"]
        predicted = before - plain + linears
        print(
            f"{name}: linears {linears:.0f} ms a request, {steps[name]:.2f} a step; predicted "
            "request "
            f"{before:.0f} - {plain:.0f} + {linears:.0f} = {predicted:.0f} ms; measured "
            f"{row['request_ms']:.0f} "
            f"({predicted / row['request_ms'] - 1:+.1%})"
        )
    weights = LAYERS * sum(count * n * k for (n, k), count in PER_LAYER.items()) + HEAD[0] * HEAD[1]
    for name, width, linears_ms, step_ms in (
        ("4 bits, fused", 0.5 + 4 / 128, tiled["linear_decode_ms"], tiled["decode_ms"]),
        ("8 bits, fused", 1, steps["8 bits, fused"], fused["decode_ms"]),
        ("8 bits", 1, steps["8 bits"], apart["decode_ms"]),
        ("bf16", 2, plain_step, apart["bf16_decode_ms"]),
    ):
        limit_ms = width * weights / BANDWIDTH_BYTES_PER_S * 1e3
        print(
            f"{name}: a token's weights need {limit_ms:.2f} ms; linears "
            f"{linears_ms / limit_ms:.2f} times, "
            f"step {step_ms / limit_ms:.2f} times that"
        )


if __name__ == "__main__":
    main()
