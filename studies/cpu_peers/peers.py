"""Time one model in llama.cpp, OpenVINO GenAI and autoquant, in turn on one machine.

    python studies/cpu_peers/peers.py --python PEERS/bin/python \
        --llama.cpp Q8.gguf Q4.gguf --openvino Q8.gguf --autoquant ORIGINAL QUANTIZED

PEERS is an environment with `xllamacpp` and `openvino-genai`. Each model stays loaded in a process
of its own (`worker.py`). A round is one request to each, and the models take turns at being first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

WORKER = Path(__file__).parent / "worker.py"
ENGINES = ("llama.cpp", "openvino", "autoquant")


class Peer:
    """A model in an engine."""

    def __init__(self, engine: str, model: str, options: argparse.Namespace) -> None:
        self.name = f"{engine} {Path(model).name}"
        python = sys.executable if engine == "autoquant" else options.python
        sizes = [str(options.prompt), str(options.new)]
        command = [python, str(WORKER), engine, model, *sizes]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.times: list[list[float]] = []

    def request(self, seed: int) -> list[float]:
        """Return the milliseconds of the first token, of each further one, and of all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                found: list[float] = json.loads(line.removeprefix("RESULT "))
                return found
        raise SystemExit(f"{self.name} ended without an answer")

    def close(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for engine in ENGINES:
        parser.add_argument(f"--{engine}", nargs="*", default=[], dest=engine)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    options = parser.parse_args()
    models = [(engine, model) for engine in ENGINES for model in vars(options)[engine]]
    peers = [Peer(engine, model, options) for engine, model in models]
    try:
        for peer in peers:  # loads, compiles and warms up
            peer.request(0)
        for number in range(options.rounds):
            turn = number % len(peers)
            for peer in peers[turn:] + peers[:turn]:
                peer.times.append(peer.request(1 + number))
    finally:
        for peer in peers:
            peer.close()
    print(f"{options.prompt} + {options.new} tokens, medians of {options.rounds} rounds in turn")
    print("| model | first token ms | a token ms | request s | least, most s |")
    print("| --- | --- | --- | --- | --- |")
    for peer in peers:
        first, step, whole = map(list, zip(*peer.times, strict=True))
        ends = f"{min(whole) / 1e3:.2f}, {max(whole) / 1e3:.2f}"
        medians = f"{median(first):.0f} | {median(step):.1f} | {median(whole) / 1e3:.2f}"
        print(f"| {peer.name} | {medians} | {ends} |")


if __name__ == "__main__":
    main()
