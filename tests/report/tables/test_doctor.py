"""The checkup of a machine on screens of two widths."""

import io
import json
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from autoquant.report.tables.doctor import checkup_object, checkup_screen


@dataclass
class Problem:
    what: str
    remedy: str
    stops: bool = False


@dataclass
class Clock:
    spread: float = 0.012
    slowest: float = 1.07


@dataclass
class Checkup:
    device: str = "cpu"
    facts: dict = field(default_factory=lambda: {"machine": "Linux", "storage": "/long" * 30})
    usable: dict = field(default_factory=lambda: {"bfloat16": ["matmul"], "int8-row": ["a", "b"]})
    unusable: dict = field(
        default_factory=lambda: {"needs a GPU": [f"f{i}/plain/x" for i in range(1, 6)]}
    )
    clock: Clock = field(default_factory=Clock)
    problems: list = field(default_factory=list)
    works: bool = True


def lines(checkup, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(checkup_screen(checkup))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 40])
def test_a_checkup_fits_the_screen_and_loses_nothing(width):
    found = Checkup(problems=[Problem("torch is 2.1", 'pip install "torch>=2.11"', True)])
    shown = lines(found, width)
    assert max(map(len, shown)) <= width
    text = "".join(line[12:].strip() for line in shown[2:])
    assert "/long" * 30 in text and 'pip install "torch>=2.11"'.replace(" ", "") in text.replace(
        " ", ""
    )


def test_the_verdict_comes_first():
    assert lines(Checkup(), 80)[0] == "a search on cpu works here: nothing is wrong"
    stopped = Checkup(problems=[Problem("a", "b", True), Problem("c", "d")], works=False)
    shown = lines(stopped, 80)
    assert shown[0] == "a search on cpu does not work here: 2 things to know, below"
    assert [line.split("  ")[0] for line in shown[-2:]] == ["wrong", "to know"]


def test_long_lists_are_cut_and_counted():
    text = "\n".join(lines(Checkup(), 80))
    assert "f1, f2, f3, f4 and 1 more (5): needs a GPU" in text
    assert "bfloat16 (1), int8-row (2); in brackets how many kernels" in text
    assert "spread 1.2%, slowest 5% take 1.07 times as long" in text


def test_kernels_of_the_same_numbers_share_a_name():
    found = Checkup(unusable={"needs a GPU": ["f1/plain/x", "f1/tiled/y", "f2/plain/x"]})
    assert "not usable  f1, f2 (3): needs a GPU" in "\n".join(lines(found, 80))


def test_the_json_has_everything():
    made = checkup_object(Checkup(problems=[Problem("a", "b")]))
    assert json.loads(json.dumps(made)) == made
    assert made["works"] and made["problems"] == [{"what": "a", "remedy": "b", "stops": False}]
    assert made["clock"] == {"spread": 0.012, "slowest": 1.07}
    assert len(made["unusable"]["needs a GPU"]) == 5
