"""Splitting text into parts."""

import re
from pathlib import Path

import pytest
import torch
from models.tiny_models import tiny_tokenizer

from autoquant.errors import TextError
from autoquant.evaluators import reading, text
from autoquant.evaluators.text import PARTS, TextParts, deal, read_text

WINDOW = 8


class Numbers:
    """Each word is a number, which is its token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, words, *, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        self.calls += 1
        return {"input_ids": [int(word) for word in words.split()]}


@pytest.fixture
def numbers_file(tmp_path):
    def write(windows, *, spare=0):
        path = tmp_path / "numbers.txt"
        count = windows * WINDOW + spare
        path.write_text("".join(f"{i}{chr(10) if i % 5 == 4 else ' '}" for i in range(count)))
        return path

    return write


def read(path, **rest):
    return read_text(path, Numbers(), max_positions=WINDOW, **rest)


def counts(parts):
    return tuple(len(parts.windows[part]) for part in PARTS)


@pytest.mark.parametrize("windows", [15, 16, 23, 30, 50, 51, 75])
def test_parts_are_disjoint_whole_windows_of_the_text(numbers_file, windows):
    parts = read(numbers_file(windows, spare=WINDOW - 1))
    seen = torch.cat([parts.windows[part] for part in PARTS])
    starts = sorted(seen[:, 0].tolist())
    assert starts == [
        i * WINDOW for i in range(min(windows, 56))
    ]  # each window once, the first of the text
    assert torch.equal(seen, seen[:, :1] + torch.arange(WINDOW)) and seen.dtype == torch.int64
    for part in PARTS:
        assert parts.windows[part][:, 0].tolist() == sorted(parts.windows[part][:, 0].tolist())


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (200, (8, 60, 84)),
        (152, (8, 60, 84)),
        (104, (8, 40, 56)),
        (57, (8, 20, 29)),
        (56, (8, 20, 28)),
        (30, (4, 10, 16)),
    ],
)
def test_on_gpus_a_long_text_gives_more_to_the_parts_that_intervals_are_of(
    numbers_file, windows, expected
):
    assert counts(read(numbers_file(windows), windows=text.GPU_WINDOWS)) == expected


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (200, (8, 20, 28)),
        (56, (8, 20, 28)),
        (30, (4, 10, 16)),
        (45, (6, 16, 23)),
        (16, (2, 6, 8)),
        (15, (1, 6, 8)),
    ],
)
def test_a_shorter_text_gives_each_part_its_share(numbers_file, windows, expected):
    assert counts(read(numbers_file(windows))) == expected


@pytest.mark.parametrize("windows", range(15, 57))
def test_every_window_up_to_the_wanted_ones_is_used(numbers_file, windows):
    found = counts(read(numbers_file(windows)))
    assert sum(found) == windows and all(a >= b for a, b in zip(found, (1, 6, 8), strict=True))


def test_every_part_is_spread_over_the_text(numbers_file):
    parts = read(numbers_file(56))
    for part, most in (("calibration", 8), ("selection", 4), ("report", 3)):
        starts = [start // WINDOW for start in parts.windows[part][:, 0].tolist()]
        gaps = [b - a for a, b in zip([-1, *starts], [*starts, 56], strict=True)]
        assert max(gaps) <= most


def test_the_same_text_gives_the_same_parts_and_key(numbers_file):
    path = numbers_file(20)
    first, second = read(path), read(path)
    assert all(torch.equal(first.windows[part], second.windows[part]) for part in PARTS)
    assert first.key == second.key


def test_the_key_depends_on_every_token_and_on_the_parts(numbers_file):
    parts = read(numbers_file(20))
    changed = {part: windows.clone() for part, windows in parts.windows.items()}
    changed["report"][-1, -1] += 1
    swapped = dict(parts.windows) | {
        "selection": parts.windows["report"][:6],
        "report": torch.cat((parts.windows["selection"], parts.windows["report"][6:])),
    }
    keys = {parts.key, TextParts(changed).key, TextParts(swapped).key, read(numbers_file(19)).key}
    assert len(keys) == 4


@pytest.mark.parametrize(("windows", "spare"), [(0, 0), (14, WINDOW - 1)])
def test_a_text_too_short_for_the_parts_says_what_is_needed(numbers_file, windows, spare):
    path = numbers_file(windows, spare=spare)
    with pytest.raises(
        TextError, match=rf"gives {windows * WINDOW + spare} tokens; at least {15 * WINDOW}"
    ) as refused:
        read(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize(("positions", "window"), [(None, 512), (4096, 512), (8, 8)])
def test_windows_are_as_long_as_the_model_takes_up_to_512(numbers_file, positions, window):
    parts = read_text(numbers_file(15 * 512 // WINDOW), Numbers(), max_positions=positions)
    assert parts.windows["report"].shape[1] == window


def test_a_text_is_tokenized_in_pieces_that_end_at_lines(numbers_file, monkeypatch):
    path = numbers_file(20)
    whole = read(path)
    monkeypatch.setattr(reading, "_READ_CHARACTERS", 7)
    tokenizer = Numbers()
    pieces = read_text(path, tokenizer, max_positions=WINDOW)
    assert tokenizer.calls > 10 and pieces.key == whole.key


def test_no_more_of_a_long_text_is_read_than_is_needed(numbers_file, monkeypatch):
    monkeypatch.setattr(reading, "_READ_CHARACTERS", 1000)
    tokenizer = Numbers()
    read_text(numbers_file(1000), tokenizer, max_positions=WINDOW)
    assert tokenizer.calls < 4


def test_a_real_tokenizer_adds_no_special_tokens(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i % 60}" for i in range(15 * WINDOW)))
    parts = read_text(path, tiny_tokenizer(), max_positions=WINDOW)
    assert counts(parts) == (1, 6, 8)
    assert sorted(torch.cat([parts.windows[p] for p in PARTS]).flatten().tolist()) == sorted(
        i % 60 for i in range(15 * WINDOW)
    )


def test_every_window_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path):
    from tokenizers.processors import TemplateProcessing

    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{i % 60}" for i in range(15 * (WINDOW - 1))))
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert read_text(path, tokenizer, max_positions=WINDOW - 1).windows["report"][0, 0] != 62
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    parts = read_text(path, tokenizer, max_positions=WINDOW)
    rows = torch.cat([parts.windows[part] for part in PARTS])
    assert (rows[:, 0] == tokenizer.bos_token_id).all() and rows.shape == (15, WINDOW)
    assert sorted(rows[:, 1:].flatten().tolist()) == sorted(
        i % 60 for i in range(15 * (WINDOW - 1))
    )


@pytest.mark.parametrize("position", [0, 110, 11_000, 330_000])
def test_bytes_that_are_no_text_are_refused_where_they_are(tmp_path, position):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"1234567890 " * (position // 11) + b"\xff" + b" 1" * 10_000)
    with pytest.raises(TextError, match="is not UTF-8 text") as refused:
        read_text(path, Numbers())
    assert f"at byte {position})" in str(refused.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"cannot read .*none.txt: No such file"):
        read_text(tmp_path / "none.txt", Numbers())
    with pytest.raises(TextError, match="cannot read"):
        read_text(tmp_path, Numbers())


def test_dealing_gives_each_part_its_count_and_spreads_it():
    dealt = deal({"calibration": 1, "selection": 2, "report": 4})
    assert dealt == [
        "report",
        "selection",
        "report",
        "calibration",
        "report",
        "selection",
        "report",
    ]


def test_dealing_starts_with_the_part_that_has_the_largest_share():
    assert deal({"calibration": 0, "selection": 0, "report": 2}) == ["report", "report"]
    assert deal({"calibration": 0, "selection": 0, "report": 0}) == []


def test_windows_that_weights_are_rounded_for_follow_the_parts(numbers_file, monkeypatch):
    monkeypatch.setattr(text, "INPUT_WINDOWS", 10)
    path = numbers_file(80)
    parts = read(path, inputs=True)
    assert parts.inputs[:, 0].tolist() == [i * WINDOW for i in range(56, 66)]
    plain = read(path)
    assert plain.inputs is None and plain.key != parts.key
    assert all(torch.equal(plain.windows[part], parts.windows[part]) for part in PARTS)
    assert read(numbers_file(64), inputs=True).key != read(numbers_file(65), inputs=True).key


@pytest.mark.parametrize(("windows", "expected"), [(20, 2), (63, 8), (64, 8), (65, 9)])
def test_a_text_without_enough_of_them_gives_the_calibration_part(numbers_file, windows, expected):
    parts = read(numbers_file(windows), inputs=True)
    assert len(parts.inputs) == expected
    is_calibration = torch.equal(parts.inputs, parts.windows["calibration"])
    assert is_calibration is (windows < 65)


def test_the_text_that_is_shipped_is_enough_for_every_part_on_a_gpu():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "demo" / "model")
    parts = read_text(text.DEFAULT_TEXT, tokenizer, windows=text.GPU_WINDOWS, inputs=True)
    assert counts(parts) == (8, 60, 84) and len(parts.inputs) == text.INPUT_WINDOWS
    assert text.DEFAULT_TEXT.stat().st_size <= 350_000


def test_every_stretch_of_the_text_that_is_shipped_is_the_same_mixture():
    words = text.DEFAULT_TEXT.read_text(encoding="utf-8")
    stretches = [words[start : start + 50_000] for start in range(0, len(words) - 50_000, 50_000)]
    kinds = {
        "code": r"\n    return |\n +const |__global__|self\.",
        "prose": r" (he|she|they) (was|were|had) ",
        "dialogue": r"\n(User|Assistant|[A-Z][a-z]+): ",
        "other languages": r"[äöüßéèñçã\u0430-\u044f\u4e00-\u9fff]",
        "technical writing": r"`[a-z-]+`|--[a-z]+",
    }
    missing = [
        (number, kind)
        for number, part in enumerate(stretches)
        for kind, sign in kinds.items()
        if not re.search(sign, part)
    ]
    assert len(stretches) >= 6 and missing == []


def test_the_text_that_is_shipped_says_where_it_comes_from():
    told = (text.DEFAULT_TEXT.parent / "SOURCES.md").read_text()
    assert "public domain" in told and "MIT" in told


def test_no_more_is_read_than_any_text_needs(monkeypatch):
    monkeypatch.setattr(text, "MOST_TEXT_BYTES", 1000)
    pieces = iter(["1 2 3\n"] + ["\n" * 100] * 100)
    with pytest.raises(TextError, match="my rows gives 3 tokens in its first 1,006 characters"):
        text.deal_text(pieces, "my rows", Numbers(), max_positions=WINDOW)
    assert len(list(pieces)) == 90
