"""Writes the files beside this one that the golden tests read: models, databases, a checkpoint and
names.

They stand for what users have on their disks, so they are written once and kept. For a new format
version, run `PYTHONPATH=tests python -m golden.write FOLDER` and add what it writes to the old
files.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end import quick
from end_to_end.test_interrupted import InterruptAt
from end_to_end.tiny import POSITIONS, WORDS, make_tokenizer, save_llama, save_text

import autoquant
from autoquant.candidates import get_format, known_formats
from autoquant.delivery import checkpoint
from autoquant.devices.cpu import CpuBackend
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.records import Device, LayerChoice, LinearShape, Plan, Prediction, RouteStep

DEVICE = Device(
    type="cpu",
    name="A CPU of 2026 (6/85/7)",
    capability="AVX2",
    threads=1,
    cache_bytes=33554432,
    versions={"torch": "2.13.0+cpu", "torchao": "0.18.0", "compiler": "none"},
)
CANDIDATES = ("int8-row/plain/int8pack-mm", "int8-row/plain/int-mm", "float16/plain/*")
LAYERS = {  # of a block; each by a kernel that runs on any CPU
    "self_attn.q_proj": ("int8-row/plain", "dequantize-matmul"),
    "self_attn.k_proj": ("int8-row/plain", "dequantize-matmul"),
    "self_attn.v_proj": ("int8-row/plain", "dequantize-matmul"),
    "self_attn.o_proj": ("float8-row/plain", "dequantize-matmul"),
    "mlp.gate_proj": ("int4-g32/gemlite", "dequantize-matmul"),
    "mlp.up_proj": ("int4-g64/tiled", "unpack-matmul"),
    "mlp.down_proj": ("int3-g32/bit-planes", "dequantize-matmul"),
}
JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BLOCK = "model.layers.0"


def on_this_device(patch: pytest.MonkeyPatch) -> None:
    """Let searches believe that they run on `DEVICE`."""
    patch.setattr(CpuBackend, "fingerprint", lambda _backend: DEVICE)


def search(folder: Path, db: Path, **options: Any) -> Any:
    """The search whose database is kept, of the model and the text in `folder`."""
    return quick.search(folder / "model", folder / "text.txt", db, candidates=CANDIDATES, **options)


def make_llama() -> torch.nn.Module:
    """The language model of the checkpoint, whose linears fit every format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS + 2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def make_plan(module: torch.nn.Module) -> Plan:
    """The plan of the checkpoint."""
    return Plan(
        plan_id="c0ffee00",
        study_id="5tudy000",
        label="golden",
        kind="front",
        model_hash="0123456789abcdef",
        dtype="bfloat16",
        layers=tuple(_layer(module, name, *candidate) for name, candidate in LAYERS.items()),
        prediction=Prediction(request_ms=0, linear_ms=0, loss=0, memory_bytes=0),
    )


def _layer(module: torch.nn.Module, leaf: str, format_id: str, kernel: str) -> LayerChoice:
    name = f"{BLOCK}.{leaf}"
    n, k = module.get_parameter(f"{name}.weight").shape
    return LayerChoice(
        name=name,
        shape=LinearShape(n=n, k=k, bias=False, dtype="bfloat16"),
        format=format_id,
        route=(RouteStep(upper_m=None, kernel=kernel),),
        numerics="",
        latency_us={},
        memory_bytes=0,
        loss=0.0,
        parameters=(f"{name}.weight",),
        joined=tuple(f"{BLOCK}.{joined}" for joined in JOINED) if leaf in JOINED else (),
    )


@torch.no_grad()
def expected_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names of the quantized linears.

    The first rows of its weight, and a product with it where a CPU has the kernel.
    """
    expected = {}
    for name in (f"{BLOCK}.{leaf}" for leaf in LAYERS):
        weight = module.get_parameter(f"{name}.weight").data
        numbers = get_format(weight.format_id).dequantize(weight.stored)
        expected[f"{name} weight"] = numbers[:16].to(torch.bfloat16)
        if "tiled" not in weight.format_id:
            x = torch.linspace(-1, 1, 3 * weight.shape[1], dtype=torch.bfloat16).reshape(3, -1)
            expected[f"{name} product"] = module.get_submodule(name)(x)
    return expected


def candidate_names() -> dict[str, Any]:
    """By the id of each format.

    The name of its values, and what each kernel rounds activations to.
    """
    return {
        fmt.id: {
            "values": fmt.values,
            "kernels": {kernel.id: kernel.numerics for kernel in fmt.kernels},
        }
        for fmt in known_formats().values()
    }


def write_databases(folder: Path) -> None:
    """A search that came to its end, and the same one interrupted while plans were proven."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
        on_this_device(patch)
        for name, listener in (("finished", ignore), ("interrupted", InterruptAt("prove", 3))):
            db = Path(scratch) / f"{name}.db"
            with contextlib.suppress(KeyboardInterrupt):
                search(folder, db, budget_s=0.2, listener=listener)
            with contextlib.closing(sqlite3.connect(db)) as connection:
                connection.execute(
                    "VACUUM INTO ?", (str(folder / f"{name}.sqlite"),)
                )  # one file, without its log


def write_checkpoint(folder: Path) -> None:
    """A model in formats that load anywhere, and what it computes."""
    source, target = folder / "source", folder / "checkpoint"
    make_llama().save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    loaded = load_model(str(source), dtype="bf16", device="cpu")
    plan = make_plan(loaded.module)
    autoquant.apply(plan, loaded.module)
    target.mkdir()
    checkpoint.write(loaded, plan, target)
    torch.save(expected_of(loaded.module), folder / "expected.pt")
    shutil.rmtree(source)


def main(folder: Path) -> None:
    """Write everything into a new folder."""
    folder.mkdir()
    torch.set_num_threads(1)
    save_llama(folder / "model", layers=1)
    save_text(folder / "text.txt", windows=16)
    write_checkpoint(folder)
    (folder / "candidates.json").write_text(json.dumps(candidate_names(), indent=1) + "\n")
    write_databases(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
