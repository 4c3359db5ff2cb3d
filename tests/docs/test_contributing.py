"""The map of the code shows the code that is there, and what the contributing page names exists."""

from __future__ import annotations

import re
import tomllib

import pytest

from .pages import ROOT

PACKAGE = ROOT / "autoquant"
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
DECISIONS = ROOT / "docs" / "decisions"


def section(title):
    """What stands under a heading, up to the next of its level."""
    _, _, rest = PAGE.partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0]


def rows(text):
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def spans(text):
    return re.findall(r"`([^`]+)`", text)


MAP = rows(section("Map of the code"))
CHANGES = rows(section("What a change touches"))


def test_the_map_has_every_room_of_the_package():
    rooms = {each.name + "/" for each in PACKAGE.iterdir() if (each / "__init__.py").exists()}
    files = {each.name for each in PACKAGE.glob("*.py") if not each.name.startswith("__")}
    shown = {name for row in MAP for name in spans(row[0])}
    assert shown - {"tuner/workers/"} == rooms | files


@pytest.mark.parametrize("row", MAP, ids=lambda row: row[0])
def test_a_reader_finds_the_files_to_start_at(row):
    folder = PACKAGE / spans(row[0])[0]
    where = folder if folder.is_dir() else PACKAGE
    assert [name for name in spans(row[2]) if not (where / name).exists()] == []


def floors():
    """The rooms of each floor, the highest first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    return [{name.strip().rpartition(".")[2] for name in layer.split("|")} for layer in layers]


def test_rooms_of_the_map_are_in_the_order_of_their_floors():
    shown = [[name.removesuffix(".py").split("/")[0] for name in spans(row[0])] for row in MAP]
    numbers = [next(n for n, floor in enumerate(floors()) if set(names) & floor) for names in shown]
    assert numbers == sorted(numbers)


# The numbered lists under "Four walks", each as the file that every item begins with.
LEGS = [
    re.findall(r"^\d\. `([^`]+)`", text, flags=re.MULTILINE)
    for text in section("Four walks").split("\n\n")
    if text.startswith("1. ")
]


@pytest.mark.parametrize("files", LEGS, ids=lambda files: files[0])
def test_a_walk_goes_down_the_floors_only(files):
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
    rooms = [name.partition("/")[0] for name in files]
    numbers = [next(n for n, floor in enumerate(floors()) if room in floor) for room in rooms]
    assert numbers == sorted(numbers)
    assert len(set(files)) == len(files)


def test_every_walk_is_checked():
    assert len(LEGS) == 8


@pytest.mark.parametrize("row", CHANGES, ids=lambda row: row[0])
def test_a_change_touches_as_many_files_as_the_table_names(row):
    most = int(row[1].split()[-1])
    required = row[2].split(" (")[0]
    files = [name for name in spans(required) if name.endswith(".py")]
    assert len(files) == most
    assert [name for name in files if "NAME" not in name and not (PACKAGE / name).exists()] == []


@pytest.mark.parametrize("row", CHANGES, ids=lambda row: row[0])
def test_every_change_has_a_worked_example(row):
    (example,) = spans(row[3])
    assert (ROOT / example).exists() or (PACKAGE / example).exists()


def test_every_decision_is_listed_and_has_its_three_parts():
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (DECISIONS / "index.md").read_text())
    records = sorted(path.name for path in DECISIONS.glob("0*.md"))
    assert listed == records
    for name in records:
        text = (DECISIONS / name).read_text()
        headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequence"], name


def test_links_of_the_root_pages_lead_somewhere():
    for page in ("CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
        local = [link for link in links if "://" not in link]
        assert [link for link in local if not (ROOT / link).exists()] == []
