"""Losses of tables whose rows are looked up: against brute force, apart from the head's."""

import math

import pytest
from models.tiny_models import as_loaded

from autoquant.evaluators.sensitivity import EVERY_LAYER, SENSITIVITIES, Change, fisher
from autoquant.profiler.record import record
from autoquant.records import LOOKUP, Workload
from autoquant.runtime.phases import make_phases

from .test_sensitivity import COARSE, INT8, SAME, brute_force, lively_llama

FORMATS = {"coarse": COARSE, "int8": INT8, "same": SAME}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def llama(request):
    return lively_llama(tied=request.param)


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr(fisher, "_LEAST_ROWS", 3600)


def table_of(module):
    phases = make_phases(as_loaded(module), Workload.parse("prefill=4"))
    (table,) = record(module, phases, tables=True).tables
    return table


@pytest.mark.parametrize("method", list(SENSITIVITIES))
def test_a_tables_loss_is_that_of_rounding_its_rows(llama, quality, mean_divergence, method):
    table, found = table_of(llama), {}
    changes = [Change(table, f"{name}+{LOOKUP}", fmt, LOOKUP) for name, fmt in FORMATS.items()]
    before = {name: each.clone() for name, each in llama.named_parameters()}
    SENSITIVITIES[method].score(llama, changes, quality, lambda _name, losses: found.update(losses))
    assert found.pop((table.name, f"same+{LOOKUP}")) == 0
    for name, tolerance in (("int8", 0.4), ("coarse", 0.6)):
        exact = brute_force(llama, table, FORMATS[name], LOOKUP, quality, mean_divergence)
        assert found[table.name, f"{name}+{LOOKUP}"] == pytest.approx(exact, rel=tolerance), name
        whole = found.get((EVERY_LAYER, f"{name}+{LOOKUP}"), exact)
        assert math.isclose(whole, exact, rel_tol=0.02)
    assert all(bool((before[name] == each).all()) for name, each in llama.named_parameters())


def test_the_heads_loss_is_apart_from_its_tables(quality, mean_divergence):
    llama = lively_llama(tied=True)
    phases = make_phases(as_loaded(llama), Workload.parse("prefill=4"))
    recording = record(llama, phases, tables=True)
    head = next(site for site in recording.sites if site.name == "lm_head")
    (table,) = recording.tables
    found = {}
    changes = [Change(head, "int8+a16", INT8, "a16"), Change(table, f"int8+{LOOKUP}", INT8, LOOKUP)]
    SENSITIVITIES["fisher"].score(
        llama, changes, quality, lambda _name, losses: found.update(losses)
    )
    for site, how in ((head, "a16"), (table, LOOKUP)):
        exact = brute_force(llama, site, INT8, how, quality, mean_divergence)
        assert found[site.name, f"int8+{how}"] == pytest.approx(exact, rel=0.4)
