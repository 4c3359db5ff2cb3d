"""Every command and every Python block of the README and the pages is run, on a tiny model, or
marked as not run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from end_to_end import quick
from end_to_end.tiny import save_llama, save_text
from typer.testing import CliRunner

import autoquant
from autoquant.candidates import registry, select
from autoquant.cli.main import app

from .pages import PAGES, SHELL, blocks, loose_commands

NOT_RUN = {
    "installs": 10,
    "GPU": 6,
    "lm_eval": 3,
    "a terminal": 1,
    "a server": 6,
    "an engine": 13,
    "ExecuTorch": 5,
    "a training": 6,
    "another program": 10,
    "another model": 6,
    "two devices": 1,
    "a cluster": 5,
}
"""How many commands are marked, by their reason: whoever adds one says so here."""

CANDIDATES = "int8-row/plain/int-mm"
WORKLOAD = "--workload prefill=8,decode=4"
ANY_PLAN = "--max-ppl-increase 100000% --minimize memory"
QUICK = ("--device cpu", f"--candidates {CANDIDATES}", "--time-budget 1s")

# What a tiny model on a CPU takes instead of what a reader would type.
SMALLER = (
    (r"\bout/demo/held-out\.txt\b", "text.txt"),
    (r"\bout/demo/", ""),
    (r"\bdemo/model\b", "my-model"),
    (r"prefill=\d+,decode=\d+", "prefill=8,decode=4"),
    (r"--rows [\d,]+", "--rows 1,4"),
    (r"my-model-(PLANID|[0-9a-f]{8})\b", lambda _: newest("my-model-*")),
    (r"\b(4096|1024)x4096\b", "64x32"),
    (r"\b128256x4096\b", "128x32"),
    (r"--to aoti\b", "--to pt2"),  # compiles nothing
    (r'device = "cuda"', 'device = "cpu"'),
    (r"rows=\[1, 2048\]", f'rows=[1], candidates=["{CANDIDATES}"]'),
    (
        r'db="(plan|mine)\.db"',
        rf'db="\1.db", device="cpu", candidates=["{CANDIDATES}"], time_budget_s=1.0',
    ),
)


@pytest.fixture(scope="module", autouse=True)
def short():
    with quick.short():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short):
    """A folder with a model, a text, and the database of a search, and what stands for ids of its
    plans in the pages.
    """
    folder = tmp_path_factory.mktemp("finished")
    save_llama(folder / "my-model")
    save_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(
            f"search my-model --eval-text text.txt --db plan.db {ANY_PLAN} {' '.join(QUICK)} "
            f"{WORKLOAD}"
        )
        study = autoquant.Study.open("plan.db")
        plans = [plan.plan_id for plan in study.plans() if plan.kind != "original"]
        study.store.close()
    return folder, {"PLAN_A": plans[0], "PLAN_B": plans[1], "STUDY_ID": study.study_id}


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    folder, ids = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered), raising=False)
    known = set(sys.modules)
    yield ids
    for name in set(sys.modules) - known:
        if (
            getattr(sys.modules[name], "__file__", None)
            and str(tmp_path) in sys.modules[name].__file__
        ):
            del sys.modules[name]


def newest(pattern):
    """The name of what was written last."""
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime).name


def run(line):
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.stdout


def parse(line):
    """Check a command against the command line: its name, its options and what they take."""
    words = typed(line)[0][1:]
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), words)
    command.make_context(name, list(rest))
    select([glob for option, glob in pairwise(rest) if option == "--candidates"])


def typed(line):
    """The words of a command, and the file that its output goes to."""
    words = shlex.split(line, comments=True)
    return (words[: words.index(">")], words[-1]) if ">" in words else (words, None)


def quickly(command):
    """The command with one candidate, on the CPU, and a workload that a tiny model has room for."""
    name = command.split()[0]
    if name == "generate":
        return f"{command} --max-new-tokens 2"
    if name not in ("search", "profile"):
        return command
    more = [*QUICK] if name == "search" else [*QUICK[:2]]
    reads_tokens = (
        "--sample-inputs" not in command and "--shapes" not in command and ".pt2" not in command
    )
    if "--workload" not in command and reads_tokens:
        more.append(WORKLOAD)
    if name == "search" and not any(
        option in command for option in ("--max", "--minimize", "--recipe")
    ):
        more.append(ANY_PLAN)
    return " ".join([re.sub(r" --(candidates|device|time-budget) (\S+)", "", command), *more])


def smaller(text, ids):
    for pattern, replacement in (*SMALLER, *ids.items()):
        text = re.sub(pattern, replacement, text)
    return text


def follow(line, ids):
    """Run one command as the reader types it, but quickly."""
    words, target = typed(line)
    assert words[0] == "autoquant", f"only autoquant is run here; mark the block of: {line}"
    parse(line)
    printed = run(quickly(smaller(shlex.join(words[1:]), ids)))
    if target is not None:
        Path(target).write_text(printed)


@pytest.mark.slow  # a dozen whole searches
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_type_works(page, place):
    names = {}
    for block in blocks(page):
        if block.title is not None:
            target = Path(block.title)
            target.parent.mkdir(exist_ok=True)
            target.write_text(smaller(block.text, place))
        elif block.language == "python" and block.mark is None:
            exec(compile(smaller(block.text, place), f"{page}:{block.line}", "exec"), names)
        elif block.language in SHELL:
            for line in block.commands():
                if block.mark is None:
                    follow(line, place)
                elif line.startswith("autoquant "):
                    parse(line)


def test_only_so_many_commands_are_not_run():
    marks = Counter()
    for page in PAGES:
        for block in blocks(page):
            if block.mark is not None:
                marks[block.mark] += len(block.commands())
    assert marks == NOT_RUN


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_that_are_run(page):
    assert loose_commands(page) == []
