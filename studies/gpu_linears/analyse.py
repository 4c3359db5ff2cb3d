"""What run.sh measured, as tables: python analyse.py OUT. Needs pandas, no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

LAYERS = 32
PER_LAYER = {
    (4096, 4096): 2,
    (1024, 4096): 2,
    (14336, 4096): 2,
    (4096, 14336): 1,
}  # q and o, k and v, gate and up, down
PREFILLS, STEPS = 1, 256
CELL = ["n", "k", "m"]


def read(out: Path, name: str) -> pd.DataFrame:
    """A run's rows."""
    frame = pd.read_csv(out / f"{name}.csv")
    frame["candidate"] = frame.format + "/" + frame.kernel
    return frame


def fastest(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The fastest candidate of each group."""
    timed = frame[frame.outcome == "ok"]
    return timed.loc[timed.groupby(by).latency_us.idxmin()].set_index(by)


def unquantized(frame: pd.DataFrame) -> pd.Series:
    return frame[frame.candidate == "bfloat16/plain/matmul"].set_index(CELL).latency_us


def print_table(table: pd.DataFrame, picked: pd.DataFrame | None) -> None:
    """Every cell: unquantized, what autoquant picks for it, and the pick's time against the best of
    another run.
    """
    best, plain = fastest(table, CELL), unquantized(table)
    print(
        "| shape | m | bf16 us | picked | us | over floor | times faster | pick in another run, "
        "over its best |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell, row in best.iterrows():
        again = ""
        if picked is not None:
            there = picked[(picked[CELL] == list(cell)).all(axis=1) & (picked.outcome == "ok")]
            own = there[there.candidate == row.candidate].latency_us
            again = (
                f"{own.iloc[0] / there.latency_us.min():.3f}"
                if len(own)
                else ""
                if there.empty
                else "not timed"
            )
        n, k, m = cell
        print(
            f"| {n}x{k} | {m} | {plain[cell]:.1f} | {row.candidate} | {row.latency_us:.1f} "
            f"| {row.latency_us / row.floor_us:.2f} | {plain[cell] / row.latency_us:.2f} | "
            f"{again} |"
        )


def print_routes(table: pd.DataFrame) -> None:
    """One stored weight for all m.

    The fastest kernel of each format over m, against unquantized.
    """
    plain = unquantized(table)
    best = fastest(table, ["format", *CELL])
    ratios = best.assign(
        ratio=[plain[cell[1:]] / row.latency_us for cell, row in best.iterrows()]
    ).ratio
    means = (
        ratios.groupby(level=["format", "m"]).apply(lambda r: r.prod() ** (1 / len(r))).unstack("m")
    )
    print(
        means.round(2).to_markdown()
        if hasattr(means, "to_markdown") and _has_tabulate()
        else means.round(2)
    )


def _has_tabulate() -> bool:
    try:
        import tabulate  # noqa: F401
    except ImportError:
        return False
    return True


def print_repeatability(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Per format and cell, and per cell.

    Does the other run pick the same kernel, or one as fast?
    """
    for what, by in (("kernel of a format", ["format", *CELL]), ("candidate of a cell", CELL)):
        a, b = fastest(first, by), fastest(second, by)
        common = a.index.intersection(b.index)
        a, b = a.loc[common], b.loc[common]
        same = a.candidate == b.candidate
        close = (a.latency_us / b.latency_us - 1).abs() < 0.03
        print(
            f"{what}: {len(common)} cells, the same in {same.mean():.1%}; the same or within 3 % "
            f"in {(same | close).mean():.1%}"
        )
        for cell in common[~(same | close)]:
            one, two = a.loc[cell], b.loc[cell]
            print(
                f"  {cell}: {one.candidate} {one.latency_us:.2f} us, then {two.candidate} "
                f"{two.latency_us:.2f} us"
            )
    both = first[first.outcome == "ok"].merge(
        second[second.outcome == "ok"], on=[*CELL, "candidate"]
    )
    ratio = (both.latency_us_y / both.latency_us_x).sort_values()
    quantiles = ", ".join(f"{q:.0%} {ratio.quantile(q):.3f}" for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    print(f"second over first run, {len(both)} candidates timed in both: {quantiles}")
    spread = (first.spread_us / first.latency_us).median()
    print(f"spread within a comparison (interquartile range over median): median {spread:.2%}")


def model_ms(
    latency_us: pd.Series, per_layer: dict[tuple[int, int], int] = PER_LAYER
) -> dict[str, float]:
    """Milliseconds of the linears of 32 layers in a prefill of 2,048 tokens, a decode step, and a
    request.
    """
    sums = {
        m: sum(count * latency_us[n, k, m] for (n, k), count in per_layer.items()) * LAYERS / 1e3
        for m in (1, 2048)
    }
    return {
        "prefill": sums[2048],
        "decode": sums[1],
        "request": PREFILLS * sums[2048] + STEPS * sums[1],
    }


def print_float8(table: pd.DataFrame, uniform: pd.DataFrame) -> None:
    """One float8 weight routed by m against torchao's uniform settings, on the sum of linears."""
    sums = {"bf16": model_ms(unquantized(table))}
    for name, rows in uniform.groupby("config"):
        sums[f"torchao float8 {name}"] = model_ms(rows.set_index(CELL).latency_us)
    for fmt in ("float8-row/plain", "float8-tensor/plain", "int8-row/plain"):
        sums[f"{fmt}, routed by m"] = model_ms(fastest(table[table.format == fmt], CELL).latency_us)
    frame = pd.DataFrame(sums).T.round(2)
    print(frame.to_string())
    best = min(ms["request"] for name, ms in sums.items() if name.startswith("torchao"))
    routed = sums["float8-row/plain, routed by m"]["request"]
    print(f"routed float8 rows are {best / routed:.2f} times faster than the best uniform setting")


def main() -> None:
    """Print everything there is."""
    out = Path(sys.argv[1])
    runs = {
        name: read(out, name)
        for name in ("cold1", "warm", "cold2", "table")
        if (out / f"{name}.csv").exists()
    }
    if (out / "seconds.txt").exists():
        print((out / "seconds.txt").read_text())
    for name, frame in runs.items():
        print(name, len(frame), "candidates at cells:", frame.outcome.value_counts().to_dict())
    if "table" in runs:
        print("\n# Every cell\n")
        print_table(runs["table"], runs.get("cold2", runs.get("warm")))
        print(
            "\n# Times faster than bf16 by format, each with its fastest kernel at every m "
            "(geometric mean over shapes)\n"
        )
        print_routes(runs["table"])
    if {"cold1", "cold2"} <= runs.keys():
        print("\n# Two cold runs\n")
        print_repeatability(runs["cold1"], runs["cold2"])
    if "table" in runs and (out / "uniform.csv").exists():
        print("\n# Float8: sum of linears, ms\n")
        print_float8(runs["table"], pd.read_csv(out / "uniform.csv"))


if __name__ == "__main__":
    main()
