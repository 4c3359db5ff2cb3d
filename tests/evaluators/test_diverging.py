"""Divergence of classes, scores, vectors and answers on rows of what a model reads."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoquant.evaluators.diverging import Measure, RowsQuality, measure_of, scores_spread
from autoquant.evaluators.rows import JudgedRows, Rows


class Answers(nn.Module):
    """Returns what it was made with, whatever it reads."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, **_inputs):
        return self.outputs


def judged(count=2, **rows):
    made = (Rows({"input_ids": torch.zeros(count, 3, dtype=torch.long)}, **rows),)
    return JudgedRows({"report": made, "selection": made, "calibration": made}, "key", "rows")


def losses(measure, one, other, count=2, **rows):
    return RowsQuality(judged(count, **rows), measure).compare(other, one, "report").losses


def test_classes_have_the_divergence_of_their_probabilities():
    expected = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    found = torch.tensor([[0.75, 0.25], [0.9, 0.1]])
    by_hand = (expected * (expected / found).log()).sum(-1)
    one, other = Answers(logits=expected.log()), Answers(logits=found.log())
    assert losses(Measure("classes"), one, other) == pytest.approx(by_hand.tolist(), abs=1e-6)


def test_a_class_that_is_ruled_out_by_both_costs_nothing():
    ruled_out = torch.tensor([[0.0, -torch.inf]])
    one, other = Answers(logits=ruled_out), Answers(logits=ruled_out.clone())
    assert losses(Measure("classes"), one, other, 1) == (0.0,)


def test_only_positions_that_count_are_compared():
    expected = torch.zeros(1, 3, 2)
    found = torch.zeros(1, 3, 2)
    found[0, 0] = torch.tensor([9.0, 0.0])
    one, other = Answers(logits=expected), Answers(logits=found)
    counted = torch.tensor([[False, True, True]])
    assert losses(Measure("classes"), one, other, 1, counted=counted) == (0.0,)
    assert losses(Measure("classes"), one, other, 1)[0] > 0.5


def test_labels_that_do_not_exclude_one_another_each_count():
    one = Answers(logits=torch.tensor([[0.0, 0.0]]))
    other = Answers(logits=torch.tensor([[torch.tensor(3.0).log(), torch.tensor(3.0).log()]]))
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
    each = float((p * (p / q).log()).sum())
    assert losses(Measure("labels"), one, other, 1) == pytest.approx((2 * each,), abs=1e-6)


def test_scores_are_compared_on_their_own_scale():
    scores = torch.tensor([[0.0], [10.0], [20.0]])
    spread = scores_spread(iter([SimpleNamespace(logits=scores)]))
    measure = Measure("scores", spread=spread)
    found = losses(measure, Answers(logits=scores), Answers(logits=scores + 1), 3)
    assert found == pytest.approx((0.01, 0.01, 0.01))
    larger = losses(
        Measure("scores", spread=100 * spread),
        Answers(logits=10 * scores),
        Answers(logits=10 * (scores + 1)),
        3,
    )
    assert larger == pytest.approx(found)


@pytest.mark.parametrize(
    ("pooled", "wanted"), [(None, 0.5), ("first", 0.0), ("last", 1.0), ("mean", 1 - 2**-0.5)]
)
def test_vectors_are_compared_by_their_angle_as_they_are_pooled(pooled, wanted):
    one = Answers(last_hidden_state=torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    other = Answers(last_hidden_state=torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]))
    found = losses(Measure("vectors", pooled=pooled), one, other, 1)
    assert found == pytest.approx((wanted,), abs=1e-6)


def test_the_length_of_a_vector_does_not_count():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    one, other = Answers(last_hidden_state=hidden), Answers(last_hidden_state=3 * hidden)
    assert losses(Measure("vectors"), one, other) == pytest.approx((0, 0), abs=1e-9)


def test_right_labels_are_counted_of_both_models():
    one = Answers(logits=torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    other = Answers(logits=torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    quality = RowsQuality(judged(labels=torch.tensor([0, 0])), Measure("classes"))
    assert quality.compare(other, one, "report").right == (1, 2, 2)
    assert quality.compare(one, one, "report").right == (2, 2, 2)
    unlabelled = RowsQuality(judged(), Measure("classes")).compare(other, one, "report")
    assert unlabelled.right is None


def test_outputs_that_are_not_finite_have_the_largest_divergence():
    one = Answers(logits=torch.tensor([[1.0, 2.0]]))
    other = Answers(logits=torch.tensor([[torch.nan, 2.0]]))
    assert losses(Measure("classes"), one, other, 1) == (1e6,)


def test_increase_over_is_the_mean_divergence_from_the_reference():
    one = Answers(logits=torch.zeros(2, 2))
    other = Answers(logits=torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    quality = RowsQuality(judged(), Measure("classes"))
    each = losses(Measure("classes"), one, other)
    assert quality.increase_over(one, "calibration")(other) == pytest.approx(sum(each) / 2)


def test_the_measure_follows_from_what_the_model_gives(tmp_path):
    import transformers as t

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }

    def compared(**changes):
        model = t.BertForSequenceClassification(t.BertConfig(**small, **changes))
        return measure_of(model, "classes", tmp_path).compares

    assert compared(num_labels=3) == "classes"
    assert compared(num_labels=1) == "scores"
    assert compared(num_labels=3, problem_type="multi_label_classification") == "labels"


@pytest.mark.parametrize(
    ("settings", "pooled"),
    [
        ('{"pooling_mode_cls_token": true}', "first"),
        ('{"pooling_mode_lasttoken": true}', "last"),
        ('{"pooling_mode_mean_tokens": true}', "mean"),
        (None, None),
        ("{", None),
    ],
)
def test_an_embedder_pools_as_its_folder_says(tmp_path, settings, pooled):
    if settings is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(settings)
    model = nn.Module()
    model.config = None
    assert measure_of(model, "vectors", tmp_path).pooled == pooled
