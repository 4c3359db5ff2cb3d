"""Quantized embeddings: applied, saved with their ties, loaded elsewhere, exported or refused."""

import re

import pytest
import torch
from end_to_end.conftest import python

import autoquant
from autoquant.candidates import get_format
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery.applier import applied, module_bytes
from autoquant.delivery.exporting import export_to_disk
from autoquant.delivery.kernel_check import check_kernels
from autoquant.delivery.programs.exporting import export_programs
from autoquant.engines import PROGRAMS
from autoquant.errors import KernelError, PlanError
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.profiler.record import record_model
from delivery.targets.conftest import WORKLOAD, Planned, save_llama

IDS = torch.tensor([[3, 4, 5, 9], [1, 1, 95, 0]])
TABLE, HEAD = "model.embed_tokens", "lm_head"
INT8 = ("int8-row/plain", "int-mm")
INT4 = ("int4-g32/lanes", "unpack-matmul")
PLAIN = ("bfloat16/plain", "matmul")
PAIRS = [(INT8, INT8), (INT4, INT4), (INT4, INT8), (INT8, PLAIN), (PLAIN, INT8), (PLAIN, PLAIN)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def planned(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return Planned(save_llama(folder, tied=request.param), tables=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Planned(save_llama(tmp_path_factory.mktemp("tied"), tied=True), tables=True)


def quantized(planned, head, table):
    """The model with both in these formats, everything else in int8."""
    module = load_model(planned.folder, device="cpu").module
    plan = planned.plan({"proj": INT8, HEAD: head, TABLE: table})
    return plan, autoquant.apply(plan, module)


def logits(module):
    with torch.no_grad():
        return module(IDS).logits


def bytes_in(weight, fmt):
    """Return the bytes that a weight takes in a format."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(get_format(fmt).store(weight), requires_grad=False)
    return module_bytes(holder)


@pytest.mark.parametrize(("head", "table"), PAIRS)
def test_rows_are_those_that_the_format_stores(planned, head, table):
    original = load_model(planned.folder, device="cpu").module.model.embed_tokens.weight.data
    _, module = quantized(planned, head, table)
    fmt = get_format(table[0])
    expected = fmt.dequantize(fmt.store(original)).to(torch.bfloat16)
    assert torch.equal(module.model.embed_tokens(IDS), expected[IDS])


@pytest.mark.parametrize(("head", "table"), PAIRS)
def test_a_pair_of_one_format_is_stored_once(tied, head, table):
    module = load_model(tied.folder, device="cpu").module
    weight = module.lm_head.weight.data
    pair = {fmt: bytes_in(weight, fmt) for fmt, _ in (head, table)}
    others = module_bytes(applied(tied.plan({"proj": INT8}), module, None)) - weight.nbytes
    _, after = quantized(tied, head, table)
    assert module_bytes(after) == others + sum(pair.values())
    same = head == table
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == same


@pytest.mark.parametrize(("head", "table"), [(INT8, INT8), (INT4, INT8), (PLAIN, INT8)])
def test_a_saved_model_is_the_same_when_it_is_loaded(planned, head, table, tmp_path):
    _, module = quantized(planned, head, table)
    autoquant.save(module, tmp_path / "out")
    again = autoquant.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(module))
    assert module_bytes(again) == module_bytes(module)
    names = [TABLE, HEAD]
    tied = [
        [again.get_submodule(name).weight is part.weight for name in names]
        for part in (again.model.embed_tokens, again.lm_head)
    ]
    shared = module.model.embed_tokens.weight is module.lm_head.weight
    assert tied == [[True, shared], [shared, True]]


def test_a_shared_table_is_in_the_files_once(tied, tmp_path):
    from safetensors import safe_open

    _, module = quantized(tied, INT8, INT8)
    autoquant.save(module, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        found = [
            name
            for name in file.keys()  # noqa: SIM118  not a mapping
            if "embed_tokens" in name or "lm_head" in name
        ]
    assert {name.partition(":")[0].rpartition(".")[0] for name in found} == {TABLE}, found


def test_transformers_loads_and_generates_in_a_new_process(tied, tmp_path):
    _, module = quantized(tied, INT4, INT8)
    autoquant.save(module, tmp_path / "out")
    code = (
        "import sys, torch, autoquant; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(type(model.model.embed_tokens.weight.data).__name__,"
        " model.model.embed_tokens.weight is model.lm_head.weight);"
        "print(model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)"
        ".tolist())"
    )
    done = python("-c", code, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    kind, ids = done.stdout.strip().splitlines()[-2:]
    assert kind == "RoutedWeight False"
    expected = module.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False)
    assert ids == str(expected.tolist())


@pytest.mark.parametrize("table", [INT8, INT4])
def test_compiled_code_sees_plain_tensors(tied, table):
    _, module = quantized(tied, table, table)
    embedding = module.model.embed_tokens
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    found = torch.compile(embedding, backend=keep, fullgraph=True)(IDS)
    assert torch.equal(found, embedding(IDS))
    values = [node.meta.get("example_value") for node in graphs[0].graph.nodes]
    assert not any(isinstance(value, RoutedWeight) for value in values)


def test_an_embedding_that_scales_its_rows_still_does(tied):
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    _, module = quantized(tied, INT8, INT8)
    rows = module.model.embed_tokens(IDS)
    scaled = Scaled(96, 64).to(torch.bfloat16)
    scaled.weight = module.model.embed_tokens.weight
    from autoquant.candidates.linears import take_apart

    take_apart(scaled)
    assert isinstance(scaled, Scaled)
    assert torch.equal(scaled(IDS), 3 * rows)
    assert torch.equal(torch.compile(scaled, backend="eager")(IDS), 3 * rows)


def test_a_lookup_of_other_rows_than_are_stored_is_refused(tied, monkeypatch):
    from autoquant.candidates import lookups

    _, module = quantized(tied, INT8, INT8)
    right = get_format("int8-row/plain").lookup
    monkeypatch.setitem(lookups._FUNCTIONS, "int8-row/plain", lambda s, rows: right(s, rows ^ 1))
    with pytest.raises(KernelError, match=r"int8-row/plain/lookup .*model\.embed_tokens"):
        check_kernels(module)


def test_a_quantized_table_multiplies_nothing(tied):
    _, module = quantized(tied, INT4, INT8)
    with pytest.raises(autoquant.AutoquantError, match="not to multiply"):
        torch.nn.functional.linear(torch.ones(1, 64).bfloat16(), module.model.embed_tokens.weight)


@pytest.mark.parametrize("to", ["compressed-tensors", "transformers", "modelopt"])
def test_targets_without_quantized_embeddings_refuse_them_by_name(tied, to, tmp_path):
    plan = tied.plan({TABLE: INT8, HEAD: INT8})
    with pytest.raises(PlanError, match=rf"{TABLE}.*{to} holds embeddings unquantized"):
        export_to_disk(plan, tied.folder, tmp_path / "out", to=to, facts=tied.facts)


def test_a_table_is_tied_only_to_a_layer_that_is_searched(tmp_path):
    loaded = load_model(save_llama(tmp_path / "model", tied=True), device="cpu")
    left = record_model(loaded, WORKLOAD, ignore)
    assert left.tables == ()
    assert any(re.search("--embeddings", part.reason) for part in left.skipped)
    found = record_model(loaded, WORKLOAD, ignore, tables=True)
    (table,) = found.tables
    assert (table.name, table.tied) == (TABLE, HEAD)
    assert [(use.phase, use.m) for use in table.uses] == [("prefill", 4), ("decode", 1)]
    assert not any(site.kept for site in found.sites)


def test_programs_refuse_a_quantized_table_by_name(tied, tmp_path):
    plan = tied.plan({TABLE: INT8, HEAD: INT8})
    with pytest.raises(PlanError, match=rf"pt2 holds embeddings unquantized.*{TABLE}"):
        export_programs(plan, tied.folder, tmp_path / "out", form=PROGRAMS["pt2"], facts=tied.facts)
    assert not (tmp_path / "out").exists()
