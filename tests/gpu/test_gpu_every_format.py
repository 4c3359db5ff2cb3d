"""Every format, kernel, route and joined group that this GPU has.

Applied, saved, and run by a new process.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from delivery.every_format import (
    VOCABULARY,
    cases,
    is_tuned,
    make_plan,
    outputs,
    outputs_elsewhere,
    ready,
    save_llama,
)

import autoquant
from autoquant.candidates.flat import flatten_tensor, same_bits
from autoquant.delivery import checkpoint
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.models import load_model
from autoquant.runtime.request import MAX_RELATIVE_ERROR

pytestmark = pytest.mark.gpu

# Each group size of gemlite's takes as long to compile as everything else together.
LEFT_OUT = frozenset(
    f"int4-g{group}{rounding}/gemlite"
    for group in (32, 128)
    for rounding in ("", "-hqq", "-clip", "-gptq")
)
CASES = {case.name: case for case in cases("cuda", LEFT_OUT)} if torch.cuda.is_available() else {}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return load_model(str(folder), dtype="bf16", device="cuda")


@pytest.fixture(scope="module")
def models(original, tmp_path_factory):
    """By case: its folder, the model in memory, and what that computes; or what went wrong."""
    place = tmp_path_factory.mktemp("saved")
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(ids)
    made = {}
    with ready("cuda"):
        for number, case in enumerate(
            case for case in CASES.values() if not case.unsupported("cuda")
        ):
            loaded = replace(original, module=copy.deepcopy(original.module))
            folder = place / str(number)
            folder.mkdir()
            try:
                plan = make_plan(loaded.module, case, "cuda")
                autoquant.apply(plan, loaded.module, calibration=calibration)
                checkpoint.write(loaded, plan, folder)
                made[case.name] = (folder, loaded.module, outputs(loaded.module))
            except Exception as error:  # noqa: BLE001 - told by the case's own test
                made[case.name] = error
    return made


@pytest.fixture(scope="module")
def elsewhere(models, tmp_path_factory):
    """What a new process computes, by the folder's name."""
    folders = [made[0] for made in models.values() if isinstance(made, tuple)]
    return outputs_elsewhere(folders, "cuda", tmp_path_factory.mktemp("elsewhere") / "outputs.pt")


def assert_same(found, expected, *, exactly):
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].isfinite().all()
        if exactly:
            assert torch.equal(found[name], tensor), name
        elif name != "tokens":
            off = (found[name].float() - tensor.float()).norm() / tensor.float().norm()
            assert off < MAX_RELATIVE_ERROR, (
                name
            )  # what a search demands of a plan that it loads again


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_applied_saved_and_run_by_a_new_process(request, name):
    if why := CASES[name].unsupported("cuda"):
        pytest.skip(why)
    made = request.getfixturevalue("models")[name]
    if isinstance(made, Exception):
        raise made
    folder, module, expected = made
    found = request.getfixturevalue("elsewhere")[folder.name]
    assert_same(found, expected, exactly=not is_tuned(module))


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_loaded_onto_the_cpu_and_moved_to_the_gpu(models, name):
    if why := CASES[name].unsupported("cuda"):
        pytest.skip(why)
    if isinstance(models[name], Exception):
        pytest.skip("not applied")
    folder, module, _ = models[name]
    moved = autoquant.load(folder, device="cpu").to("cuda")
    for (parameter, one), other in zip(module.named_parameters(), moved.parameters(), strict=True):
        assert {part.device.type for part in (other.data, *flatten_tensor(other.data)[0])} == {
            "cuda"
        }, parameter
        assert type(other.data) is type(one.data) and same_bits(one.data, other.data), parameter


@torch.no_grad()
def test_a_moved_model_computes_the_same(models):
    for name in ("float8-row/plain", "int8-row/plain", "int4-g64/tiled", "mixed 0"):
        folder, module, expected = models[name]
        with ready("cuda"):
            found = outputs(autoquant.load(folder, device="cpu").to("cuda"))
        assert_same(found, expected, exactly=not is_tuned(module))
