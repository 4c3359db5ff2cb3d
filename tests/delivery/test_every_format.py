"""Every format, kernel, route and joined group that this CPU has.

Applied, saved, loaded and run.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import autoquant
from autoquant.candidates import get_format
from autoquant.candidates.joined import whole_of
from autoquant.delivery import checkpoint
from autoquant.delivery.applier import module_bytes
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.errors import DeviceError
from autoquant.models import load_model

from .every_format import (
    NEW_TOKENS,
    ROWS,
    VOCABULARY,
    cases,
    make_llama,
    make_plan,
    outputs,
    outputs_elsewhere,
    ready,
    routes,
    save_llama,
)

CASES = {case.name: case for case in cases("cpu")}
IN_A_NEW_PROCESS = (
    "float16/plain",
    "int8-row/plain joined",
    "mxfp4/swizzled",
    "int4-g64-gptq/cpu-packed",
    "int3-g32/bit-planes",
    "static-int8/plain joined",
    "smooth-int8/plain",
    "awq-int4-g64/lanes",
    "nf4-g64/packed",
    "sparse24-int8-wanda/plain",
    "mixed 1",
)


@pytest.fixture(scope="module", autouse=True)
def alone():
    with ready("cpu"):
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return load_model(str(folder), dtype="bf16", device="cpu")


@pytest.fixture(scope="module")
def calibration():
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    return Calibration(ids)


@pytest.fixture
def put_in(original, calibration):
    """Apply a case to a copy of the model and save that: the copy, and the plan."""

    def apply(case, folder):
        if reason := case.unsupported("cpu"):
            pytest.skip(reason)
        loaded = replace(original, module=copy.deepcopy(original.module))
        plan = make_plan(loaded.module, case, "cpu")
        autoquant.apply(plan, loaded.module, calibration=calibration)
        checkpoint.write(loaded, plan, folder)
        return loaded.module, plan

    return apply


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_applied_saved_loaded_and_run(put_in, name, tmp_path):
    module, plan = put_in(CASES[name], tmp_path)
    again = autoquant.load(tmp_path)
    expected = outputs(module)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert expected["tokens"].shape[1] == max(ROWS) + NEW_TOKENS
    assert_same(outputs(again), expected)
    assert module_bytes(again) == module_bytes(module)
    for layer in plan.layers:
        before, after = (model.get_parameter(layer.parameters[0]).data for model in (module, again))
        assert type(after) is type(before)
        if layer.format != "bfloat16/plain":
            assert (after.format_id, after.route) == (layer.format, before.route)
            assert type(after.stored) is get_format(layer.format).tensor_type
        if layer.joined:
            assert whole_of(after) is not None


@pytest.mark.processes
def test_plans_are_loaded_and_run_by_a_new_process(put_in, tmp_path):
    expected, folders = {}, []
    for name in IN_A_NEW_PROCESS:
        folder = tmp_path / name.replace("/", " ")
        folder.mkdir()
        module, _ = put_in(CASES[name], folder)
        expected[folder.name] = outputs(module)
        folders.append(folder)
    found = outputs_elsewhere(folders, "cpu", tmp_path / "outputs.pt")
    for name, wanted in expected.items():
        assert_same(found[name], wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here_is_refused_before_anything_is_read(put_in, tmp_path):
    put_in(CASES["int8-row/plain"], tmp_path)
    with pytest.raises(DeviceError, match="sees no CUDA device"):
        autoquant.load(tmp_path, device="cuda")


def test_every_kernel_of_a_usable_format_is_in_some_case():
    """So that a kernel cannot be left out by how routes are handed out."""
    module = make_llama()
    for case in CASES.values():
        if len(case.formats) > 1 or case.joined or case.unsupported("cpu"):
            continue
        layers = make_plan(module, case, "cpu").layers
        used = {step.kernel for layer in layers for step in layer.route}
        ways = routes(get_format(case.formats[0]), "cpu")
        assert used == {step.kernel for way in ways for step in way} and {
            layer.route for layer in layers
        } == set(ways)
