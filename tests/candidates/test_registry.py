"""Which candidates there are, by name, and how others are added."""

import pytest
import torch.nn.functional as F

import autoquant
from autoquant.candidates import (
    A16,
    Format,
    Kernel,
    get_format,
    known_formats,
    register,
    registry,
    select,
    survey,
)
from autoquant.errors import CandidateError


def own_format(name="own/plain"):
    return Format(
        id=name,
        quantize=lambda weight: weight.clone(),
        dequantize=lambda stored: stored.float(),
        kernels=(Kernel(id="matmul", numerics=A16, linear=F.linear),),
        description="weights as they are",
    )


def ids(globs):
    return [each.id for each in select(globs)]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (["int8-row/plain/int-mm"], ["int8-row/plain/int-mm"]),
        (["bfloat16/plain"], ["bfloat16/plain/matmul"]),
        (
            ["bfloat16"],
            ["bfloat16/plain/matmul", "bfloat16/routed/cpu-rows", "bfloat16/routed/matmul"],
        ),
        (["float*/plain/matmul"], ["float32/plain/matmul", "float16/plain/matmul"]),
        (["*/int4pack-mm"], [f"int4-g{group}/cpu-packed/int4pack-mm" for group in (32, 64, 128)]),
        (
            ["int4-g64/cpu*"],
            ["int4-g64/cpu-packed/int4pack-mm", "int4-g64/cpu-packed/dequantize-matmul"],
        ),
        (
            ["*row/plain/int-mm", "float16", "float16/*"],
            ["float16/plain/matmul", "int8-row/plain/int-mm"],
        ),
        ([], []),
    ],
)
def test_candidates_are_chosen_by_glob_in_the_registrys_order(globs, expected):
    assert ids(globs) == expected


def test_a_star_chooses_every_kernel_of_every_format():
    assert ids(["*"]) == [
        f"{fmt.id}/{kernel.id}" for fmt in known_formats().values() for kernel in fmt.kernels
    ]


def opt_in_format():
    return Format(
        id="slow/plain",
        quantize=lambda weight: weight.clone(),
        dequantize=lambda stored: stored.float(),
        kernels=(Kernel(id="matmul", numerics=A16, linear=F.linear),),
        by_default=lambda device_type: device_type == "cuda",
    )


@pytest.mark.parametrize(
    ("globs", "device", "chosen"),
    [
        (["*"], "cpu", False),
        (["*"], "cuda", True),
        (["*", "int8-row"], "cpu", False),
        (["*", "slow"], "cpu", True),
        (["sl*"], "cpu", True),
        (["*/matmul"], "cpu", True),
    ],
)
def test_a_star_for_a_device_leaves_out_what_must_be_asked_for_there(
    own_registry, globs, device, chosen
):
    register(opt_in_format())
    found = [each.id for each in select(globs, device)]
    assert ("slow/plain/matmul" in found) is chosen
    assert "bfloat16/plain/matmul" in found or "*" not in globs


def test_a_star_for_a_device_leaves_out_kernels_that_must_be_named():
    def found(*globs):
        return {each.id for each in select(globs, "cuda") if "gemlite" in each.kernel.id}

    named = {f"float8-row/plain/{kernel}" for kernel in ("gemlite", "gemlite-dynamic")}
    assert not named & found("*") and "int8-row/plain/gemlite" in found("*")
    assert named <= found("*", "*/gemlite*") and named <= found("float8*")
    by_default = {(each.format, each.kernel): each.by_default for each in survey("cuda")}
    assert by_default["float8-row/plain", "rows"] and not by_default["float8-row/plain", "gemlite"]


def test_the_survey_tells_what_must_be_asked_for(own_registry):
    register(opt_in_format())
    for device in ("cpu", "cuda"):
        defaults = {status.format: status.by_default for status in survey(device)}
        assert defaults["slow/plain"] is (device == "cuda") and defaults["bfloat16/plain"] is True


@pytest.mark.parametrize("glob", ["int9", "int8-row/plain/int-m", ""])
def test_a_glob_that_matches_nothing_is_refused_by_name(glob):
    with pytest.raises(CandidateError, match=f"no candidate matches '{glob}'"):
        select(["*", glob])


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(CandidateError, match="no format 'int9/plain'"):
        get_format("int9/plain")


def test_a_format_of_ones_own_stands_behind_the_built_in_ones(own_registry):
    fmt = own_format()
    autoquant.register(fmt)
    assert get_format("own/plain") is fmt
    assert ids(["own*"]) == ["own/plain/matmul"] and ids(["*"])[-1] == "own/plain/matmul"
    status = survey("cpu")[-1]
    assert (status.format, status.kernel, status.usable, status.reason) == (
        "own/plain",
        "matmul",
        True,
        "",
    )
    assert status.description.startswith("weights as they are")


def test_registering_the_same_format_again_is_fine(own_registry):
    fmt = own_format()
    register(fmt)
    register(fmt)
    assert ids(["own"]) == ["own/plain/matmul"]


@pytest.mark.parametrize("name", ["own/plain", "int8-row/plain"])
def test_another_format_under_a_known_id_is_refused(own_registry, name):
    register(own_format("own/plain"))
    before = known_formats()
    with pytest.raises(CandidateError, match=f"'{name}' exists already"):
        register(own_format(name))
    assert known_formats() == before


def test_the_survey_gives_a_reason_for_all_that_cannot_be_used():
    statuses = {(status.format, status.kernel): status for status in survey("cuda")}
    assert len(statuses) == len(select(["*"]))
    assert all(bool(status.reason) != status.usable for status in statuses.values())
    assert statuses["bfloat16/plain", "matmul"].usable
    assert not statuses["int4-g32/cpu-packed", "int4pack-mm"].usable


def test_the_survey_knows_no_model():
    for status in survey("cpu"):
        assert "model" not in status.reason, status
    assert "float32/plain" in [status.format for status in survey("cpu") if status.usable]


class EntryPoint:
    def __init__(self, value, loaded):
        self.value = value
        self._loaded = loaded

    def load(self):
        return self._loaded


@pytest.fixture
def plug_ins(monkeypatch):
    """Make these objects what installed packages name as entry points."""

    def install(*loaded):
        points = [EntryPoint(f"package_{i}:candidates", thing) for i, thing in enumerate(loaded)]

        def entry_points(*, group):
            return points if group == "autoquant.candidates" else []

        monkeypatch.setattr(registry, "entry_points", entry_points)
        registry._from_entry_points.cache_clear()

    yield install
    monkeypatch.undo()
    registry._from_entry_points.cache_clear()


def test_formats_of_installed_packages_are_found(plug_ins):
    one, two, three, four = (own_format(f"plug{i}/plain") for i in range(4))
    plug_ins(one, lambda: two, lambda: [three, four])
    assert list(known_formats())[-4:] == [
        "plug0/plain",
        "plug1/plain",
        "plug2/plain",
        "plug3/plain",
    ]
    assert get_format("plug3/plain") is four
    assert "plug1/plain/matmul" in [f"{status.format}/{status.kernel}" for status in survey("cpu")]


def test_a_registered_format_may_not_take_a_plug_ins_id(own_registry, plug_ins):
    plug_ins(own_format("plug/plain"))
    with pytest.raises(CandidateError, match="exists already"):
        register(own_format("plug/plain"))


@pytest.mark.parametrize("name", ["int8-row/plain", "plug/plain"])
def test_a_plug_in_with_a_known_id_is_refused_by_its_name(plug_ins, name):
    plug_ins(own_format("plug/plain"), lambda: [own_format(name)])
    with pytest.raises(CandidateError, match=f"plug-in package_1:candidates registers '{name}'"):
        known_formats()


@pytest.mark.parametrize("produced", [None, "int8", [None]])
def test_a_plug_in_that_gives_something_else_is_refused_by_its_name(plug_ins, produced):
    plug_ins(lambda: produced)
    with pytest.raises(CandidateError, match="plug-in package_0:candidates must give a Format"):
        known_formats()
