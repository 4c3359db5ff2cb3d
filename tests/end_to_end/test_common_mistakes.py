"""Mistakes that people make: each is answered in one line, and what the line says to do works."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from autoquant.cli.main import app
from autoquant.store import open_store
from autoquant.store.connect import VERSION_TABLE

from .conftest import copy_database, typed
from .tiny import make_llama, save_llama, save_text

RECIPE = """
db = "plan.db"
device = "cpu"
eval-text = "text.txt"
workload = "prefill=8,decode=4"
candidates = ["int8*", "int4*", "float16*"]
time-budget = "4s"
"""

MINE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make():
    return LlamaForCausalLM(LlamaConfig.from_pretrained("model"))


def broken():
    return LlamaForCausalLM(LlamaConfig.from_pretrained("model"), layers=LAYERS)


def inputs():
    return (torch.ones(4, 32),)


def loss(module, part):
    drawn = torch.randn(40, 32, generator=torch.Generator().manual_seed(len(part)))
    return module(drawn).square().mean(dim=1)
"""

OPTIONS = (
    "--db plan.db --device cpu --eval-text text.txt --workload prefill=8,decode=4 --time-budget 4s"
    " --candidates int8* --candidates int4* --candidates float16*"
)
SEARCH = "search model --recipe quick.toml"
OWN = "search module.pt --db own.db --device cpu --workload prefill=8 --candidates int8-row/plain/int-mm --time-budget 1s"
OWN_JUDGE = "--quality mine:loss --sample-inputs mine:inputs"
LAYERS = (
    "--db plan.db --device cpu --workload prefill=8,decode=4 --candidates int8-row/plain/int-mm"
)
SHAPES = "--db plan.db --device cpu --rows 1 --candidates int8-row/plain/int-mm"


def lengthen_text(here: Path) -> None:
    save_text(here / "short.txt")


def mend_factory(here: Path) -> None:
    (here / "mine.py").write_text(MINE.replace("layers=LAYERS", ""))


def mend_shapes(here: Path) -> None:
    (here / "odd.txt").write_text("64x32 up\n")


def make_folder(here: Path) -> None:
    (here / "new").mkdir()


@dataclass(frozen=True)
class Mistake:
    """What is typed, what the answer must say, and what is typed after following it.

    Attributes:
        says: A regular expression; what its groups find replaces `{0}`, `{1}` in `right`.
        mend: What the answer asks for besides another command line.
    """

    wrong: str
    says: str
    right: str
    mend: Callable[[Path], None] | None = None


MISTAKES = {
    "a path of the model with a letter missing": Mistake(
        "search ./modl --recipe quick.toml", r"no model at ./modl \(did you mean \S*/(\S+)\?\)", "search {0} --recipe quick.toml"
    ),
    "a folder above the model's": Mistake(
        "search . --recipe quick.toml",
        r"has no config.json: give the model's own folder, \S*/(\S+)",
        "search {0} --recipe quick.toml",
    ),
    "a path of the text with letters swapped": Mistake(
        f"{SEARCH} --eval-text txet.txt", r"did you mean (\S+)\?", f"{SEARCH} --eval-text {{0}}"
    ),
    "a text too short": Mistake(
        f"{SEARCH} --eval-text short.txt --db new.db --candidates int8-row/plain/int-mm --time-budget 1s",
        r"at least \d+ are needed .* give a longer text",
        f"{SEARCH} --eval-text short.txt",
        lengthen_text,
    ),
    "a state dict without the model's code": Mistake(
        f"profile weights.pt {LAYERS}",
        r"give (--model-factory) package\.module:callable",
        f"profile weights.pt {LAYERS} {{0}} mine:make",
    ),
    "a factory that does not exist": Mistake(
        f"profile weights.pt {LAYERS} --model-factory mine:mak",
        r"mine has no mak \(did you mean (\w+)\?\)",
        f"profile weights.pt {LAYERS} --model-factory mine:{{0}}",
    ),
    "a factory that fails": Mistake(
        f"profile weights.pt {LAYERS} --model-factory mine:broken",
        "NameError: name 'LAYERS' is not defined.*: fix it",
        f"profile weights.pt {LAYERS} --model-factory mine:broken",
        mend_factory,
    ),
    "weights of another module than the factory's": Mistake(
        f"profile other.safetensors {LAYERS} --model-factory mine:make",
        "does not fit --model-factory mine:make: .*; give the factory of the model that was saved",
        f"profile other.safetensors {LAYERS} --model-factory mine:make",
        lambda here: (here / "mine.py").write_text(MINE.replace('"model"', '"model", num_hidden_layers=1')),
    ),
    "a pickled module without trust": Mistake(
        f"{OWN} {OWN_JUDGE}",
        r"give (--trust-pickle) \(if you trust its author\)",
        f"{OWN} {OWN_JUDGE} {{0}}",
    ),
    "a pickled module and nothing else": Mistake(
        f"{OWN} --quality mine:loss",
        r"give (--trust-pickle) .* and (--sample-inputs) package\.module:callable",
        f"{OWN} --quality mine:loss {{0}} {{1}} mine:inputs",
    ),
    "a module without inputs": Mistake(
        f"{OWN} --quality mine:loss --trust-pickle",
        r"give autoquant search (--sample-inputs) package\.module:callable",
        f"{OWN} --quality mine:loss --trust-pickle {{0}} mine:inputs",
    ),
    "a text for a module that reads none": Mistake(
        f"{OWN} --eval-text text.txt --trust-pickle --sample-inputs mine:inputs",
        r"leave out --eval-text .*, or give (--quality) package\.module:callable instead of it",
        f"{OWN} {{0}} mine:loss --trust-pickle --sample-inputs mine:inputs",
    ),
    "a glob of candidates that do not exist": Mistake(
        f"profile model {LAYERS} --candidates int8-rwo/plain",
        r"no candidate matches 'int8-rwo/plain' \(did you mean (\S+)\?\); `autoquant candidates` lists them",
        f"profile model {LAYERS} --candidates {{0}}",
    ),
    "a limit without its percent sign": Mistake(
        f"{SEARCH} --max-ppl-increase 5", "5 is ambiguous; write (5%)", f"{SEARCH} --max-ppl-increase {{0}}"
    ),
    "a limit of memory without a unit that exists": Mistake(
        f"{SEARCH} --max-memory 2G1B", r"write a size such as (2GiB)", f"{SEARCH} --max-memory {{0}}"
    ),
    "a limit of memory that no plan meets": Mistake(
        "apply tight.db --out out", r"\(smallest: (\d+)\); allow more", f"{SEARCH} --db tight.db --max-memory {{0}}"
    ),
    "a recipe that does not exist": Mistake(
        f"search model {OPTIONS} --recipe smallest-within-1pc",
        r"no recipe 'smallest-within-1pc' \(did you mean (\S+)\?\)",
        f"search model {OPTIONS} --recipe {{0}}",
    ),
    "a workload without equals signs": Mistake(
        f"{SEARCH} --workload prefill8,decode4",
        "prefill=TOKENS,decode=STEPS",
        f"{SEARCH} --workload prefill=8,decode=4",
    ),
    "more tokens than the model has positions": Mistake(
        f"profile model {LAYERS} --workload prefill=60,decode=5",
        "needs 65 positions, the model has (64): ask for fewer tokens",
        f"profile model {LAYERS} --workload prefill=60,decode=4",
    ),
    "a device that is not there": Mistake(f"{SEARCH} --device cuda", "use (--device cpu)", f"{SEARCH} {{0}}"),
    "a precision that does not exist": Mistake(
        f"{SEARCH} --dtype bfloat16", "is not one of .*'(bf16)'", f"{SEARCH} --dtype {{0}}"
    ),
    "a command misspelt": Mistake("serach model --recipe quick.toml", "Did you mean '(search)'", "{0} model --recipe quick.toml"),
    "an option misspelt": Mistake(
        "search model --recipe quick.toml --max-ppl-increas 5%",
        r"(--max-ppl-increase)\b",
        "search model --recipe quick.toml {0} 5%",
    ),
    "a database misspelt": Mistake("pareto plam.db", r"no database at plam.db \(did you mean (\S+)\?\)", "pareto {0}"),
    "a picture in a folder that does not exist": Mistake(
        "pareto plan.db --plot new/front.svg",
        "new is not a folder that can be written into; make it first",
        "pareto plan.db --plot new/front.svg",
        make_folder,
    ),
    "a file that is no database": Mistake("show text.txt", "give another file for the database", "show plan.db"),
    "a database of another program": Mistake(
        f"{SEARCH} --db foreign.db", "another program; give another file for the database", SEARCH
    ),
    "a database of a newer autoquant": Mistake(
        f"{SEARCH} --db newer.db", "newer autoquant .* or give another file for the database", SEARCH
    ),
    "a plan that does not exist": Mistake("show plan.db --plan nope", "`autoquant (pareto plan.db)` lists", "{0}"),
    "a model of other shapes": Mistake(
        "apply plan.db --model other --out out",
        "is not the model that was searched .* give the right one with (--model)",
        "apply plan.db {0} model --out out",
    ),
    "a folder that exists already": Mistake(
        "apply plan.db --model model --out model",
        "model exists already; choose another (--out)",
        "apply plan.db --model model {0} out",
    ),
    "a line that is no shape": Mistake(
        f"profile --shapes odd.txt {SHAPES}", r"odd.txt, line 1: cannot read '64, 32'; write OUTxIN",
        f"profile --shapes odd.txt {SHAPES}", mend_shapes
    ),
    "a picture of a kind that is not drawn": Mistake(
        "pareto plan.db --plot front.gif", r"must end in one of \.png, (\.svg)", "pareto plan.db --plot front{0}"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(searched, tmp_path_factory):
    """What a user has: a model in several forms, a text, a recipe, code, and the database of a finished search."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(searched.model, folder / "model")
    save_llama(folder / "other", layers=1)
    shutil.copy(searched.text, folder / "text.txt")
    save_text(folder / "short.txt", windows=3)
    (folder / "odd.txt").write_text("64, 32\n")
    (folder / "quick.toml").write_text(RECIPE)
    (folder / "mine.py").write_text(MINE)
    torch.save(make_llama().state_dict(), folder / "weights.pt")
    save_file(
        {name: value.clone() for name, value in make_llama(layers=1).state_dict().items()},
        folder / "other.safetensors",
    )
    torch.save(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), folder / "module.pt")
    copy_database(searched.db, folder / "plan.db")
    make_databases(folder)
    finished = typed(*shlex.split(OWN), *shlex.split(OWN_JUDGE), "--trust-pickle", cwd=folder)
    assert finished.exit_code == 0, finished.stderr
    return folder


def make_databases(folder):
    """A copy whose search had a limit that nothing meets, one of another program, one of a newer autoquant."""
    copy_database(folder / "plan.db", folder / "tight.db")
    with sqlite3.connect(folder / "tight.db") as connection:
        connection.execute(
            """UPDATE study SET limits = json_set(limits, '$.max_memory_bytes', 1)"""
        )
    with sqlite3.connect(folder / "foreign.db") as connection:
        connection.execute("CREATE TABLE holiday (day TEXT)")
    open_store(folder / "newer.db").close()
    with sqlite3.connect(folder / "newer.db") as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def type_in(line):
    sys.modules.pop("mine", None)
    return CliRunner().invoke(app, shlex.split(line))


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_one_line_and_following_it_works(here, mistake):
    if "cuda" in mistake.wrong and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    result = type_in(mistake.wrong)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    found = re.search(mistake.says, result.stderr)
    assert found, result.stderr
    if mistake.mend is not None:
        mistake.mend(here)
    followed = type_in(mistake.right.format(*found.groups()))
    assert followed.exit_code == 0, followed.stderr
    assert followed.stdout
