import json

from builders import searched
from builders.searched import MIXED, STUDY

from autoquant.cli.main import app
from autoquant.records import Workload
from autoquant.store import open_store

EARLIER = "ear1ier00001"


def add_unfinished_study(database, study_id, path="/somewhere/else/another-model"):
    store = open_store(database)
    store.put_model("an0ther", {"kind": "huggingface", "path": path})
    store.put_study(
        study_id,
        model_hash="an0ther",
        device=searched.DEVICE,
        identity={},
        workload=Workload.parse("prefill=2048,decode=1024", 16),
        limits={"max_ppl_increase": None, "max_memory_bytes": 3 * 2**30},
    )
    store.close()


def touch(database, study_id):
    store = open_store(database)
    store.update_study(study_id, spent_s=1.0)
    store.close()


def test_json_lists_every_study_the_one_last_worked_on_first(runner, database):
    add_unfinished_study(database, EARLIER)
    touch(database, STUDY)
    studies = json.loads(runner.invoke(app, ["studies", str(database), "--json"]).stdout)
    assert [study["study_id"] for study in studies] == [STUDY, EARLIER]
    assert studies[0] == {
        "study_id": STUDY,
        "model": "tiny-model",
        "model_path": "/somewhere/tiny-model",
        "model_hash": "m0del",
        "device": "Test CPU",
        "workload": "prefill=512,decode=128",
        "limits": {"max_ppl_increase": 0.01, "max_memory_bytes": None},
        "constraints": {},
        "proven_plans": 4,
        "complete": True,
        "recommended_plan_id": MIXED,
    }
    assert (
        studies[1]["proven_plans"],
        studies[1]["complete"],
        studies[1]["recommended_plan_id"],
    ) == (0, False, None)
    touch(database, EARLIER)
    studies = json.loads(runner.invoke(app, ["studies", str(database), "--json"]).stdout)
    assert [study["study_id"] for study in studies] == [EARLIER, STUDY]


def test_text_fits_80_columns_with_whole_ids(runner, database):
    add_unfinished_study(
        database, EARLIER, "/models/a-model-with-a-very-long-name-that-does-not-fit-a-column"
    )
    result = runner.invoke(app, ["studies", str(database)])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if STUDY in line)
    assert "tiny-model" in row and "4" in row and "yes" in row and MIXED in row
    assert next(line for line in lines if EARLIER in line).split()[-2:] == ["no", "-"]
    assert "increase <= 1.00%" in result.stdout and "memory <= 3072 MiB" in result.stdout, (
        "limits are not wrapped"
    )


def test_a_database_without_a_study_is_an_empty_list(runner, tmp_path):
    path = tmp_path / "timings.db"
    open_store(path).close()
    assert json.loads(runner.invoke(app, ["studies", str(path), "--json"]).stdout) == []
    result = runner.invoke(app, ["studies", str(path)])
    assert result.exit_code == 0
    assert "holds no study yet" in result.stdout


def test_a_missing_database_is_one_line(runner, tmp_path):
    result = runner.invoke(app, ["studies", str(tmp_path / "plan.db")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no database at" in result.stderr
