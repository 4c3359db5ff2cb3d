"""Steps of the host, recorded and replayed."""

import logging
import threading

import pytest
import torch

from autoquant.devices.recorded_steps import RecordedStep, call_as_one


class Model:
    """Counts tokens, and adds what it counted to a product by a compiled function.

    Attributes:
        runs: How often its own code ran.
    """

    def __init__(self):
        self.runs, self.functions = 0, 0
        self.filled = torch.zeros((), dtype=torch.long)
        self.weight = torch.randn(4, 4)

    def product(self, x, weight):
        self.functions += 1
        return [x @ weight.T, x * 2]

    def __call__(self, x):
        self.runs += 1
        y, twice = call_as_one(self.product, [x], [self.weight])
        self.filled.add_(1)
        return torch.cat([y + self.filled, twice], dim=-1)

    def state(self):
        return [self.filled]

    def expected(self, x, filled):
        return torch.cat([x @ self.weight.T + filled, x * 2], dim=-1)


def test_a_recorded_step_computes_what_the_step_does_without_its_code():
    model = Model()
    step = RecordedStep(model, model.state)
    xs = torch.randn(4, 1, 4)
    found = [step(x) for x in xs]
    assert model.runs == 2 and model.functions == 2 + len(xs)
    for filled, (x, y) in enumerate(zip(xs, found, strict=True), start=1):
        assert torch.equal(y, model.expected(x, filled))
    assert model.filled == len(xs)


def test_arguments_of_another_kind_are_recorded_anew():
    model = Model()
    step = RecordedStep(model, model.state)
    for kind in (torch.randn(1, 4), torch.randn(2, 4), torch.randn(4, 2).T):
        before = model.runs
        assert torch.equal(step(kind), model.expected(kind, model.filled))
        assert model.runs == before + 2


def test_what_a_step_holds_may_be_changed_in_place_and_what_it_returns_is_its_own():
    model = Model()
    step = RecordedStep(model, model.state)
    x = torch.randn(1, 4)
    first = step(x)
    kept = first.clone()
    model.weight.zero_()
    model.filled.zero_()
    assert torch.equal(step(x), model.expected(x, 1))
    assert torch.equal(first, kept)


def test_a_step_without_compiled_functions_or_of_many_tokens_runs_as_it_is():
    calls = []
    plain = RecordedStep(lambda x: calls.append(x) or x + 1, list)
    x = torch.ones(2)
    plain(x), plain(x), plain(x)
    assert len(calls) == 4  # one of them to find that nothing is compiled
    model = Model()
    step = RecordedStep(model, model.state)
    step(torch.randn(100, 4)), step(torch.randn(100, 4))
    assert model.runs == 2


@pytest.mark.parametrize(
    "read",
    [lambda x: bool(x > 0), lambda x: x.item(), lambda x: x.tolist(), lambda x: x.numpy().sum()],
    ids=["bool", "item", "tolist", "numpy"],
)
def test_a_step_that_reads_numbers_is_not_replayed_and_says_so(read, caplog):
    model = Model()

    def reading(x):
        return model(x) + float(read(model.filled))

    step = RecordedStep(reading, model.state)
    with caplog.at_level(logging.INFO):
        for filled in (1, 2, 3):
            expected = model.expected(torch.ones(1, 4), filled)
            bonus = float(read(torch.tensor(filled)))
            assert torch.equal(step(torch.ones(1, 4)), expected + bonus)
    assert "reads numbers" in caplog.text


def test_what_another_thread_computes_meanwhile_is_not_recorded():
    model, other = Model(), Model()
    x = torch.randn(1, 4)
    started, ended = threading.Event(), threading.Event()

    def slow(x):
        result = model(x)
        started.set()
        ended.wait(5)
        return result

    step = RecordedStep(slow, model.state)

    def interfere():
        started.wait(5)
        for _ in range(20):
            call_as_one(other.product, [x], [other.weight])
        ended.set()

    thread = threading.Thread(target=interfere)
    thread.start()
    step(x)
    thread.join()
    before = other.functions
    assert torch.equal(step(x), model.expected(x, 2))
    assert other.functions == before == 20


def test_recording_uses_up_no_random_numbers():
    model = Model()

    def sampling(x):
        return model(x) + torch.rand(1)

    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    x = torch.ones(1, 4)
    assert torch.equal(RecordedStep(sampling, model.state)(x), model.expected(x, 1) + wanted)
