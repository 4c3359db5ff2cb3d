"""Judging a module by how far its outputs are from the unquantized module's."""

import copy

import pytest
import torch
from torch import nn

from autoquant.errors import QualityError
from autoquant.evaluators.outputs import (
    SAMPLES,
    OutputQuality,
    VariedInputs,
    divergence,
    outputs_of,
    vary,
)
from autoquant.evaluators.text import PARTS

COUNT = sum(SAMPLES.values())


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def every(inputs):
    return [inputs.make(number) for number in range(COUNT)]


def linear(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Linear(8, 4, **options).eval()


def test_floating_inputs_keep_dtype_shape_and_the_range_of_their_columns():
    sample = drawn(6, 8).to(torch.bfloat16) * torch.arange(1, 9)
    made = [x for (x,) in every(VariedInputs((sample,), 0))]
    assert torch.equal(made[0], sample)
    assert all(x.dtype == sample.dtype and x.shape == sample.shape for x in made)
    low, high = sample.amin(0), sample.amax(0)
    assert all(
        bool((x >= low - 0.01 * low.abs()).all() and (x <= high + 0.01 * high.abs()).all())
        for x in made
    )
    assert len({x.float().sum().item() for x in made}) == COUNT


def test_integers_are_those_that_the_sample_has_at_that_place():
    columns = torch.tensor([[0, 10, 20], [1, 11, 20], [2, 12, 20]])
    made = [x for (x,) in every(VariedInputs((columns,), 0))]
    for column in range(3):
        assert {int(v) for x in made for v in x[:, column]} == set(columns[:, column].tolist())
    row = torch.tensor([[3, 5, 5, 9]])
    assert {int(v) for (x,) in every(VariedInputs((row,), 0)) for v in x.flatten()} == {3, 5, 9}


def test_masks_scalars_and_what_is_no_tensor_stay():
    sample = {
        "x": drawn(1, 8),
        "mask": drawn(1, 8) > 0,
        "scale": torch.tensor([2.0]),
        "mode": "fast",
        "steps": 3,
    }
    for made in every(VariedInputs(sample, 0)):
        assert torch.equal(made["mask"], sample["mask"]) and torch.equal(
            made["scale"], sample["scale"]
        )
        assert (made["mode"], made["steps"]) == ("fast", 3)


def test_parts_share_no_input_and_are_the_same_every_time():
    first, again = (VariedInputs((drawn(4, 8),), 3) for _ in range(2))
    seen = [[x for (x,) in first.part(part)] for part in PARTS]
    assert [len(xs) for xs in seen] == [SAMPLES[part] for part in PARTS]
    assert len({x.sum().item() for xs in seen for x in xs}) == COUNT
    assert all(
        torch.equal(a, b)
        for xs, part in zip(seen, PARTS, strict=True)
        for a, (b,) in zip(xs, again.part(part), strict=True)
    )


def test_the_key_depends_on_the_sample_and_the_seed():
    x = drawn(4, 8)
    changed = x.clone()
    changed[-1, -1] += 1
    samples = [
        ((x,), 0),
        ((x,), 1),
        ((changed,), 0),
        ((x.double(),), 0),
        ({"x": x}, 0),
        ({"y": x}, 0),
        ((x, 2), 0),
    ]
    assert len({VariedInputs(*sample).key for sample in samples}) == len(samples)
    assert VariedInputs((x.clone(),), 0).key == VariedInputs((x,), 0).key


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_placeholders_are_replaced_by_normal_numbers(make):
    inputs = VariedInputs((make(64, 64), torch.tensor([5.0])), 0)
    assert inputs.placeholder and inputs.varies
    for x, single in every(inputs):
        assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1 and single.item() == 5.0


def test_divergence_is_the_relative_squared_error():
    y0, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert divergence([y0], [y]) == pytest.approx(0.25 / 25)
    assert divergence([y0, 10 * y0], [y, 10 * y0]) == pytest.approx(
        0.25 / 50
    )  # each tensor counts alike
    assert divergence([y0, torch.zeros(2)], [y, torch.ones(2)]) == pytest.approx(0.25 / 25)
    assert divergence(
        [torch.tensor([3.0, 4.0, -torch.inf])], [torch.tensor([3.0, 4.5, 0.0])]
    ) == pytest.approx(0.25 / 25)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e30])
def test_broken_outputs_diverge_by_a_finite_million(broken):
    assert divergence([torch.ones(2)], [torch.tensor([1.0, broken])]) == 1e6


def test_outputs_of_another_shape_cannot_be_compared():
    with pytest.raises(QualityError, match="shapes of the model's outputs depend on its numbers"):
        divergence([torch.ones(2)], [torch.ones(3)])


def test_every_floating_output_counts():
    class Many(nn.Module):
        def forward(self, x):
            return {"scores": x, "best": x.argmax(), "nested": (x + 1, None)}

    assert [y.sum().item() for y in outputs_of(Many(), (torch.zeros(2),))] == [0.0, 2.0]


def test_a_model_without_floating_outputs_needs_a_loss_of_ones_own():
    class Class(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    with pytest.raises(QualityError, match=r"--quality package\.module:callable"):
        vary(Class(), (drawn(2, 8),), 0)


def test_the_unquantized_model_diverges_by_nothing_and_a_changed_one_by_what_it_is():
    module, changed = linear(bias=False), linear(bias=False)
    with torch.no_grad():
        changed.weight.mul_(1.1)
    quality = OutputQuality(VariedInputs((drawn(4, 8),), 0))
    assert set(quality.compare(copy.deepcopy(module), module, "selection").losses) == {0.0}
    compared = quality.compare(changed, module, "report")
    assert compared.losses == pytest.approx([0.01] * SAMPLES["report"], rel=1e-4)
    assert compared.reference == (0.0,) * SAMPLES["report"] and compared.kl is None
    assert quality.increase_over(module, "calibration")(changed) == pytest.approx(0.01, rel=1e-4)


def test_a_model_that_takes_varied_inputs_is_given_them_without_a_word():
    inputs, notes = vary(linear(), (drawn(4, 8),), 0)
    assert inputs == VariedInputs((inputs.sample[0],), 0) and notes == []


class Offsets(nn.Module):
    """Takes integers that must not fall, as an embedding bag does."""

    def forward(self, x, offsets):
        if not bool((offsets.diff() >= 0).all()):
            raise ValueError("offsets must not fall")
        return x * 2


def test_integers_that_a_model_takes_no_others_for_stay():
    inputs, notes = vary(Offsets(), (drawn(4, 8), torch.arange(4)), 0)
    assert not inputs.integers and "offsets must not fall" in notes[0]
    assert all(torch.equal(offsets, torch.arange(4)) for _, offsets in every(inputs))


def test_a_model_that_fails_on_its_inputs_says_why():
    with pytest.raises(QualityError, match=r"mat1 and mat2 .*--sample-inputs"):
        vary(linear(), (drawn(4, 7),), 0)


def test_outputs_that_are_all_0_are_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return x * 0

    with pytest.raises(QualityError, match="all 0 or not finite"):
        vary(Nothing(), (drawn(4, 8),), 0)


def test_inputs_that_nothing_can_be_varied_of_are_told():
    _, notes = vary(nn.Embedding(5, 8), (torch.tensor([2, 2]),), 0)
    assert "judged on one input" in notes[0]


def test_a_model_that_draws_at_random_is_told():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    assert "differ by" in vary(Noisy(), (drawn(4, 8),), 0)[1][0]
