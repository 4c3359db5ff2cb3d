"""The project's own CPU kernels, at sizes that their blocks do not divide."""

import logging
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from autoquant.candidates import get_format
from autoquant.candidates.kernels import cpu_source
from autoquant.errors import CandidateError
from autoquant.records import LinearShape

FORMATS = (
    "bfloat16/routed",
    "int8-row/plain",
    "int4-g32/lanes",
    "int4-g128/lanes",
    "int4s-g32/lanes",
    "int4s-g64/lanes",
)
SIZES = ((16, 1), (64, 64), (48, 172), (80, 40), (208, 257))
ROWS = (1, 2, 3, 4, 5, 16)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cpu_kernel(fmt):
    return fmt.kernel("cpu-rows")


def relative_error(y, expected):
    return ((y.float() - expected).norm() / expected.norm()).item()


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    """A machine that cannot compile, and has compiled nothing so far."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_source, "_warned", set())
    cpu_source.load_cpu_kernels.cache_clear()
    yield
    cpu_source.load_cpu_kernels.cache_clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("format_id", FORMATS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_any_size_and_number_of_rows_gives_the_product(format_id, n, k, dtype):
    fmt, dtype = get_format(format_id), getattr(torch, dtype)
    stored = fmt.store(numbers(n, k).to(dtype))
    bias = numbers(n, seed=1).to(dtype)
    for m in ROWS:
        x = numbers(m, k, seed=m).to(dtype)
        expected = F.linear(x.float(), fmt.dequantize(stored).float(), bias.float())
        y = cpu_kernel(fmt).linear(x, stored, bias)
        assert (y.shape, y.dtype) == ((m, n), dtype)
        exact = dtype == torch.float32 and format_id != "bfloat16/routed"
        assert relative_error(y, expected) < (1e-5 if exact else 6e-3)


@pytest.mark.parametrize("format_id", ["bfloat16/routed", "int8-row/plain"])
def test_a_weight_may_have_any_number_of_rows(format_id):
    fmt = get_format(format_id)
    for n in (1, 3, 17):
        stored = fmt.store(numbers(n, 96).bfloat16())
        x = numbers(2, 96, seed=1).bfloat16()
        expected = F.linear(x.float(), fmt.dequantize(stored).float())
        assert relative_error(cpu_kernel(fmt).linear(x, stored, None), expected) < 6e-3


@pytest.mark.parametrize("format_id", FORMATS)
def test_the_number_of_threads_changes_no_bit(format_id):
    fmt = get_format(format_id)
    stored, x = fmt.store(numbers(4096, 512).bfloat16()), numbers(3, 512, seed=1).bfloat16()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cpu_kernel(fmt).linear(x, stored, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("format_id", FORMATS)
def test_a_number_that_is_not_finite_stays_so_in_its_row_alone(format_id):
    fmt = get_format(format_id)
    stored, x = fmt.store(numbers(32, 64).bfloat16()), numbers(2, 64, seed=1).bfloat16()
    x[1, 7] = torch.nan
    y = cpu_kernel(fmt).linear(x, stored, None)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_loading_the_kernels_leaves_small_numbers_as_they_are():
    code = (
        "import torch; from autoquant.candidates.kernels.cpu_source import load_cpu_kernels; "
        "assert load_cpu_kernels() is None; "
        "assert (torch.tensor(1e-40) * torch.tensor(0.5)).item() > 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.parametrize("values", ["int4-g64", "int4s-g64"])
def test_many_rows_of_int4_are_multiplied_by_the_unpacked_weight(values):
    fmt = get_format(f"{values}/lanes")
    stored, x = fmt.store(numbers(48, 172).bfloat16()), numbers(2, 40, 172, seed=1).bfloat16()
    expected = F.linear(x.float(), fmt.dequantize(stored).float())
    y = fmt.kernel("unpack-matmul").linear(x, stored, None)
    assert relative_error(y, expected) < 8e-3


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cpu_int8_rows", lambda x: (x, torch.ones(8, 31, dtype=torch.int8), torch.ones(8), None)),
        ("cpu_int8_rows", lambda x: (x, torch.ones(8, 32, dtype=torch.int8), torch.ones(7), None)),
        ("cpu_int8_rows", lambda x: (x, torch.ones(8, 32), torch.ones(8), None)),
        ("cpu_bfloat16_rows", lambda x: (x, torch.ones(8, 32), None)),
        ("cpu_bfloat16_rows", lambda x: (x.double(), torch.ones(8, 32), None)),
        (
            "cpu_int4_lanes",
            lambda x: (x, torch.ones(16, 4, dtype=torch.int32), torch.ones(16, 3, 2), None),
        ),
        (
            "cpu_int4_lanes",
            lambda x: (x, torch.ones(8, 4, dtype=torch.int32), torch.ones(8, 1, 2), None),
        ),
        (
            "cpu_int4_lanes",
            lambda x: (x, torch.ones(16, 8, dtype=torch.int32), torch.ones(16, 2, 2), None),
        ),
        (
            "cpu_int4_lanes",
            lambda x: (x, torch.ones(16, 4, dtype=torch.int32), torch.ones(16, 1, 3), None),
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, arguments):
    assert cpu_source.cpu_kernels_work()
    with pytest.raises(RuntimeError, match=r"fit|scale|int8|bfloat16|dtype|take"):
        getattr(torch.ops.autoquant, name)(*arguments(torch.ones(1, 32)))


def test_without_a_compiler_the_kernel_says_what_it_needs(without_compiler):
    shape = LinearShape(n=64, k=64, bias=False, dtype="bfloat16")
    for format_id in FORMATS:
        fmt = get_format(format_id)
        reason = fmt.unsupported_reason(cpu_kernel(fmt), shape, 1, "cpu")
        assert reason is not None and "no-such-compiler" in reason and "install it" in reason


@pytest.mark.parametrize("format_id", FORMATS)
def test_without_a_compiler_library_kernels_stand_in_and_that_is_said_once(
    format_id, without_compiler, caplog
):
    fmt = get_format(format_id)
    stored, x = fmt.store(numbers(48, 172).bfloat16()), numbers(1, 172, seed=1).bfloat16()
    expected = F.linear(x.float(), fmt.dequantize(stored).float())
    with caplog.at_level(logging.WARNING, logger="autoquant"):
        for _ in range(2):
            assert relative_error(cpu_kernel(fmt).linear(x, stored, None), expected) < 8e-3
    assert [record.message.count("stand in") for record in caplog.records] == [1]


def test_a_machine_compiles_the_kernels_once(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    first = cpu_source._binary()

    def fail(*_arguments):
        raise CandidateError("compiled again")

    monkeypatch.setattr(cpu_source, "_compile", fail)
    assert cpu_source._binary() == first
    monkeypatch.setattr(cpu_source, "instructions", lambda: "another CPU")
    with pytest.raises(CandidateError, match="compiled again"):
        cpu_source._binary()


def test_a_source_that_does_not_compile_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_source, "_OPTIONS", "-std=c++20 -fsyntax-only -Dfloat=nothing")
    with pytest.raises(CandidateError, match="do not compile") as error:
        cpu_source._binary()
    assert "\n" not in str(error.value)
