"""Text out of files that the `datasets` library loads, and names on the hub, without a network."""

import gzip
import json
import os
import sys

import huggingface_hub
import pytest

from autoquant.errors import TextError
from autoquant.evaluators import data, reading
from autoquant.evaluators.data import DataName, check_data, data_pieces

ROWS = [{"n": number, "text": f"row {number}", "title": f"title {number}"} for number in range(6)]
CHAT = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
    for n in range(2)
]


class Tokenizer:
    chat_template = None


class Chat:
    chat_template = "a template"

    def apply_chat_template(self, messages, *, tokenize):
        assert not tokenize
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def jsonl(name, rows=ROWS):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def read(name, tokenizer=None):
    return "".join(data_pieces(str(name), tokenizer or Tokenizer()))


def expected(column="text", rows=ROWS):
    return "".join(f"{row[column]}\n" for row in rows)


def write_json(name):
    with open(name, "w") as file:
        json.dump(ROWS, file)


def write_gz(name):
    with gzip.open(name, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_table(name, separator):
    with open(name, "w") as file:
        file.writelines(
            separator.join(map(str, row)) + "\n"
            for row in [ROWS[0].keys(), *(r.values() for r in ROWS)]
        )


def write_parquet(name):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), name)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.jsonl", jsonl),
        ("d.json", write_json),
        ("d.jsonl.gz", write_gz),
        ("d.csv", lambda name: write_table(name, ",")),
        ("d.tsv", lambda name: write_table(name, "\t")),
        ("d.parquet", write_parquet),
    ],
)
def test_files_of_every_kind_are_read(name, write):
    write(name)
    assert read(name) == expected()
    assert read(f"{name}:title") == expected("title")


def test_a_text_file_is_read_line_by_line_as_it_is():
    with open("d.txt", "w") as file:
        file.write("one\n\ntwo two\n")
    assert read("d.txt") == "one\n\ntwo two\n"


def test_a_folder_has_splits_of_which_held_out_ones_come_first():
    os.mkdir("folder")
    jsonl("folder/train.jsonl")
    assert read("folder") == expected()
    jsonl("folder/validation.jsonl", ROWS[:2])
    jsonl("folder/test.jsonl", ROWS[:3])
    assert read("folder") == expected(rows=ROWS[:3])
    assert read("folder:validation:title") == expected("title", ROWS[:2])
    assert read("folder::train:") == expected()


@pytest.mark.parametrize(
    "name", ["d.jsonl:train:title", "d.jsonl::train:title", "d.jsonl:::title", "d.jsonl::title"]
)
def test_parts_that_are_left_out_may_be_empty(name):
    jsonl("d.jsonl")
    assert read(name) == expected("title")


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"title": "t", "text": "x"}, "text"),
        ({"title": "t", "content": "x"}, "content"),
        ({"n": 1, "story": "x"}, "story"),
    ],
)
def test_the_column_is_guessed(row, column):
    assert read(jsonl("d.jsonl", [row])) == f"{row[column]}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two.jsonl", r"which column of two.jsonl is the text\? Say two.jsonl:COLUMN, one of a, b"),
        ("two.jsonl:c", r"two.jsonl has no c.*: write it as NAME.*; columns a, b"),
        ("d.jsonl:txt", r"d.jsonl has no txt \(did you mean text\?\)"),
        ("d.jsonl:text:more", r"d.jsonl has no more"),
        ("d.jsonl:n", r"column n of d.jsonl holds int, neither text nor messages"),
        ("empty.jsonl", r"cannot read empty.jsonl|has no rows"),
        ("broken.jsonl", r"cannot read broken.jsonl \(.*\): fix it, or give another --eval-data"),
        ("d.jsnl", r"neither a file or folder here \(did you mean d.jsonl\?\) nor a dataset"),
        ("missing.csv", r"there is no file or folder at missing.csv"),
        (
            "folder/none",
            r"nor a dataset that can be had from the hub \(no network\): check the spelling and "
            r"the network",
        ),
        ("../none", r"there is no file or folder at ../none"),
        (
            "model.pt",
            r"model.pt is no dataset that can be read: give a file that ends in one of .jsonl",
        ),
        ("text.gz", r"text.gz is no dataset .* packed and says so behind that, as text.txt.gz"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name, message, monkeypatch):
    def no_network(self, name, timeout):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    jsonl("d.jsonl")
    jsonl("two.jsonl", [{"a": "x", "b": "y"}])
    open("empty.jsonl", "w").close()
    with open("broken.jsonl", "w") as file:
        file.write('{"text": "x"}\n{"text": \n')
    open("model.pt", "w").close()
    open("text.gz", "w").close()
    with pytest.raises(TextError, match=message) as refused:
        read(name)
    assert "\n" not in str(refused.value)


def test_conversations_are_written_by_the_chat_template():
    jsonl("d.jsonl", CHAT)
    assert read("d.jsonl", Chat()) == "<user>0?<assistant>yes\n<user>1?<assistant>yes\n"
    assert read("d.jsonl") == "user: 0?\nassistant: yes\nuser: 1?\nassistant: yes\n"


def test_no_more_rows_are_read_than_are_asked_for(monkeypatch):
    taken = []

    def rows():
        for number in range(1000):
            taken.append(number)
            yield {"text": "x" * 99}

    monkeypatch.setattr(data, "_open", lambda name: (rows(), "text"))
    pieces = data_pieces("any", Tokenizer())
    next(pieces)
    assert len(taken) == data._PIECE_CHARACTERS // 100


def test_a_name_on_the_hub_is_streamed_and_runs_no_code(monkeypatch):
    import datasets

    calls = []

    def load_dataset(place, config, **options):
        calls.append((place, config, options))
        return {"train": [{"body": "train"}], "test": [{"body": "test", "n": 1}]}

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["de", "en"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name:en") == "test\n"
    assert read("org/name:de:train:body") == "train\n"
    assert calls == [
        ("org/name", "en", {"streaming": True}),
        ("org/name", "de", {"streaming": True}),
    ]
    with pytest.raises(
        TextError, match=r"which configuration of org/name\? Say org/name:CONFIG, one of de, en"
    ):
        read("org/name")


def test_a_path_may_hold_colons():
    jsonl("a:b.jsonl")
    assert DataName.parse("a:b.jsonl:title") == DataName("a:b.jsonl", ("title",))
    assert read("a:b.jsonl:title") == expected("title")


def test_a_name_is_made_absolute_only_where_it_is_a_path(here):
    jsonl("d.jsonl")
    assert DataName.parse("d.jsonl::train").absolute() == f"{here / 'd.jsonl'}::train"
    assert DataName.parse("org/name:en").absolute() == "org/name:en"


def test_checking_a_name_reads_nothing(here):
    (here / "d.csv").write_text("anything")
    check_data("d.csv:column")
    check_data("org/name")
    with pytest.raises(TextError):
        check_data("")


def test_names_need_no_torch():
    import subprocess

    code = (
        "import sys, autoquant.evaluators.data; assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_long_row_comes_in_pieces_that_a_tokenizer_can_take():
    row = "many words " * 100_000
    jsonl("long.jsonl", [{"text": row}])
    pieces = list(data_pieces("long.jsonl", Tokenizer()))
    assert "".join(pieces) == f"{row}\n"
    assert max(map(len, pieces)) <= 250_000
    assert all(piece.startswith(" ") for piece in pieces[1:])


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz", "bomb.csv.gz", "bomb.txt"])
def test_a_line_without_end_is_refused_before_it_is_in_memory(name, monkeypatch):
    monkeypatch.setattr(reading, "MOST_TEXT_BYTES", 1 << 21)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(name, "wb") as file:
        for _ in range(8):
            file.write(b"0" * (1 << 20))
    with pytest.raises(TextError, match=r"has a line of more than 2,097,152 bytes: break it"):
        read(name)


@pytest.mark.parametrize("name", ["blank.txt.gz", "blank.jsonl.gz", "blank.csv.gz", "blank.txt"])
def test_blank_lines_without_end_are_refused_before_they_are_read(name, monkeypatch):
    monkeypatch.setattr(reading, "MOST_TEXT_BYTES", 1 << 21)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(name, "wb") as file:
        file.write(b"a\n")
        for _ in range(8):
            file.write(b"\n" * (1 << 20))
    with pytest.raises(TextError, match=r"has blank lines of more than 2,097,152 bytes: take them"):
        read(name)
