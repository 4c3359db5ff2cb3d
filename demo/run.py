"""Search a small language model, show the front, apply the recommended plan and time it.

Run by `make demo`; everything it writes goes to `out/demo/`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from corpus import text_of

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "demo"
TEXT_CHARACTERS = 120_000
WORKLOAD = "prefill=128,decode=128"


def main() -> None:
    """Run every step as a user would type it."""
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    text = OUT / "held-out.txt"
    text.write_text(text_of("held-out", TEXT_CHARACTERS), encoding="utf-8")
    database, model = OUT / "plan.db", HERE / "model"
    autoquant(
        "search", model, "--eval-text", text, "--db", database, "--workload", WORKLOAD,
        "--max-ppl-increase", "1%", "--time-budget", "3m",
        "--candidates", "int8*",
    )  # fmt: skip
    autoquant("pareto", database, "--plot", OUT / "front.png")
    autoquant("apply", database, "--out", OUT / "model-quantized")
    show_command("python", "demo/compare.py", OUT / "model-quantized")
    subprocess.run([sys.executable, HERE / "compare.py", OUT / "model-quantized"], check=True)
    print(f"\nThe picture of the front: {relative(OUT / 'front.png')}")
    print(f"The quantized model:      {relative(OUT / 'model-quantized')}")
    print(f"Everything took {time.monotonic() - started:.0f} s.")


def autoquant(*arguments: str | Path) -> None:
    """Run one autoquant command, showing it first."""
    show_command("autoquant", *arguments)
    subprocess.run([sys.executable, "-m", "autoquant", *map(str, arguments)], check=True)


def show_command(*words: str | Path) -> None:
    """Print a command as one would type it in the repository."""
    print(
        "\n$", *(relative(word) if isinstance(word, Path) else word for word in words), flush=True
    )


def relative(path: Path) -> Path:
    """`path` as seen from the repository."""
    return path.relative_to(HERE.parent)


if __name__ == "__main__":
    main()
