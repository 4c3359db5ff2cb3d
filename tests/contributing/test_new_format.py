"""A new format with its kernel: one file, and one line that names it.

In a package of one's own the line is an entry point, as here; inside the project it is the module's
name in `_built_in` of `candidates/registry.py`. That the kernel is timed and checked like any other
is tested with the page on candidates of one's own (`docs/guides/own-candidate.md`).
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from models.tiny_models import tiny_llama
from torch import nn
from typer.testing import CliRunner

from autoquant.candidates import get_format, registry
from autoquant.candidates.routed import RoutedWeight
from autoquant.cli.main import app
from autoquant.delivery import checkpoint
from autoquant.records import RouteStep

FILES = {
    "sign_format.py": '''"""Only the sign of each number, times their mean magnitude."""

import torch
import torch.nn.functional as F

from autoquant.candidates import A16, Format, Kernel


def quantize(weight):
    return torch.sign(weight) * weight.abs().mean()


def multiply(x, stored, bias):
    return F.linear(x, stored, bias)


SIGN = Format(
    id="sign/plain",
    quantize=quantize,
    dequantize=lambda stored: stored.float(),
    kernels=(Kernel(id="matmul", numerics=A16, linear=multiply),),
    description="signs",
)
''',
    "sign_format-1.0.dist-info/entry_points.txt": """[autoquant.candidates]
sign = sign_format:SIGN
""",
}
ROUTE = (RouteStep(upper_m=None, kernel="matmul"),)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The two files, where Python finds them."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    registry._from_entry_points.cache_clear()
    yield
    registry._from_entry_points.cache_clear()
    sys.modules.pop("sign_format", None)


def test_a_new_format_and_its_kernel_take_two_files():
    assert len(FILES) == 2


def test_the_commands_know_the_new_format(installed):
    result = CliRunner().invoke(app, ["candidates", "--device", "cpu", "--json"])
    found = {each["format"]: each for each in json.loads(result.stdout)}
    assert found["sign/plain"]["kernel"] == "matmul" and found["sign/plain"]["usable"]


def test_a_model_computes_with_the_new_format_and_is_saved_in_it(installed, tmp_path):
    fmt, model, skeleton = get_format("sign/plain"), tiny_llama(), tiny_llama()
    wanted = {}
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear):
            weight = child.weight.data
            wanted[f"{name}.weight"] = fmt.quantize(weight)
            routed = RoutedWeight.wrap(fmt.store(weight), fmt.id, ROUTE, weight.dtype)
            child.weight = nn.Parameter(routed, requires_grad=False)
    projection = model.model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj.weight"
    x = torch.randn(3, projection.in_features, dtype=torch.bfloat16)
    assert torch.equal(projection(x), F.linear(x, wanted[name]))

    folder = tmp_path / "saved"
    folder.mkdir()
    about = {name: "made-up" for name in ("plan_id", "study_id", "label", "model_hash")}
    about |= {"dtype": "bfloat16", "device": "cpu", "source": {"kind": "live"}, "joined": []}
    checkpoint.write_module(model, about, folder)
    again = checkpoint.read(folder, skeleton)
    for name, numbers in wanted.items():
        assert torch.equal(again.get_parameter(name).data.stored, numbers)
