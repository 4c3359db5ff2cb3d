"""Removing a study with what Optuna keeps of it in the same database."""

import contextlib
import sqlite3

import optuna
import pytest
from builders.records import STUDY
from builders.search import make_plan

from autoquant.errors import StoreError
from autoquant.study.remove import remove


def optuna_study(store, study_id, trials):
    storage = optuna.storages.RDBStorage(store.engine.url.render_as_string(hide_password=False))
    study = optuna.create_study(study_name=f"autoquant-{study_id}", storage=storage)
    for number in range(trials):
        study.add_trial(
            optuna.trial.create_trial(
                params={"x": number / 10},
                distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
                value=1.0,
            )
        )
    storage.engine.dispose()


@pytest.fixture
def ask(tmp_path):
    def query(statement):
        connection = sqlite3.connect(tmp_path / "plan.db")
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    return query


def test_the_trials_of_the_study_go_with_it_and_those_of_others_stay(store, ask):
    store.put_plan(make_plan("one"))
    optuna_study(store, STUDY, trials=3)
    optuna_study(store, "another1", trials=2)
    removed = remove(store, STUDY)
    assert (removed.rows.plans, removed.trials) == (1, 3)
    assert store.studies() == []
    assert ask("SELECT study_name FROM studies") == [("autoquant-another1",)]
    assert ask("SELECT count(*) FROM trials") == [(2,)]
    assert ask("SELECT count(*) FROM trial_params") == [(2,)]


def test_trials_of_every_objective_go(store, ask):
    optuna_study(store, STUDY, trials=3)
    optuna_study(store, f"{STUDY}-memory", trials=2)
    assert remove(store, STUDY).trials == 5
    assert ask("SELECT count(*) FROM studies") == [(0,)]


@pytest.mark.parametrize(
    "damage", ["UPDATE trial_values SET objective = 3", "UPDATE alembic_version SET version_num = 'inf'", "UPDATE trial_params SET distribution_json = CAST(x'7BFFFF7D' AS TEXT)"]
)  # fmt: skip
def test_damage_of_what_optuna_keeps_is_said_and_nothing_removed(store, tmp_path, damage):
    optuna_study(store, STUDY, trials=2)
    with contextlib.closing(sqlite3.connect(tmp_path / "plan.db")) as connection, connection:
        connection.execute(damage)
    with pytest.raises(StoreError, match=r"is damaged \(what Optuna keeps there"):
        remove(store, STUDY)
    assert store.studies() == [STUDY]


def test_a_study_that_optuna_never_saw_leaves_optuna_alone(store, ask):
    optuna_study(store, "another1", trials=1)
    assert remove(store, STUDY).trials is None
    assert ask("SELECT count(*) FROM trials") == [(1,)]


def test_a_database_without_optuna_gets_no_tables_of_it(store, ask):
    assert remove(store, STUDY).trials is None
    assert ask("SELECT name FROM sqlite_master WHERE name = 'studies'") == []
