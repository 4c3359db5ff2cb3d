"""Plans that put every format, kernel and route into a tiny language model.

Also a program that runs saved ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from end_to_end.tiny import make_tokenizer

import autoquant
from autoquant.candidates import Format, get_format, known_formats
from autoquant.candidates.kernels.caches import untuned
from autoquant.candidates.routed import RoutedWeight
from autoquant.models.content import content_hash, module_architecture
from autoquant.records import LayerChoice, LinearShape, Plan, Prediction, Route, RouteStep

VOCABULARY = 128
ROWS = (1, 16, 44)
NEW_TOKENS = 4
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SHAPE = LinearShape(n=256, k=256, bias=False, dtype="bfloat16")


@dataclass(frozen=True)
class Case:
    """Formats that the layers of a model get in turn.

    Attributes:
        joined: Siblings get one of them together, and are stored behind one another.
        tuned: They are computed by the kernels that libraries tune, not by the others.
    """

    name: str
    formats: tuple[str, ...]
    joined: bool = False
    tuned: bool = False

    def unsupported(self, device: str) -> str:
        """Why the case cannot be run on this device; empty where it can."""
        return next(
            filter(
                None, (_unsupported(get_format(name), device, self.tuned) for name in self.formats)
            ),
            "",
        )


def cases(device: str, leave_out: frozenset[str] = frozenset()) -> list[Case]:
    """Every format alone, joined where it can be, and plans of many formats."""
    every = [fmt for fmt in known_formats().values() if fmt.id not in leave_out]
    joining = [fmt for fmt in every if fmt.joins]
    tuned = [fmt for fmt in every if any(kernel.tuned for kernel in fmt.kernels)]
    mixed = [fmt.id for fmt in every if not _unsupported(fmt, device, tuned=False)]
    return [
        *(Case(fmt.id, (fmt.id,)) for fmt in every),
        *(Case(f"{fmt.id} joined", (fmt.id,), joined=True) for fmt in joining),
        *(Case(f"{fmt.id} tuned", (fmt.id,), tuned=True) for fmt in tuned),
        *(Case(f"mixed {start}", tuple(mixed[start::3])) for start in range(3)),
        Case("mixed joined", tuple(fmt.id for fmt in joining if fmt.id in mixed), joined=True),
    ]


def routes(fmt: Format, device: str, *, tuned: bool = False) -> list[Route]:
    """Each usable kernel for any number of rows, and a route of two."""
    few, many = (
        [
            k.id
            for k in fmt.kernels
            if k.tuned == tuned and not fmt.unsupported_reason(k, SHAPE, rows, device)
        ]
        for rows in (min(ROWS), max(ROWS))
    )
    alone = [(RouteStep(upper_m=None, kernel=kernel),) for kernel in dict.fromkeys((*few, *many))]
    if not few or not many or few[0] == many[-1]:
        return alone
    return [*alone, (RouteStep(upper_m=8, kernel=few[0]), RouteStep(upper_m=None, kernel=many[-1]))]


def _unsupported(fmt: Format, device: str, tuned: bool) -> str:
    if routes(fmt, device, tuned=tuned):
        return ""
    kernels = [kernel for kernel in fmt.kernels if kernel.tuned == tuned]
    return (
        fmt.unsupported_reason(kernels[0], SHAPE, max(ROWS), device) or ""
        if kernels
        else "it has no such kernel"
    )


def is_tuned(module: torch.nn.Module) -> bool:
    """Whether libraries tune a kernel that the model uses, so that another process may use another
    one of theirs.
    """
    weights = [
        parameter.data
        for parameter in module.parameters()
        if isinstance(parameter.data, RoutedWeight)
    ]
    return any(
        get_format(w.format_id).kernel(step.kernel).tuned for w in weights for step in w.steps()
    )


def make_plan(module: torch.nn.Module, case: Case, device: str) -> Plan:
    """The case as a plan for all linears of a Llama."""
    names = [name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)]
    turns = {}
    for name in names:
        group = next(
            (group for group in SIBLINGS if case.joined and name.rpartition(".")[2] in group), None
        )
        key = tuple(f"{name.rpartition('.')[0]}.{leaf}" for leaf in group) if group else (name,)
        turns.setdefault(key, len(turns))
    layers = tuple(
        _layer(module, name, turn, case, device, key if len(key) > 1 else ())
        for key, turn in turns.items()
        for name in key
    )
    return Plan(
        plan_id="plan",
        study_id="study",
        label=case.name,
        kind="front",
        model_hash=content_hash(module.state_dict().items(), module_architecture(module)),
        dtype=SHAPE.dtype,
        layers=layers,
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )


def _layer(
    module: torch.nn.Module, name: str, turn: int, case: Case, device: str, joined: tuple[str, ...]
) -> LayerChoice:
    fmt = get_format(case.formats[turn % len(case.formats)])
    ways = routes(fmt, device, tuned=case.tuned)
    n, k = module.get_parameter(f"{name}.weight").shape
    return LayerChoice(
        name=name,
        shape=LinearShape(n=n, k=k, bias=False, dtype=SHAPE.dtype),
        format=fmt.id,
        route=ways[turn % len(ways)],
        numerics="",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
        parameters=(f"{name}.weight",),
        joined=joined,
    )


def save_llama(folder: Path) -> None:
    """Save a Llama whose linears fit every kernel, its head tied to the embedding, with a
    tokenizer.
    """
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_llama() -> torch.nn.Module:
    """What `save_llama` saves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def outputs(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Logits for prompts of several lengths, and the tokens that are generated after one."""
    device = next(module.parameters()).device
    prompts = [(7 * torch.arange(rows, device=device) % VOCABULARY).unsqueeze(0) for rows in ROWS]
    found = {f"logits of {ids.shape[1]}": module(ids).logits for ids in prompts}
    mask = torch.ones_like(prompts[-1])
    found["tokens"] = module.generate(  # compiling steps for each format would take minutes
        prompts[-1],
        attention_mask=mask,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        disable_compile=True,
    )
    return {name: tensor.cpu() for name, tensor in found.items()}


@contextmanager
def ready(device: str) -> Iterator[None]:
    """Inside, what is computed does not depend on the process.

    One thread, and libraries tune next to nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if device == "cpu":
            yield
        else:
            with untuned():
                yield
    finally:
        torch.set_num_threads(threads)


def outputs_elsewhere(
    folders: list[Path], device: str, out: Path
) -> dict[str, dict[str, torch.Tensor]]:
    """By the folders' names: what a new process that loads them there computes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__, device, *map(str, folders), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return torch.load(out, weights_only=True)


if __name__ == "__main__":
    device, *places, out = sys.argv[1:]
    with ready(device):
        torch.save(
            {Path(place).name: outputs(autoquant.load(place, device=device)) for place in places},
            out,
        )
