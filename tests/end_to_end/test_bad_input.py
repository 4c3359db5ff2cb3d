"""Bad input: one line on stderr, exit code 2, no traceback, and no file left behind."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from autoquant.cli.main import app
from autoquant.delivery import on_disk
from autoquant.store import open_store
from autoquant.store.connect import VERSION_TABLE

from .conftest import command, folder_print
from .tiny import save_llama, save_text

GOOD = (
    "--db",
    "plan.db",
    "--workload",
    "prefill=8,decode=4",
    "--candidates",
    "int8*",
    "--time-budget",
    "1s",
)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    """The current folder, which only has a subfolder `given` with a model and a text, for tests to spoil."""
    given = tmp_path / "given"
    given.mkdir()
    shutil.copytree(files[0], given / "model")
    shutil.copy(files[1], given / "text.txt")
    (given / "shapes.txt").write_text("64x32 up\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(here, *arguments):
    """Run a command that must be refused; returns what it says."""
    before = folder_print(here)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    check(result.exit_code, result.stdout, result.stderr)
    assert folder_print(here) == before, "files were left behind or changed"
    return result.stderr


def check(exit_code, stdout, stderr):
    assert (exit_code, stdout) == (2, ""), (exit_code, stdout, stderr)
    assert stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, (
        stderr
    )
    assert "Traceback" not in stderr


def search(model="given/model", text="given/text.txt", **options):
    """Arguments of a search that would succeed but for what is given here."""
    spoiled = [
        part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)
    ]
    return ("search", model, "--eval-text", text, *GOOD, *spoiled)


def profile(shapes="given/shapes.txt", **options):
    """Arguments of a timing of shapes that would succeed but for what is given here."""
    given = {
        "shapes": shapes,
        "db": "timings.db",
        "rows": "1,4",
        "candidates": "int8*",
        "device": "cpu",
        **options,
    }
    return (
        "profile",
        *(part for name, value in given.items() if value for part in (f"--{name}", value)),
    )


def spoil(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_a_missing_model(here):
    assert "missing-model" in refused(here, *search("missing-model"))


def test_a_missing_model_file(here):
    assert "missing.safetensors" in refused(here, *search("missing.safetensors"))


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1, -3000])
def test_a_truncated_safetensors_file(here, size):
    spoil(here / "given/model/model.safetensors", size)
    assert "model.safetensors" in refused(here, *search())


def test_a_model_without_its_tokenizer(here):
    for path in (here / "given/model").glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(here, *search())


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_pickle_with_a_payload_does_not_run(here, suffix):
    torch.save(Payload(here / "ran"), here / f"given/model{suffix}")
    assert "--trust-pickle" in refused(here, *search(f"given/model{suffix}"))
    assert not (here / "ran").exists()


def test_a_payload_inside_a_state_dict_does_not_run(here):
    torch.save({"weight": torch.ones(2, 2), "more": Payload(here / "ran")}, here / "given/model.pt")
    refused(here, *search("given/model.pt", model_factory="torch.nn:Linear"))
    assert not (here / "ran").exists()


def test_a_text_too_short_for_the_splits(here):
    save_text(here / "given/text.txt", windows=3)
    assert "longer text" in refused(here, *search())


def test_a_missing_text(here):
    assert "no-text.txt" in refused(here, *search(text="no-text.txt"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe" * 9000])
def test_a_text_that_is_none(here, content):
    (here / "given/text.txt").write_bytes(content)
    assert "text.txt" in refused(here, *search())


def test_a_folder_as_text(here):
    refused(here, *search(text="given"))


def make_foreign(path, journal="DELETE"):
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode = {journal}")
    connection.execute("CREATE TABLE holiday (day TEXT)")
    connection.commit()
    connection.close()


def make_newer(path):
    open_store(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.commit()
    connection.close()


COMMANDS = {
    "search": lambda db: search(db=db),
    "pareto": lambda db: ("pareto", db),
    "show": lambda db: ("show", db),
    "apply": lambda db: ("apply", db, "--out", "out"),
    "profile": lambda db: profile(db=db),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_database_of_another_program(here, name):
    make_foreign(here / "given/foreign.db")
    assert "another program" in refused(here, *COMMANDS[name]("given/foreign.db"))


def test_a_database_of_another_program_with_a_write_ahead_log(here):
    make_foreign(here / "given/foreign.db", "WAL")
    assert "another program" in refused(here, *search(db="given/foreign.db"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_database_of_a_newer_schema(here, name):
    make_newer(here / "given/newer.db")
    assert "newer autoquant" in refused(here, *COMMANDS[name]("given/newer.db"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_text_file_as_database(here, name):
    refused(here, *COMMANDS[name]("given/text.txt"))


@pytest.mark.parametrize("name", ["pareto", "show", "apply"])
def test_a_missing_database(here, name):
    assert "no database at nowhere.db" in refused(here, *COMMANDS[name]("nowhere.db"))


def test_a_plan_applied_to_another_model(here, searched):
    save_llama(here / "given/another", seed=7)
    arguments = ("apply", searched.db, "--model", "given/another", "--out", "out")
    assert "is not the model that was searched" in refused(here, *arguments)


def test_a_plan_applied_to_a_missing_model(here, searched):
    refused(here, "apply", searched.db, "--model", "given/nowhere", "--out", "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(here):
    assert "CUDA" in refused(here, *search(device="cuda"))


def test_a_device_that_does_not_exist(here):
    assert "toaster" in refused(here, *search(device="toaster"))


@pytest.mark.parametrize(
    "workload", ["", "prefill", "prefill=0", "prefill=8,decode=-1", "prefill=8,prefill=8", "a=1"]
)
def test_a_workload_that_cannot_be_parsed(here, workload):
    assert "prefill=TOKENS,decode=STEPS" in refused(here, *search(workload=workload))


def test_a_workload_longer_than_the_models_positions(here):
    assert "64" in refused(here, *search(workload="prefill=60,decode=5"))


def test_a_batch_larger_than_the_memory(here):
    assert "lower --batch" in refused(here, *search(batch=999_999_999_999))


@pytest.mark.parametrize("globs", ["int9*", "int8", "nothing/*/at-all", ""])
def test_a_candidate_glob_that_matches_nothing(here, globs):
    assert "no candidate matches" in refused(here, *search(candidates=globs))


def test_an_unknown_plan(here, searched):
    for arguments in (
        ("show", searched.db, "--plan", "nope"),
        ("apply", searched.db, "--plan", "nope", "--out", "out"),
    ):
        assert "no plan with id 'nope'" in refused(here, *arguments)


def test_an_unknown_study(here, searched):
    assert "nope" in refused(here, "pareto", searched.db, "--study", "nope")


def test_a_limit_that_no_plan_meets(here, study, searched, tmp_path):
    refused(here, "apply", searched.db, "--max-ppl-increase", "-1%", "--out", "out")


@pytest.fixture
def read_only(here):
    folder = here / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def test_a_read_only_folder_for_the_database(here, read_only):
    assert "cannot write" in refused(here, *search(db=read_only / "plan.db"))
    assert stat.S_IMODE(read_only.stat().st_mode) == 0o555


def test_a_read_only_folder_for_the_checkpoint(here, read_only, searched):
    assert "cannot write" in refused(here, "apply", searched.db, "--out", read_only / "out")


def test_a_read_only_folder_as_the_checkpoint(here, read_only, searched):
    refused(here, "apply", searched.db, "--out", read_only)


@pytest.mark.parametrize("leads", [True, False])
def test_a_link_as_the_checkpoint_is_refused_before_the_work(here, searched, monkeypatch, leads):
    if leads:
        (here / "empty").mkdir()
    monkeypatch.setattr(on_disk, "load_searched", None)
    (here / "out").symlink_to("empty")
    assert "out exists already" in refused(here, "apply", searched.db, "--out", "out")


def test_a_missing_folder_for_the_checkpoint(here, searched):
    assert "does not exist" in refused(here, "apply", searched.db, "--out", "nowhere/out")


def test_a_missing_folder_for_a_picture(here, searched):
    refused(here, "pareto", searched.db, "--plot", "nowhere/front.png")


@pytest.mark.parametrize("line", ["64", "64 x 32", "64x0", "up 64x32"])
def test_a_line_that_is_no_shape(here, line):
    (here / "given/shapes.txt").write_text(f"# layers\n64x32 up\n{line}\n")
    message = refused(here, *profile())
    assert "given/shapes.txt, line 3" in message and "4096x4096+bias" in message


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe" * 9])
def test_a_file_without_shapes(here, content):
    (here / "given/shapes.txt").write_bytes(content)
    assert "given/shapes.txt" in refused(here, *profile())


def test_a_missing_file_of_shapes(here):
    assert "no-shapes.txt" in refused(here, *profile(shapes="no-shapes.txt"))
    refused(here, *profile(shapes="given"))


def test_neither_a_model_nor_shapes_or_both(here):
    assert "--shapes" in refused(here, *profile(shapes=None))
    assert "--shapes" in refused(here, *profile(), "given/model")


def test_a_model_that_cannot_be_timed(here):
    assert "missing-model" in refused(here, *profile(shapes=None), "missing-model")
    assert "64" in refused(
        here, *profile(shapes=None, workload="prefill=60,decode=5"), "given/model"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"rows": "0"},
        {"rows": "many"},
        {"workload": "decode=4"},
        {"batch": "2"},
        {"rows": None, "workload": "decode"},
        {"candidates": "int9*"},
        {"device": "toaster"},
        {"dtype": "int3"},
        {"plot": "picture.gif"},
        {"plot": "nowhere/picture.png"},
        {"db": "nowhere/timings.db"},
    ],
    ids=str,
)
def test_options_of_profile_that_cannot_be_followed(here, options):
    refused(here, *profile(**options))


@pytest.mark.slow
def test_refusals_are_the_same_in_a_process_of_their_own(here):
    """Nothing that libraries print at import or exit comes between."""
    torch.save(Payload(here / "ran"), here / "given/weights.pt")
    spoil(here / "given/model/model.safetensors", 3000)
    make_foreign(here / "given/foreign.db")
    before = folder_print(here)
    cases = [search(), search("given/weights.pt"), search(db="given/foreign.db")]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda arguments: command(*arguments, cwd=here), cases))
    for result in results:
        check(result.returncode, result.stdout, result.stderr)
    assert folder_print(here) == before
    assert not (here / "ran").exists()
