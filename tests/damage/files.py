"""Whole files of every kind that is read, made from a tiny model, and what reads them."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from end_to_end import quick
from end_to_end.tiny import save_llama, save_text
from typer.testing import CliRunner

PINS = ("--pin", "*.q_proj=int4*", "--pin", "*.gate_proj=int8-row*", "--pin", "*.k_proj=int3*")
SEARCH = (
    "search", "model", "--eval-text", "text.txt", "--db", "plan.db", "--device", "cpu",
    "--workload", "prefill=8,decode=4", "--candidates", "int8-row*", "--candidates", "int4*",
    "--candidates", "int3*", *PINS, "--max-ppl-increase", "1000%",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A file to damage, and the command that reads it, both relative to the folder of files."""

    file: str
    command: tuple[str, ...]


def make_files(folder: Path) -> None:
    """Make a searched database, its checkpoint, model files, texts, recipes, in a folder."""
    import torch

    from autoquant.cli.main import app

    save_llama(folder / "model")
    save_text(folder / "text.txt")
    with contextlib.chdir(folder), quick.short():
        for arguments in (
            (*SEARCH, "--time-budget", "1s", "--save-recipe", "recipe.toml"),
            ("apply", "plan.db", "--out", "saved"),
        ):
            result = CliRunner().invoke(app, list(arguments))
            assert result.exit_code == 0, result.stderr
        _settle("plan.db", "other.db")
        shutil.copytree("model", "bin")
        from safetensors.torch import load_file

        state = load_file("model/model.safetensors")
        torch.save(state, "bin/pytorch_model.bin")
        Path("bin/model.safetensors").unlink()
        beside = Path("beside")
        shutil.copytree("bin", beside)
        (beside / "pytorch_model.bin").rename(beside / "weights.pt")
        module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()).eval()
        program = torch.export.export(module, (torch.ones(4, 32),))
        torch.export.save(program, "program.pt2")
        Path("shapes.txt").write_text("64x32 up\n64x64+bias rows=1,16\n")
        Path("prompt.txt").write_text("w1 w2 w3\n")
        Path("rows.jsonl").write_text('{"text": "w1 w2"}\n' * 40)


def _settle(database: str, copy: str) -> None:
    """Make a copy of a database, and put it in its place, without the log of the open one."""
    with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(copy)) as new:
        old.backup(new)
    for each in Path().glob(f"{database}*"):
        each.unlink()
    shutil.copyfile(copy, database)


def cases(folder: Path) -> list[Case]:
    """Return every file with every command that reads it."""
    with closing(sqlite3.connect(folder / "plan.db")) as connection:
        plans = [row[0] for row in connection.execute("SELECT id FROM plan ORDER BY created")]
        (study,) = connection.execute("SELECT id FROM study").fetchone()
    two = ("--max-new-tokens", "2")
    found = [Case("plan.db", command) for command in _database_commands(plans, study)]
    for place in ("saved", "model"):
        command = ("generate", place, "--prompt", "w1 w2 w3", *two)
        found += [Case(f"{place}/{path.name}", command) for path in _inside(folder / place)]
    for place in ("model", "bin"):
        found += [Case(f"{place}/{path.name}", _apply(place)) for path in _inside(folder / place)]
    return [
        *found,
        Case("other.db", ("merge", "plan.db", "other.db")),
        Case("beside/weights.pt", _apply("beside/weights.pt")),
        Case("beside/config.json", _apply("beside/weights.pt")),
        Case("model/model.safetensors", _apply("model/model.safetensors")),
        Case("program.pt2", _apply("program.pt2")),
        Case("program.pt2", _apply("program.pt2")),
        Case("recipe.toml", ("search", "missing", "--recipe", "recipe.toml")),
        Case("recipe.toml", ("recipes",)),
        Case("prompt.txt", ("generate", "saved", "--prompt-file", "prompt.txt", *two)),
        Case("text.txt", ("text", "text.txt")),
        Case("rows.jsonl", ("data", "rows.jsonl")),
        Case("shapes.txt", ("shapes", "shapes.txt")),
    ]


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _apply(model: str) -> tuple[str, ...]:
    """Return a command that reads a model: what it finds there is not what was searched."""
    return ("apply", "plan.db", "--model", model, "--out", "new")


def _database_commands(plans: list[str], study: str) -> list[tuple[str, ...]]:
    return [
        ("show", "plan.db"),
        ("show", "plan.db", "--why"),
        ("show", "plan.db", "--plan", plans[0], "--json"),
        ("pareto", "plan.db"),
        ("pareto", "plan.db", "--json"),
        ("report", "plan.db", "--out", "report.html"),
        ("studies", "plan.db"),
        ("diff", "plan.db", plans[0], plans[-1]),
        ("solve", "plan.db", "--max-ppl-increase", "99999%"),
        ("apply", "plan.db", "--out", "new"),
        ("export-timings", "plan.db"),
        ("rm", "plan.db", study, "--yes"),
        ("merge", "plan.db", "other.db"),
        ("repair", "plan.db", "--out", "repaired.db"),
    ]


def pick(found: list[Case], draw: Random) -> Case:
    """Draw a case: half of the time one of a database, else of any file."""
    databases = [case for case in found if case.file.endswith(".db")]
    others = [case for case in found if not case.file.endswith(".db")]
    return draw.choice(databases if draw.random() < 0.5 else others)


def run(command: tuple[str, ...]) -> None:
    """Run a command in this process, in the current folder. Three are no commands but readers.

    Ends as the command does, with SystemExit.
    """
    if command[0] not in ("text", "data", "shapes"):
        _autoquant()(list(command), prog_name="autoquant")
        return
    from autoquant.cli.main import describe

    try:
        _read(*command)
    except Exception as error:  # noqa: BLE001 - as `main` does
        message, code = describe(error)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(code) from None


@functools.cache
def _autoquant() -> Any:
    """Return all commands, as typer makes them anew for each call."""
    from typer.main import get_command

    from autoquant.cli.main import app

    return get_command(app)


def _read(kind: str, path: str) -> None:
    if kind == "shapes":
        from autoquant.profiler.shapes import read_shapes

        read_shapes(path, "bfloat16")
        return
    from autoquant.evaluators.data import data_pieces
    from autoquant.evaluators.text import deal_text, read_text
    from autoquant.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("model")
    if kind == "text":
        read_text(path, tokenizer, max_positions=64)
    else:
        deal_text(data_pieces(path, tokenizer), path, tokenizer, max_positions=2)
