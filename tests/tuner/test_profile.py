"""Timing linears without a search: which cells are timed, how cold, what comes out, and what is not timed again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autoquant
from autoquant.devices import backend
from autoquant.errors import CandidateError, WorkloadError
from autoquant.models import ModelRequest
from autoquant.profiler import measure
from autoquant.profiler.floor import floor_us
from autoquant.profiler.latencies import COLUMNS
from autoquant.records import Measurement, Roofline, Workload
from autoquant.tuner import profile as module
from autoquant.tuner.profile import time_linears
from autoquant.tuner.profile_request import ProfileRequest, ShapesRequest, linears_of

ROOFLINE = Roofline(bandwidth_bytes_per_s=1e9, flops_per_s={"float32": 1e9, "bfloat16": 4e9})
INT8 = ("int8-row/plain/int8pack-mm", "int8-row/plain/int-mm")


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Nothing is really timed: a cell takes m microseconds; returns the comparisons that are made."""
    compared = []

    def compare(shape, m, candidates, *, arena, **_options):
        compared.append((str(shape), m, arena.bytes.numel()))
        measurements = []
        for candidate in candidates:
            fmt, kernel = candidate.format, candidate.kernel
            subject = measure.TimingSubject(
                shape=shape,
                m=m,
                format=fmt.id,
                kernel=kernel.id,
                working_set_bytes=arena.bytes.numel(),
            )
            if kernel.id == "int-mm" and m == 1:
                measurements.append(
                    Measurement(subject=subject, outcome="bounded", reason="cannot win")
                )
                continue
            samples = (float(m), float(m), m + 1.0, m + 2.0)
            measurements.append(
                Measurement(subject=subject, outcome="ok", samples_us=samples, relative_error=0.001)
            )
        return measurements

    monkeypatch.setattr(measure, "compare", compare)
    monkeypatch.setattr(module, "undisturbed_roofline", lambda *_arguments, **_options: ROOFLINE)
    monkeypatch.setenv("AUTOQUANT_EAGER", "1")
    return compared


@pytest.fixture
def profile(tmp_path):
    def run(**options):
        on = {"device": options.pop("device", "cpu"), "dtype": options.pop("dtype", "auto")}
        inputs = options.pop("sample_inputs", None)
        model, shapes = options.pop("model", None), options.pop("shapes", None)
        linears = linears_of(
            None if model is None else ModelRequest(model=model, sample_inputs=inputs, **on),
            None if shapes is None else ShapesRequest(shapes=shapes, **on),
        )
        defaults = {
            "candidates": INT8,
            "db": tmp_path / "timings.db",
            "rows": None,
            "workload": None,
            "batch": 1,
        }
        if "workload" in options:
            options["workload"] = Workload.parse(options["workload"], options.get("batch", 1))
        return time_linears(ProfileRequest(linears=linears, **(defaults | options)))

    return run


def perceptron():
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)
    )


def test_every_shape_is_timed_at_every_m_and_the_unquantized_weight_too(profile):
    latencies = profile(shapes=["64x32 q", "32x64+bias"], rows=(1, 4))
    seen = [
        (row["n"], row["k"], row["bias"], row["m"], f"{row['format']}/{row['kernel']}")
        for row in latencies.rows
    ]
    assert seen == [
        (n, k, bias, m, candidate)
        for n, k, bias in ((64, 32, False), (32, 64, True))
        for m in (1, 4)
        for candidate in ("bfloat16/plain/matmul", *INT8)
    ]
    assert all(tuple(row) == COLUMNS for row in latencies.rows)


def test_a_row_says_what_was_measured_and_the_least_that_it_could_be(profile):
    latencies = profile(shapes=["64x32"], rows=(1, 4))
    (shape,) = latencies.shapes()
    by_key = {(row["m"], row["kernel"]): row for row in latencies.rows}
    original, packed = by_key[4, "matmul"], by_key[4, "int8pack-mm"]
    assert (original["latency_us"], original["spread_us"], original["relative_error"]) == (
        4.5,
        2.0,
        0.001,
    )
    assert original["floor_us"] == pytest.approx(
        floor_us(ROOFLINE, shape, 4, 64 * 32 * 2, "bfloat16")
    )
    assert packed["floor_us"] == pytest.approx(
        floor_us(ROOFLINE, shape, 4, 64 * 32 + 64 * 2, "bfloat16")
    )
    assert (packed["numerics"], by_key[4, "int-mm"]["numerics"]) == ("a16", "a8-row")
    bounded = by_key[1, "int-mm"]
    assert (bounded["outcome"], bounded["latency_us"], bounded["reason"]) == (
        "bounded",
        None,
        "cannot win",
    )


def test_the_floor_of_a_large_weight_is_that_of_all_its_rows(profile):
    latencies = profile(shapes=["1024x64"], rows=(1,), candidates=("int8-row/plain/int8pack-mm",))
    (shape,) = latencies.shapes()
    assert latencies.rows[1]["floor_us"] == pytest.approx(
        floor_us(ROOFLINE, shape, 1, 1024 * 64 + 1024 * 2, "bfloat16")
    )


def test_shapes_without_rows_or_workload_are_timed_at_one_to_many_rows(profile, timed):
    profile(shapes=["8x16"])
    assert [m for _, m, _ in timed] == [1, 16, 128, 2048]


def test_shapes_are_timed_at_the_rows_that_a_workload_has(profile, timed):
    profile(shapes=["8x16"], workload="prefill=8,decode=4", batch=3)
    assert [m for _, m, _ in timed] == [3, 24]


def test_shapes_are_timed_as_cold_as_in_a_model_larger_than_the_cache(profile, timed, monkeypatch):
    monkeypatch.setattr("autoquant.devices.cpu._cache_bytes", lambda: 3 << 20)
    profile(shapes=["64x32"], rows=(1,))
    assert timed[0][2] == 4 << 20, "twice the cache, rounded down to a power of two"


def test_a_second_call_times_nothing(profile, timed):
    first = profile(shapes=["64x32"], rows=(1, 4))
    assert (first.from_store, len(timed)) == (0, 2)
    again = profile(shapes=["64x32"], rows=(1, 4, 8))
    assert (again.from_store, len(timed)) == (6, 3)
    assert again.rows[:6] == first.rows


@pytest.mark.parametrize(
    ("dtype", "stored"), [("auto", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_shapes_have_the_dtype_asked_for(profile, dtype, stored):
    rows = profile(shapes=["64x32"], rows=(4,), dtype=dtype, candidates=("int8*",)).rows
    assert {row["dtype"] for row in rows} == {stored}
    assert rows[0]["format"] == f"{stored}/plain"


def test_a_model_is_timed_at_the_rows_that_it_really_gives_its_layers(profile, timed):
    module = perceptron()
    latencies = profile(model=module, sample_inputs=(torch.randn(3, 5, 32),))
    assert [(shape, m) for shape, m, _ in timed] == [
        ("64x32+bias:float32", 15),
        ("64x64+bias:float32", 15),
    ]
    assert list(latencies.names.values()) == [("0",), ("2", "4")]
    assert latencies.source == "Sequential"


def test_rows_override_those_of_a_models_workload(profile, timed):
    profile(model=perceptron(), sample_inputs=(torch.randn(3, 32),), rows=(2, 7))
    assert [m for _, m, _ in timed] == [2, 7, 2, 7]


def test_a_models_weights_are_as_cold_as_a_search_has_them(profile, timed):
    module = perceptron()
    profile(model=module, sample_inputs=(torch.randn(3, 32),))
    shapes = [
        measure.LinearShape(n=n, k=k, bias=True, dtype="float32")
        for n, k in ((64, 32), (64, 64), (64, 64))
    ]
    assert timed[0][2] == measure.working_set_bytes(shapes, backend("cpu").fingerprint(), 4)


def test_the_public_function_gives_a_data_frame(tmp_path):
    frame = autoquant.profile(
        shapes=["64x32"],
        rows=[1, 4],
        device="cpu",
        candidates=INT8,
        db=str(tmp_path / "timings.db"),
    )
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 6
    assert frame[frame.outcome == "ok"].latency_us.min() == 1.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either a model or shapes"),
        ({"model": "m", "shapes": ["8x8"]}, "either a model or shapes"),
        ({"shapes": ["8x8"], "rows": ()}, "from 1 on"),
        ({"shapes": ["8x8"], "rows": (0,)}, "from 1 on"),
        ({"shapes": ["8x8"], "rows": (1,), "workload": "decode=4"}, "either rows or a workload"),
        ({"shapes": ["8x8"], "rows": (1,), "batch": 2}, "a batch needs a workload"),
        ({"shapes": []}, "holds no shape"),
        ({"shapes": ["8x8"], "workload": "decode"}, "prefill=TOKENS"),
    ],
)
def test_requests_that_make_no_sense_are_refused_and_leave_no_database(
    profile, tmp_path, options, says
):
    with pytest.raises(WorkloadError, match=says):
        profile(**options)
    assert list(tmp_path.iterdir()) == []


def test_a_glob_that_matches_nothing_is_refused_and_leaves_no_database(profile, tmp_path):
    with pytest.raises(CandidateError, match="no candidate matches"):
        profile(shapes=["8x8"], candidates=("int9*",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ("int8-row/plain/int-mm", "int8"),
        ("int8-row/plain/int8pack-mm", "bfloat16"),
        ("float8-row/plain/dequantize-matmul", "bfloat16"),
        ("float16/plain/matmul", "float16"),
    ],
)
def test_arithmetic_is_that_of_the_activation_as_the_kernel_has_it(candidate, expected):
    (found,) = module.select([candidate])
    assert (found.kernel.arithmetic or "bfloat16") == expected
