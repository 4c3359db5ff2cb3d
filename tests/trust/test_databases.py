"""A database names code and paths: each is a suggestion, which the error repeats."""

from __future__ import annotations

import shutil
import sqlite3

import pytest
import torch

from autoquant.delivery.on_disk import apply_to_disk
from autoquant.errors import PlanError, TrustError
from autoquant.models.trust import Trust
from autoquant.store import open_store
from autoquant.study.study import Study

from .conftest import Payload, done, refused

FLAGS = ("--trust-pickle", "--sample-inputs", "owners_net:inputs")
COMMANDS = {
    "apply": ("apply",),
    "bench": ("bench",),
    "bench --loop generate": ("bench", "--loop", "generate"),
}


@pytest.fixture(params=COMMANDS.values(), ids=COMMANDS)
def command(request):
    return request.param


def test_a_stored_pickle_does_not_run(owned, command, marker):
    torch.save(Payload(marker), owned.place / "net.pt")
    message = refused(*command, owned.db)
    assert "--trust-pickle --sample-inputs owners_net:inputs" in message, "all of it at once"
    assert f"{owned.place / 'net.pt'}" in message
    assert not marker.exists()


def test_a_pickle_at_another_place_does_not_run(owned, command, marker, tmp_path):
    other = tmp_path / "other.pt"
    torch.save(Payload(marker), other)
    assert "--trust-pickle" in refused(*command, owned.db, "--model", other)
    assert not marker.exists()


def test_a_pickle_does_not_run_where_the_database_says_it_is_none(owned, command, marker):
    torch.save(Payload(marker), owned.place / "net.pt")
    owned.said(trust_pickle=False, sample_inputs=None, kind="state_dict")
    assert "--trust-pickle" in refused(*command, owned.db)
    assert not marker.exists()


def test_a_trusted_pickle_that_was_changed_is_refused_before_it_runs(owned, command, marker):
    torch.save(Payload(marker), owned.place / "net.pt")
    message = refused(*command, owned.db, *FLAGS)
    assert "holds other code than it did when it was searched, and none of it was run" in message
    assert not marker.exists()


def test_a_trusted_program_that_was_changed_is_refused_before_it_runs(owned, marker):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, owned.place / "net.pt2")
    owned.said(kind="exported", path=str(owned.place / "net.pt2"))
    assert "none of it was run" in refused("apply", owned.db, *FLAGS)


@pytest.mark.parametrize("field", ["model_factory", "sample_inputs"])
def test_a_stored_function_is_not_imported(owned, command, evil, field, tmp_path, marker):
    owned.said(**{"trust_pickle": False, "sample_inputs": None, "kind": "state_dict", field: evil})
    owned.said(path=str(owned.place / "weights.pt"))
    message = refused(*command, owned.db)
    assert f"--{field.replace('_', '-')} evil:run" in message
    assert f"imports evil:run from {tmp_path / 'evil.py'}" in message, "what would run"
    assert not marker.exists()


def test_a_stored_function_of_a_package_imports_not_even_the_package(owned, evil, tmp_path, marker):
    package = tmp_path / "evil_package"
    package.mkdir()
    shutil.move(tmp_path / "evil.py", package / "__init__.py")
    owned.said(sample_inputs="evil_package.part:run")
    assert "imports evil_package.part:run" in refused("apply", owned.db)
    assert not marker.exists()


def test_named_in_the_command_it_is_applied_and_timed(owned):
    done("apply", owned.db, *FLAGS, "--out", "out")
    assert "int8-row" in done("bench", owned.db, *FLAGS)


def test_a_factory_named_in_the_command_is_used(owned):
    owned.said(kind="state_dict", path=str(owned.place / "weights.pt"), trust_pickle=False)
    owned.said(model_factory="owners_net:Net", file_hash=None)
    named = ("--model-factory", "owners_net:Net", "--sample-inputs", "owners_net:inputs")
    assert " ".join(named) in refused("apply", owned.db)
    said = done("apply", owned.db, *named, "--out", "out")
    assert "autoquant.load('out', model_factory='owners_net:Net')" in said, "what to call next"


def test_the_function_of_the_command_is_taken_and_not_the_stored_one(
    owned, evil, marker, monkeypatch
):
    owned.said(sample_inputs=evil)
    monkeypatch.chdir(owned.place)
    done("apply", owned.db, *FLAGS, "--out", "out")
    assert not marker.exists()


def test_a_file_that_holds_no_code_needs_no_leave(owned):
    owned.said(kind="state_dict", path=str(owned.place / "weights.pt"), model_factory="a:b")
    assert "--trust-pickle" not in refused("apply", owned.db), "though the search was given it"


def test_an_older_database_says_that_the_bytes_are_unknown(owned):
    owned.said(file_hash=None)
    assert "whose bytes an older version did not note" in refused("apply", owned.db)
    done("apply", owned.db, *FLAGS, "--out", "out")


def test_a_search_notes_the_hash_of_the_file_that_it_trusts(owned):
    assert len(owned.source()["file_hash"]) == 64


def test_from_python_a_stored_pickle_does_not_run_either(owned, marker):
    torch.save(Payload(marker), owned.place / "net.pt")
    store = open_store(owned.db)
    study = Study(store)
    with pytest.raises(TrustError, match="--trust-pickle") as caught:
        apply_to_disk(study.best_of_search(), owned.place / "net.pt", "out", facts=study.facts)
    assert caught.value.options == {"trust_pickle": True, "sample_inputs": "owners_net:inputs"}
    trust = Trust(trust_pickle=True, sample_inputs="owners_net:inputs")
    with pytest.raises(Exception, match="none of it was run"):
        apply_to_disk(
            study.best_of_search(), owned.place / "net.pt", "out", facts=study.facts, trust=trust
        )
    store.close()
    assert not marker.exists()


def test_a_format_that_is_named_like_a_module_is_not_imported(owned, evil, marker, monkeypatch):
    monkeypatch.chdir(owned.place)
    with sqlite3.connect(owned.db) as connection:
        connection.execute("UPDATE plan SET layers = replace(layers, 'int8-row/plain', 'evil')")
    connection.close()
    assert "no format 'evil'" in refused("apply", owned.db, *FLAGS, "--out", "out")
    assert not marker.exists()


def test_a_plan_whose_id_is_a_path_writes_no_folder_elsewhere(owned, tmp_path):
    from autoquant.cli.plans import folder_beside

    class Plan:
        plan_id = "/../../elsewhere"

    with pytest.raises(PlanError, match="is no name for a folder: give --out DIR"):
        folder_beside(str(owned.db), "model", Plan())
