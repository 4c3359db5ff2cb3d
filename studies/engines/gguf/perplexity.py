"""Perplexity of GGUF files by llama.cpp's own tool, beside their sizes, as a table.

    python studies/engines/gguf/perplexity.py TOOLS TEXT CONTEXT CHUNKS NAME=FILE.gguf ...

TOOLS is the folder of `llama-perplexity`. Of each chunk of CONTEXT tokens the second half is
scored, and the text has a few more. The first file is what the others are compared with.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MORE = 3


def main(tools: str, text: str, context: str, chunks: str, *named: str) -> None:
    print("| | file | bits a parameter | perplexity | to the first |")
    print("| --- | --- | --- | --- | --- |")
    first, parameters = 0.0, 0.0
    for pair in named:
        name, _, path = pair.partition("=")
        size = Path(path).stat().st_size
        found = perplexity([f"{tools}/llama-perplexity", "-m", path, "-f", text], context, chunks)
        first, parameters = first or found, parameters or size / 2
        share = 100 * (found / first - 1)
        bits = 8 * size / parameters
        print(
            f"| {name} | {size / 2**20:.1f} MiB | {bits:.2f} | {found:.4f} | {share:+.2f} % |",
            flush=True,
        )


def perplexity(command: list[str], context: str, chunks: str) -> float:
    """Return the running estimate after so many chunks.

    The tool ends before its last lines are out if the machine is busy, so it is given more chunks.
    """
    more = str(int(chunks) + MORE)
    options = ["-c", context, "-b", context, "--chunks", more, "-t", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    if found := re.findall(rf"\[{chunks}\]([\d.]+)", done.stdout + done.stderr):
        return float(found[0])
    raise RuntimeError(f"{command[0]} printed no estimate after {chunks} chunks")


if __name__ == "__main__":
    main(*sys.argv[1:])
