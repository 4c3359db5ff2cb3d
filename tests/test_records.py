import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from autoquant.errors import WorkloadError
from autoquant.records import (
    Device,
    Interval,
    LayerChoice,
    LinearShape,
    Measurement,
    Phase,
    Plan,
    Prediction,
    Proof,
    Recording,
    RouteStep,
    Site,
    SiteUse,
    Skipped,
    TimingSubject,
    Workload,
    content_key,
    route_kernel,
)
from autoquant.store.columns import to_json
from autoquant.typed import read

SHAPE = LinearShape(n=64, k=32, bias=True, dtype="bfloat16")
ROUTE = (
    RouteStep(upper_m=4, kernel="packed"),
    RouteStep(upper_m=64, kernel="wide"),
    RouteStep(upper_m=None, kernel="mm"),
)
LAYER = LayerChoice(
    name="blocks.0.up",
    shape=SHAPE,
    format="int8-row/plain",
    route=ROUTE,
    numerics="int8-row:a16",
    latency_us={"prefill": 12.5, "decode": 1.25},
    memory_bytes=2176,
    loss=1e-5,
    parameters=("blocks.0.up.weight", "blocks.1.up.weight"),
    reason="fastest",
)
PREFILL = Phase(name="prefill", tokens=512, calls=1)
DECODE = Phase(name="decode", tokens=1, calls=128)


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("prefill=512,decode=128", (PREFILL, DECODE)),
        ("decode=128,prefill=512", (PREFILL, DECODE)),
        (" prefill=512 , decode=128 ", (PREFILL, DECODE)),
        ("prefill=512", (PREFILL,)),
        ("decode=128", (DECODE,)),
        ("prefill=1", (Phase(name="prefill", tokens=1, calls=1),)),
    ],
)
def test_a_workload_reads_prefill_tokens_and_decode_steps(text, phases):
    assert Workload.parse(text, 3) == Workload(phases=phases, batch=3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prefill",
        "prefill=",
        "=512",
        "512",
        "prefill=0",
        "decode=-1",
        "prefill=1.5",
        "prefill=many",
        "prefill=512,",
        "prefill=1,prefill=2",
        "train=3",
        "Prefill=3",
        "prefill=512;decode=128",
        "prefill=512 decode=128",
        "prefill=5 12",
        "prefill=\u00b2",
        pytest.param("prefill=" + "9" * 5000, id="a number of 5000 digits"),
    ],
)
def test_a_workload_of_another_form_is_refused_in_one_line_that_shows_the_form(text):
    with pytest.raises(WorkloadError, match="prefill=TOKENS,decode=STEPS") as refused:
        Workload.parse(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("batch", [0, -2])
def test_a_batch_below_one_is_refused(batch):
    with pytest.raises(WorkloadError, match=str(batch)):
        Workload.parse("prefill=512", batch)


@pytest.mark.parametrize("text", ["prefill=512,decode=128", "prefill=7", "decode=1"])
def test_a_workload_is_shown_as_it_is_written(text):
    assert str(Workload.parse(text)) == text
    assert str(Workload.parse(text, 4)) == f"{text} batch=4"


def test_a_workload_knows_the_calls_of_each_phase():
    assert Workload.parse("prefill=512,decode=128").calls() == {"prefill": 1, "decode": 128}
    assert Workload.single().calls() == {"forward": 1}


@pytest.mark.parametrize(
    ("m", "kernel"),
    [(1, "packed"), (4, "packed"), (5, "wide"), (64, "wide"), (65, "mm"), (10**6, "mm")],
)
def test_a_route_step_holds_up_to_its_upper_m_inclusive(m, kernel):
    assert route_kernel(ROUTE, m) == kernel


def test_a_route_without_an_open_end_uses_its_last_kernel_beyond_it():
    assert route_kernel(ROUTE[:2], 1000) == "wide"


def test_a_recording_survives_json():
    site = Site(
        name="up",
        parameters=("up.weight", "down.weight"),
        shape=SHAPE,
        uses=(SiteUse(phase="prefill", m=512, calls=1), SiteUse(phase="decode", m=1, calls=2)),
        kept=("embedding.weight",),
        siblings=("up", "gate"),
    )
    recording = Recording(
        sites=(site, replace(site, name="gate", kept=(), siblings=())),
        skipped=(
            Skipped(name="conv", numel=10, share=0.25, reason="not used as a linear: conv2d"),
        ),
        weights_share=0.75,
        flops_share={"prefill": 0.9, "decode": 0.99},
        parameter_bytes=12345,
    )
    assert read(Recording, to_json(recording)) == recording


def test_a_layer_choice_survives_json():
    assert read(LayerChoice, to_json(LAYER)) == LAYER
    plain = replace(LAYER, parameters=(), route=ROUTE[2:], reason="")
    assert read(LayerChoice, to_json(plain)) == plain


@pytest.mark.parametrize("perplexity", [None, 14.25])
def test_a_proof_survives_json(perplexity):
    proof = Proof(
        plan_id="p",
        request_ms=90.5,
        phase_ms={"prefill": 20.5, "decode": 1.25},
        original_request_ms=130.0,
        original_phase_ms={"prefill": 25.0, "decode": 2.0},
        perplexity=perplexity,
        loss=2.5,
        increase=Interval(value=0.01, low=-0.001, high=float("inf")),
        selection_increase=Interval(value=0.02, low=0.01, high=0.03),
        kl=None if perplexity is None else 0.003,
        memory_bytes=10**10,
        execution="eager",
        notes=("timed while the machine was busy",),
    )
    assert read(Proof, to_json(proof)) == proof


def test_a_proof_without_notes_is_read_too():
    proof = Proof(
        plan_id="p",
        request_ms=1.0,
        phase_ms={},
        original_request_ms=1.0,
        original_phase_ms={},
        perplexity=None,
        loss=0.0,
        increase=Interval(value=0.0, low=0.0, high=0.0),
        selection_increase=Interval(value=0.0, low=0.0, high=0.0),
        kl=None,
        memory_bytes=0,
    )
    data = json.loads(to_json(proof))
    del data["notes"]
    assert read(Proof, json.dumps(data)) == proof


def test_a_workload_survives_json():
    workload = Workload.parse("prefill=512,decode=128", 2)
    assert read(Workload, to_json(workload)) == workload


def test_a_content_key_is_the_hash_of_canonical_json():
    expected = hashlib.sha256(b'{"a":[1,2],"b":null}').hexdigest()
    assert content_key({"b": None, "a": (1, 2)}) == expected[:12]
    assert content_key({"a": [1, 2], "b": None}, length=20) == expected[:20]


def test_content_keys_tell_values_apart():
    values = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"b": 1}, [], {}, None, "", ["a", 1]]
    assert len({content_key(value) for value in values}) == len(values)


def test_a_content_key_is_the_same_in_every_process():
    device = Device(
        type="cpu",
        name="c",
        capability="v",
        threads=2,
        cache_bytes=1,
        versions={"torch": "2", "b": "1"},
    )
    code = (
        "from autoquant.records import Device\n"
        "print(Device(versions={'b': '1', 'torch': '2'}, cache_bytes=1, threads=2, "
        "capability='v', name='c', type='cpu').key)"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == device.key


@pytest.mark.parametrize(
    ("samples", "median", "spread"),
    [((3.0,), 3.0, 0.0), ((4.0, 1.0, 2.0), 2.0, 3.0), ((4.0, 1.0, 3.0, 2.0), 2.5, 2.0)],
)
def test_latency_is_the_median_of_the_samples_in_any_order(samples, median, spread):
    subject = TimingSubject(
        shape=SHAPE, m=1, format="int8-row/plain", kernel="int-mm", working_set_bytes=1
    )
    measurement = Measurement(subject=subject, outcome="ok", samples_us=samples)
    assert (measurement.latency_us, measurement.spread_us) == (median, spread)
    assert subject.candidate == "int8-row/plain/int-mm"


def test_a_plan_counts_its_formats_most_used_first():
    layers = (replace(LAYER, format="b/x"), LAYER, LAYER)
    prediction = Prediction(request_ms=1.0, linear_ms=1.0, loss=0.0, memory_bytes=1)
    plan = Plan(
        plan_id="p",
        study_id="s",
        label="front",
        kind="front",
        model_hash="m",
        dtype="bfloat16",
        layers=layers,
        prediction=prediction,
    )
    assert list(plan.formats().items()) == [("int8-row/plain", 2), ("b/x", 1)]


def test_records_cannot_be_changed_and_need_names():
    with pytest.raises(AttributeError):
        LAYER.loss = 0.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        LinearShape(64, 32, True, "bfloat16")  # type: ignore[misc]
    assert asdict(SHAPE) == {"n": 64, "k": 32, "bias": True, "dtype": "bfloat16"}
    assert str(SHAPE) == "64x32+bias:bfloat16"
