"""Rows that a model is judged on: from a text, a dataset, or made up."""

import json
from itertools import islice

import pytest
import torch
import transformers as t
from models.tiny_models import tiny_tokenizer

from autoquant.errors import TextError
from autoquant.evaluators.rows import (
    ROW_TOKENS,
    ROWS,
    dataset_rows,
    deal_rows,
    made_up_rows,
    text_rows,
)
from autoquant.evaluators.text import PARTS
from autoquant.models.reader import Reader

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def reads_texts(tmp_path):
    model = t.BertModel(t.BertConfig(**SMALL, vocab_size=64))
    words = tiny_tokenizer()
    words.add_special_tokens({"mask_token": "<eos>"})
    return Reader(model, tmp_path, words)


@pytest.fixture
def reads_pictures(tmp_path):
    model = t.ViTModel(t.ViTConfig(**SMALL, image_size=8, patch_size=4))
    return Reader(model, tmp_path, None)


def text(words):
    return " ".join(f"w{number % 60}" for number in range(words))


def counts(judged):
    return {
        part: sum(len(next(iter(rows.inputs.values()))) for rows in judged.parts[part])
        for part in PARTS
    }


def dealt(reader, rows, *, masks=False, seed=0):
    return deal_rows(reader, rows, "the rows", masks=masks, seed=seed, limited=True)


def file_of(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_text_is_cut_into_rows_of_which_no_token_is_in_two(reads_texts):
    rows = list(text_rows(reads_texts, [text(300), text(300)]))
    assert [len(row.ids) for row in rows] == [ROW_TOKENS] * 4
    joined = [number for row in rows for number in row.ids]
    assert joined == [*(n % 60 for n in range(300)), *(n % 60 for n in range(300))][: len(joined)]


def test_rows_are_dealt_to_all_parts(reads_texts):
    assert counts(dealt(reads_texts, text_rows(reads_texts, [text(20_000)]))) == ROWS


def test_few_rows_shrink_all_parts(reads_texts):
    found = counts(dealt(reads_texts, text_rows(reads_texts, [text(30 * ROW_TOKENS)])))
    assert sum(found.values()) == 30 and found["report"] >= found["selection"] >= 6


def test_too_few_rows_are_refused(reads_texts):
    with pytest.raises(TextError, match="at least 15"):
        dealt(reads_texts, text_rows(reads_texts, [text(5 * ROW_TOKENS)]))


def test_made_up_pictures_need_no_dataset(reads_pictures):
    judged = deal_rows(
        reads_pictures,
        made_up_rows(reads_pictures),
        reads_pictures.words,
        masks=False,
        seed=0,
        limited=False,
    )
    assert counts(judged) == ROWS and "noise and shapes" in judged.words


def test_masks_hide_a_share_of_the_tokens_and_only_these_count(reads_texts):
    judged = dealt(reads_texts, text_rows(reads_texts, [text(20_000)]), masks=True)
    rows = judged.parts["report"][0]
    hidden = rows.inputs["input_ids"] == reads_texts.tokenizer.mask_token_id
    assert torch.equal(hidden, rows.counted)
    assert (rows.counted.sum(1) == round(0.15 * ROW_TOKENS)).all()


def test_labels_are_numbers_or_names_of_classes(reads_texts, tmp_path):
    rows = [{"text": text(4), "label": number % 2} for number in range(3)]
    rows += [{"text": text(4), "label": "no"}]
    found = list(dataset_rows(reads_texts, file_of(tmp_path, rows[:3]), 0, {}, answers=False))
    assert sorted(row.label for row in found) == [0, 0, 1]
    named = file_of(tmp_path, rows[3:])
    assert [row.label for row in dataset_rows(reads_texts, named, 0, {"no": 1}, answers=False)] == [
        1
    ]
    with pytest.raises(TextError, match="no class of the model is called 'no'"):
        list(dataset_rows(reads_texts, named, 0, {"yes": 0}, answers=False))


def test_a_model_without_classes_reads_no_labels(reads_texts, tmp_path):
    name = file_of(tmp_path, [{"text": text(4), "label": 1}] * 3)
    assert [row.label for row in dataset_rows(reads_texts, name, 0, None, answers=False)] == [
        None
    ] * 3


def test_rows_that_are_sorted_by_class_are_mixed_in_an_order_that_the_seed_determines(
    reads_texts, tmp_path
):
    rows = [{"text": text(4), "label": number // 50} for number in range(100)]
    name = file_of(tmp_path, rows)

    def first(seed):
        found = dataset_rows(reads_texts, name, seed, {}, answers=False)
        return [row.label for row in islice(found, 30)]

    assert first(0) == first(0) != first(1)
    assert 5 < sum(first(0)) < 25


def test_pictures_of_numbers_are_read_from_a_dataset(reads_pictures, tmp_path):
    rows = [{"image": [[number] * 4] * 4, "label": 1} for number in range(20)]
    judged = dealt(
        reads_pictures,
        dataset_rows(reads_pictures, file_of(tmp_path, rows), 0, {}, answers=False),
    )
    assert judged.labelled and sum(counts(judged).values()) == 20
    assert judged.parts["report"][0].inputs["pixel_values"].shape[1:] == (3, 8, 8)


def test_a_column_of_texts_is_no_picture(reads_pictures, tmp_path):
    name = file_of(tmp_path, [{"image": "a.png"}] * 3)
    with pytest.raises(TextError, match="no picture that can be read"):
        list(dataset_rows(reads_pictures, name, 0, None, answers=False))


def test_a_dataset_without_a_column_for_the_model_is_refused(reads_pictures, tmp_path):
    name = file_of(tmp_path, [{"number": 1}] * 3)
    with pytest.raises(TextError, match="which column"):
        list(dataset_rows(reads_pictures, name, 0, None, answers=False))


def test_the_key_follows_what_the_rows_hold(reads_texts):
    def key(words, **options):
        return dealt(reads_texts, text_rows(reads_texts, [words]), **options).key

    assert key(text(9000)) == key(text(9000))
    assert key(text(9000)) != key(text(9001).removeprefix("w0 "))
    assert key(text(9000), masks=True) != key(text(9000))
    assert key(text(9000), masks=True) != key(text(9000), masks=True, seed=1)
