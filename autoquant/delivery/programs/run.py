"""Run the programs of this folder. They need PyTorch; text also needs transformers.

From Python: `Programs(folder)` calls the program for the size of its inputs. From a shell:
`python run.py --prompt TEXT`, if the folder holds a language model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
_PROMPT = "The most important thing about a good book is"
_CPU_INFO = Path("/proc/cpuinfo")
_FEWEST_PLACES = 16


class Programs:
    """The programs of a folder.

    Attributes:
        about: What `program.json` says.
    """

    def __init__(self, folder: Path = HERE) -> None:
        self.about: dict[str, Any] = json.loads((folder / "program.json").read_text())
        check_machine(self.about)
        if self.about["library"]:
            torch.ops.load_library(str(folder / self.about["library"]))  # type: ignore[no-untyped-call, unused-ignore]
        read = _read_compiled if self.about["target"] == "aoti" else _read_exported
        self._programs = read(folder, self.about)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program for the size of these inputs."""
        inputs = (*args, *(kwargs[name] for name in self.about["names"]))
        size = self._size(*inputs)
        for program in self.about["programs"]:
            if program["least"] <= size <= (program["most"] or size):
                with torch.no_grad():
                    return self._programs[program["name"]](*inputs)
        raise ValueError(f"no program takes {size} {self.about['unit']}: see program.json")

    def new_cache(self, places: int) -> list[torch.Tensor]:
        """Return the empty cache of a language model, with so many places, and at least 16."""
        dtype, device = getattr(torch, self.about["dtype"]), self.about["device"]
        places = max(places, _FEWEST_PLACES)
        return [
            torch.zeros(self.about["batch"], heads, places, width, dtype=dtype, device=device)
            for heads, width in self.about["cache"]
        ]

    def step(self, ids: torch.Tensor, filled: int, cache: list[torch.Tensor]) -> torch.Tensor:
        """Return logits `[batch, vocabulary]` after the last of ids `[batch, tokens]`.

        Args:
            filled: How many places of the cache are filled. The tokens come behind them.
        """
        device = self.about["device"]
        start = torch.tensor(filled, device=device)
        logits: torch.Tensor = self(ids.to(device), start, *cache)
        return logits

    def generate(self, ids: torch.Tensor, most: int) -> Iterator[int]:
        """Yield the likeliest tokens after a prompt `[1, tokens]`, until one ends the text."""
        tokens, batch = ids.shape[1], self.about["batch"]
        longest = self.about["programs"][-1]["most"]
        if longest and tokens + most > longest:
            raise ValueError(
                f"the prompt has {tokens} tokens, and with {most} new ones there are more than"
                f" {longest}: shorten it, or ask for fewer"
            )
        cache = self.new_cache(tokens + most)
        logits = self.step(ids.expand(batch, -1), 0, cache)
        for number in range(most):
            following = logits.argmax(-1, keepdim=True)
            token = int(following[0])
            yield token
            if token in self.about["ends"]:
                return
            if number + 1 < most:
                logits = self.step(following, tokens + number, cache)

    def _size(self, *inputs: Any) -> int:
        if self.about["dimension"] is None:
            return int(self.about["programs"][0]["least"])
        dimension: int = self.about["dimension"]
        for leaf in torch.utils._pytree.tree_leaves(inputs):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > dimension:
                return leaf.shape[dimension]
        return 1


def check_machine(about: dict[str, Any]) -> None:
    """Refuse a machine that the programs were not made for, and get it ready.

    Raises:
        ValueError: It lacks instructions, or this process has imported autoquant.
    """
    # Defining operators twice would end the process.
    if about["library"] and sys.modules.get("autoquant") is not None:
        raise ValueError(
            "this process has imported autoquant, which has the operators of this folder's library:"
            " run the programs in a process of their own"
        )
    if torch.__version__.partition("+")[0] != about["torch"]:
        sys.stderr.write(
            f"note: made with PyTorch {about['torch']}, and this is {torch.__version__}\n"
        )
    wanted, here = set(about["instructions"]), _instructions()
    if here and (lacking := sorted(wanted - here)):
        raise ValueError(
            f"this CPU lacks instructions that the programs use ({', '.join(lacking[:5])}): export"
            " the plan again on a machine like this one"
        )
    if "amx_bf16" in here and about["library"]:
        torch.cpu._init_amx()  # the system gives matrix instructions to those who ask


def _instructions() -> set[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    found = [line for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0].partition(":")[2].split()) if found else set()


def _read_compiled(folder: Path, about: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Read programs of machine code, and give all of them the same weights."""
    from torch.export.pt2_archive._package import load_pt2

    weights = torch.load(folder / "weights.pt", mmap=True, weights_only=True)
    programs = load_pt2(str(folder / "model.pt2")).aoti_runners
    for name, program in programs.items():
        wanted = program.get_constant_fqns()
        program.load_constants(
            {key: weights.get(f"{name}/{key}", weights.get(key)) for key in wanted},
            check_full_update=True,
            user_managed=True,
        )
        # A program points at weights that it does not own.
        program.weights = weights  # type: ignore[attr-defined]
    return dict(programs)


def _read_exported(folder: Path, about: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Read programs of PyTorch's operators."""
    return {
        each["name"]: torch.export.load(folder / f"{each['name']}.pt2").module()
        for each in about["programs"]
    }


def main() -> None:
    """Continue a text, and say how fast it came."""
    parser = argparse.ArgumentParser(description="Continue a text with the model of this folder.")
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    asked = parser.parse_args()
    if asked.max_new_tokens < 1:
        parser.error("--max-new-tokens must be at least 1")
    try:
        programs = Programs()
        if not programs.about["cache"]:
            raise ValueError(f"this is no language model with a cache: import Programs of {HERE}")
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError("text needs the package transformers: pip install it") from None
        tokenizer = AutoTokenizer.from_pretrained(HERE)
        ids = tokenizer(asked.prompt, return_tensors="pt").input_ids
        for _ in programs.generate(ids, min(8, asked.max_new_tokens)):
            pass  # the first steps of a process read the weights
        times, tokens, shown = [time.perf_counter()], [], ""
        sys.stdout.write(asked.prompt)
        for token in programs.generate(ids, asked.max_new_tokens):
            times.append(time.perf_counter())
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    pace = (len(tokens) - 1) / (times[-1] - times[1]) if len(tokens) > 1 else 0.0
    sys.stdout.write(
        f"\n\n{ids.shape[1]} tokens read, {len(tokens)} written: first token after"
        f" {times[1] - times[0]:.3g} s, then {pace:.3g} tokens/s\n"
    )


if __name__ == "__main__":
    main()
