"""Proposals of Optuna around the front."""

from __future__ import annotations

import itertools
import sqlite3

import optuna
import pytest
from builders.records import STUDY
from builders.search import CONTEXT, choice, make_proof

from autoquant.errors import StoreError
from autoquant.solver.planning import make_plan
from autoquant.solver.refine import growth_of, layer_kind, proposals
from autoquant.solver.space import SearchSpace
from autoquant.solver.uniform import original_plan, uniform_plans

STUDY_NAME = f"autoquant-{STUDY}"


def layers(count=6):
    """Layers whose options differ from one another, so that there are many plans."""
    made = []
    for number in range(count):
        name = f"model.layers.{number}.{'up' if number % 2 else 'down'}"
        int8 = {
            "fmt": "int8/plain",
            "us": 600.0 + 7 * number,
            "loss": 0.002 + 0.0003 * number,
            "memory": 50,
        }
        int4 = {
            "fmt": "int4/plain",
            "us": 300.0 + 11 * number,
            "loss": 0.03 + 0.005 * number,
            "memory": 25,
        }
        made.append([choice(name), choice(name, **int8), choice(name, **int4)])
    return made


@pytest.fixture
def options():
    return layers()


def first_proofs(options):
    """The original, the uniform plans and one plan of the front, proven."""
    space = SearchSpace(options, CONTEXT, [layer[0] for layer in options])
    mixed = [layer[1 + number % 2] for number, layer in enumerate(options)]
    plans = [
        original_plan(space),
        *uniform_plans(space),
        make_plan(mixed, "front 1", "front", CONTEXT),
    ]
    return {plan.plan_id: (plan, prove(plan)) for plan in plans}


def prove(plan):
    """A proof that says what was predicted."""
    return make_proof(
        plan.plan_id, ms=plan.prediction.request_ms, original_ms=8.0, increase=plan.prediction.loss
    )


@pytest.fixture
def propose(store, options):
    """Proposals from these known plans, in the study's own database."""

    def start(known, **changes):
        url = store.engine.url.render_as_string(hide_password=False)
        values = {"storage_url": url, "seed": 0, "known": known, "max_memory_bytes": None}
        return proposals(
            SearchSpace(changes.pop("options", options), CONTEXT), **(values | changes)
        )

    return start


def trials(store):
    url = store.engine.url.render_as_string(hide_password=False)
    return optuna.load_study(study_name=STUDY_NAME, storage=url).get_trials()


def take(running, count):
    """Prove up to `count` proposals."""
    plans = []
    for plan, tell in itertools.islice(running, count):
        plans.append(plan)
        tell(prove(plan))
    return plans


def test_no_plan_is_proposed_that_is_known(propose, options):
    known = first_proofs(options)
    plans = take(propose(known), 12)
    ids = [plan.plan_id for plan in plans]
    assert plans
    assert len(ids) == len(set(ids))
    assert not set(ids) & set(known)
    assert all(plan.kind == "refined" for plan in plans)


def test_a_plan_proven_in_an_earlier_run_is_not_proposed_again(propose, options):
    known = first_proofs(options)
    earlier = take(propose(known), 4)
    known |= {plan.plan_id: (plan, prove(plan)) for plan in earlier}
    later = take(propose(known), 4)
    assert later
    assert not {plan.plan_id for plan in later} & set(known)


def test_it_ends_when_there_is_nothing_new_to_propose(propose, options):
    few = options[:1]
    known = first_proofs(few)
    assert take(propose(known, options=few), 1000) == []


def test_a_plan_that_could_not_be_proven_is_not_proposed_again(propose, options):
    ids = []
    for plan, tell in itertools.islice(propose(first_proofs(options)), 8):
        ids.append(plan.plan_id)
        tell(None)
    assert len(ids) == len(set(ids)) > 0


def test_optuna_keeps_its_tables_in_the_database_of_the_study(propose, options, store, tmp_path):
    take(propose(first_proofs(options)), 2)
    connection = sqlite3.connect(tmp_path / "plan.db")
    tables = {
        name
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    }
    assert {
        "studies",
        "trials",
        "trial_values",
        "alembic_version",
        "autoquant_schema",
        "timing",
    } <= tables
    assert connection.execute("SELECT study_name FROM studies").fetchall() == [(STUDY_NAME,)]
    connection.close()
    assert {entry.name for entry in tmp_path.iterdir()} <= {"plan.db", "plan.db-wal", "plan.db-shm"}


def test_a_database_with_optunas_tables_opens_again(propose, options, store, tmp_path):
    from autoquant.store import open_store

    take(propose(first_proofs(options)), 1)
    store.close()
    assert open_store(tmp_path / "plan.db", create=False).studies() == [STUDY]


def test_plans_of_the_front_are_told_once(propose, options, store):
    known = first_proofs(options)
    front = [plan_id for plan_id, (plan, _) in known.items() if plan.kind == "front"]
    for _ in range(3):
        take(propose(known), 1)
    told = [trial.user_attrs.get("plan_id") for trial in trials(store)]
    assert [told.count(plan_id) for plan_id in front] == [1]


def test_the_sampler_learns_what_was_measured_on_the_selection_part(propose, options, store):
    plans = take(propose(first_proofs(options)), 3)
    finished = {trial.user_attrs.get("plan_id"): trial.values for trial in trials(store)}
    for plan in plans:
        proof = prove(plan)
        wanted = [proof.request_ms / proof.original_request_ms, proof.selection_increase.value]
        assert finished[plan.plan_id] == pytest.approx(wanted)


def test_proposals_keep_to_the_memory_limit(propose, options):
    limit = CONTEXT.other_bytes + 6 * 50
    for plan in take(propose(first_proofs(options), max_memory_bytes=limit), 8):
        assert plan.prediction.memory_bytes <= limit


def test_a_search_for_memory_learns_bytes_apart_from_what_was_learnt_of_time(
    propose, options, store
):
    known = first_proofs(options)
    take(propose(known), 2)
    plans = take(propose(known, minimize="memory"), 3)
    url = store.engine.url.render_as_string(hide_password=False)
    study = optuna.load_study(study_name=f"{STUDY_NAME}-memory", storage=url)
    finished = {trial.user_attrs.get("plan_id"): trial.values for trial in study.get_trials()}
    assert plans
    for plan in plans:
        proof = prove(plan)
        assert finished[plan.plan_id] == pytest.approx(
            [proof.memory_bytes, proof.selection_increase.value]
        )


def test_the_same_seed_proposes_the_same(options, tmp_path):
    runs = []
    for name in ("one", "two"):
        url = f"sqlite:///{tmp_path / name}.db"
        known = first_proofs(options)
        running = proposals(
            SearchSpace(options, CONTEXT),
            storage_url=url,
            seed=3,
            known=known,
            max_memory_bytes=None,
        )
        runs.append([plan.plan_id for plan in take(running, 4)])
    assert runs[0] == runs[1]


def test_a_proposal_predicts_with_the_scores_as_they_are(propose, options):
    scores = {(c.name, c.format): c.loss for layer in options for c in layer}
    for plan in take(propose(first_proofs(options)), 5):
        assert plan.prediction.loss == pytest.approx(
            sum(scores[c.name, c.format] for c in plan.layers)
        )


def test_a_proposal_says_why_for_every_layer(propose, options):
    for plan in take(propose(first_proofs(options)), 2):
        assert all(layer.reason for layer in plan.layers)


def test_without_any_loss_there_is_nothing_to_refine(propose, options):
    only_original = dict(itertools.islice(first_proofs(options).items(), 1))
    assert take(propose(only_original), 5) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("model.layers.12", "model.layers.*"),
        ("blocks.1.2.w1", "blocks.*.*.w1"),
        ("lm_head", "lm_head"),
        ("conv2d.weight2", "conv2d.weight2"),
    ],
)
def test_the_kind_of_a_layer_is_its_name_without_numbers(name, kind):
    assert layer_kind(name) == kind


def test_the_front_that_counts_lies_between_the_original_and_the_worst_plan_solved_for(options):
    known = first_proofs(options)
    growth = growth_of(known, "time")
    front = [
        prove(plan).selection_increase.value for plan, _ in known.values() if plan.kind == "front"
    ]
    original = next(proof for plan, proof in known.values() if plan.kind == "original")
    assert growth.reference == (original.request_ms / original.original_request_ms, max(front))
    assert growth_of(known, "time", 0.001).reference[1] == pytest.approx(0.004)
    assert len(growth.points) == len(known) and not growth.ended
    for _ in range(growth.patience):
        growth.add(None)
    assert growth.ended


@pytest.mark.parametrize("when", ["asked", "told"])
def test_a_database_that_refuses_in_the_middle_is_said_in_one_line(propose, options, store, when):
    running = propose(first_proofs(options))
    plan, tell = next(running)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE trials RENAME TO lost")
    with pytest.raises(StoreError, match=r"plan\.db") as error:
        next(running) if when == "asked" else tell(prove(plan))
    assert "\n" not in str(error.value)
