"""The solver against trying everything."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from autoquant.solver.solve import AdditiveProblem, fastest, front, smallest, undominated

SEEDS = range(16)


def random_problem(seed):
    """3 to 5 layers of 2 to 4 options: times and losses at random, memory in bytes; every layer has an exact option."""
    draw = np.random.default_rng(seed)
    layers = []
    for _ in range(draw.integers(3, 6)):
        count = draw.integers(2, 5)
        losses = np.concatenate(([0.0], draw.exponential(0.01, count - 1)))
        layers.append(
            np.column_stack(
                (draw.uniform(0.1, 5, count), losses, draw.integers(1000, 10**6, count))
            )
        )
    return AdditiveProblem.build([[tuple(option) for option in layer.tolist()] for layer in layers])


def tied_problem(seed):
    """Small whole numbers, so that many solutions are equal in one respect and differ in another."""
    draw = np.random.default_rng(seed)
    return AdditiveProblem.build(
        [
            [
                tuple(option)
                for option in draw.integers(0, 5, (draw.integers(2, 5), 3)).astype(float).tolist()
            ]
            for _ in range(draw.integers(3, 6))
        ]
    )


def joined_problem(seed):
    """A random problem whose first layers have two further options, each taken by all of them or none; often they pay."""
    draw = np.random.default_rng(seed + 500)
    alone = random_problem(seed)
    members = int(draw.integers(2, len(alone.time) + 1))
    layers = [
        np.column_stack(columns)
        for columns in zip(alone.time, alone.loss, alone.memory, strict=True)
    ]
    together = []
    for _ in range(2):
        together.append([(member, len(layers[member])) for member in range(members)])
        for member in range(members):
            row = (draw.uniform(0.1, 2), draw.exponential(0.01), draw.integers(1000, 10**6))
            layers[member] = np.vstack((layers[member], row))
    return AdditiveProblem.build(
        [[tuple(option) for option in layer.tolist()] for layer in layers], together
    )


def every_solution(problem):
    """(time, loss, memory) of every solution."""
    options = itertools.product(*(range(len(layer)) for layer in problem.time))
    return np.array([problem.totals(picks) for picks in options if keeps_together(problem, picks)])


def keeps_together(problem, picks):
    return all(
        len({picks[layer] == option for layer, option in options}) == 1
        for options in problem.together
    )


def budgets(solutions, seed):
    """Pairs of budgets between the least and the greatest sums, none at all among them."""
    draw = np.random.default_rng(seed + 1000)
    for _ in range(3):
        loss, memory = (
            draw.uniform(column.min(), column.max())
            for column in (solutions[:, 1], solutions[:, 2])
        )
        yield from ((None, None), (loss, None), (None, memory), (loss, memory))


def is_within(solutions, max_loss, max_memory):
    loss = np.inf if max_loss is None else max_loss
    memory = np.inf if max_memory is None else max_memory
    return (solutions[:, 1] <= loss) & (solutions[:, 2] <= memory)


@pytest.mark.parametrize("make", [random_problem, joined_problem])
def test_the_fastest_within_budgets_is_the_one_that_trying_everything_finds(make):
    for seed in SEEDS:
        problem = make(seed)
        solutions = every_solution(problem)
        for max_loss, max_memory in budgets(solutions, seed):
            within = solutions[is_within(solutions, max_loss, max_memory)]
            picks = fastest(problem, max_loss=max_loss, max_memory=max_memory)
            if len(within) == 0:
                assert picks is None, seed
            else:
                found = np.array(problem.totals(picks))
                assert keeps_together(problem, picks), seed
                assert is_within(found[None], max_loss, max_memory).all(), seed
                assert found[0] == pytest.approx(within[:, 0].min(), rel=1e-5), seed


@pytest.mark.parametrize("make", [random_problem, joined_problem])
def test_the_smallest_within_a_loss_budget_is_the_one_that_trying_everything_finds(make):
    for seed in SEEDS:
        problem = make(seed)
        solutions = every_solution(problem)
        for max_loss, _ in budgets(solutions, seed):
            within = solutions[is_within(solutions, max_loss, None)]
            _, loss, memory = problem.totals(smallest(problem, max_loss=max_loss))
            assert max_loss is None or loss <= max_loss, seed
            assert memory == pytest.approx(within[:, 2].min(), rel=1e-5), seed


def test_a_memory_budget_is_kept_to_the_byte():
    for seed in SEEDS:
        problem = random_problem(seed)
        solutions = every_solution(problem)
        for budget in np.quantile(solutions[:, 2], (0.1, 0.3, 0.5), method="nearest") - 1:
            picks = fastest(problem, max_memory=budget)
            assert picks is None or problem.totals(picks)[2] <= budget, seed


def test_a_budget_that_a_solution_just_meets_admits_it():
    for seed in SEEDS:
        problem = random_problem(seed)
        solutions = every_solution(problem)
        tightest = solutions[:, 2].min()
        assert problem.totals(fastest(problem, max_memory=tightest))[2] == tightest, seed
        assert problem.totals(fastest(problem, max_loss=0.0))[1] == 0.0, seed


@pytest.mark.parametrize(
    "budget", [{"max_loss": -0.001}, {"max_memory": 0.0}, {"max_loss": 0.5, "max_memory": 0.0}]
)
def test_budgets_that_nothing_meets_give_none(budget):
    for seed in SEEDS:
        assert fastest(random_problem(seed), **budget) is None


def test_nothing_is_smaller_than_the_smallest_within_an_impossible_budget():
    assert smallest(random_problem(0), max_loss=-0.001) is None


def test_among_equally_fast_solutions_none_is_better_in_loss_and_memory():
    for seed in range(80):
        problem = tied_problem(seed)
        solutions = every_solution(problem)
        found = np.array(problem.totals(fastest(problem)))
        better = (solutions <= found).all(axis=1) & (solutions < found).any(axis=1)
        assert not better.any(), f"seed {seed}: {found} is beaten by {solutions[better]}"


def test_an_option_far_slower_than_all_others_does_not_blur_them():
    slow = [[(1.0, 0.0, 9.0), (1.001, 0.0, 1.0), (837.0, 0.0, 1.0)]]
    assert fastest(AdditiveProblem.build(slow * 3)) == (0, 0, 0)


def test_options_taken_together_are_found_where_each_alone_would_be_slower_than_another():
    apart = [(2.0, 0.0, 1.0), (1.0, 9.0, 1.0)]
    problem = AdditiveProblem.build(
        [[*apart, (0.5, 0.1, 1.0)], [*apart, (1.2, 0.1, 1.0)]], [[(0, 2), (1, 2)]]
    )
    assert fastest(problem) == (2, 2) and fastest(problem, max_loss=0.1) == (0, 0)
    slower = AdditiveProblem.build(
        [[*apart, (0.5, 0.1, 1.0)], [*apart, (1.6, 0.1, 1.0)]], [[(0, 2), (1, 2)]]
    )
    assert fastest(slower) == (1, 1)


@pytest.mark.parametrize("make", [random_problem, joined_problem, tied_problem])
def test_the_front_holds_nothing_that_any_solution_beats(make):
    for seed in range(8):
        problem = make(seed)
        solutions = every_solution(problem)
        for picks in front(problem, 8):
            found = np.array(problem.totals(picks))
            better = (solutions <= found).all(axis=1) & (solutions < found).any(axis=1)
            gap = (
                (found - solutions[better]) / solutions.max(axis=0) if better.any() else np.zeros(1)
            )
            assert gap.max() < 1e-5, (
                f"seed {seed}: {picks} {found} is beaten by {solutions[better]}"
            )


def test_the_front_runs_from_the_fastest_to_the_most_exact_and_the_smallest():
    for seed in range(8):
        problem = random_problem(seed)
        solutions = every_solution(problem)
        totals = np.array([problem.totals(picks) for picks in front(problem, 8)])
        assert totals[0, 0] == pytest.approx(solutions[:, 0].min(), rel=1e-5)
        assert totals[:, 1].min() == 0.0
        assert totals[:, 2].min() == pytest.approx(solutions[:, 2].min(), rel=1e-5)
        assert list(totals[:, 0]) == sorted(totals[:, 0])


def test_the_front_has_no_point_twice():
    for make in (random_problem, tied_problem):
        points = front(make(3), 8)
        assert len(points) == len(set(points))


def test_undominated_leaves_out_what_is_beaten_and_keeps_what_is_equal():
    problem = AdditiveProblem.build(
        [[(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0.5, 2.0, 1.0)]]
    )
    assert undominated(problem, [(0,), (1,), (2,), (3,)]) == [(0,), (2,), (3,)]


def test_layers_with_one_option_get_it():
    problem = AdditiveProblem.build([[(1.0, 0.5, 10.0)], [(2.0, 0.0, 20.0)]])
    assert fastest(problem) == smallest(problem) == (0, 0)
    assert front(problem, 8) == [(0, 0)]
    assert fastest(problem, max_loss=0.5, max_memory=30) == (0, 0)
    assert fastest(problem, max_loss=0.4) is None
    assert fastest(problem, max_memory=29) is None


def test_a_layer_with_one_option_beside_others_uses_up_its_part_of_the_budget():
    problem = AdditiveProblem.build([[(1.0, 0.5, 10.0)], [(2.0, 0.0, 20.0), (1.0, 0.6, 5.0)]])
    assert fastest(problem, max_loss=1.0) == (0, 0)
    assert fastest(problem, max_loss=1.1) == (0, 1)


def test_the_solver_prints_nothing(capfd):
    for seed in range(6):
        for make in (random_problem, tied_problem):
            problem = make(seed)
            fastest(problem, max_loss=0.01, max_memory=10**6)
            front(problem, points=4)
        printed = capfd.readouterr()
        assert (printed.out, printed.err) == ("", ""), f"seed {seed}"


def large_problem(seed, layers=300, choices=40, *, alike=False):
    """Few shapes, whose layers share times and bytes; what is smaller or faster mostly loses more."""
    draw = np.random.default_rng(seed)
    bits = np.resize((16.0, 8.0, 6.5, 4.5, 4.0, 3.5, 2.5), choices)
    kinds = [
        (size * bits * draw.lognormal(0, 0.3, choices) / 8e6, np.round(size * bits / 8))
        for size in draw.integers(10**5, 10**7, 6)
    ]
    options = []
    for layer in range(layers):
        milliseconds, size = kinds[layer % len(kinds)]
        loss = np.where(
            bits < 16, 4.0**-bits * draw.lognormal(0, 1) * draw.lognormal(0, 0.3, choices), 0.0
        )
        options.append(list(zip(milliseconds, loss, size, strict=True)))
    pairs = [
        [(layer, [i]) for layer in (2 * n, 2 * n + 1)]
        for n in range(layers // 4)
        for i in range(choices)
    ]
    return AdditiveProblem.build(options, alike=pairs if alike else ())


def binding_limits(problem, share):
    """A loss limit, and a memory limit between what the fastest and the smallest solution within it take."""
    least = sum(layer.min() for layer in problem.loss)
    max_loss = least + (problem.totals(fastest(problem))[1] - least) * 10 ** (-3 * (1 - share))
    ends = fastest(problem, max_loss), smallest(problem, max_loss)
    return max_loss, sum(problem.totals(end)[2] for end in ends) / 2


def least_time_of_all_options(problem, max_loss, max_memory):
    """The same in one program with every option, without anything that was left out or fixed beforehand."""
    sizes = [len(layer) for layer in problem.time]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    time, loss, memory = (np.concatenate(of) for of in (problem.time, problem.loss, problem.memory))
    starts = np.concatenate(([0], np.cumsum(sizes)))
    one_each = (owners == np.arange(len(sizes))[:, None]).astype(float)
    same = np.zeros((sum(len(members) - 1 for members in problem.equalities), len(time)))
    row = 0
    for first, *others in problem.equalities:
        for other in others:
            for sign, (layer, options) in ((1, first), (-1, other)):
                same[row, starts[layer] + np.asarray(options)] = sign
            row += 1
    result = milp(
        time / time.max(),
        integrality=np.ones(len(time)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.vstack((loss / max_loss, memory / max_memory)), -np.inf, 1),
            *([LinearConstraint(same, 0, 0)] if len(same) else []),
        ],
        options={"mip_rel_gap": 1e-7},
    )
    return result.fun * time.max()


@pytest.mark.parametrize("alike", [False, True])
def test_options_left_out_beforehand_are_in_no_faster_solution(alike):
    for seed in range(4):
        problem = large_problem(seed, 40, 14, alike=alike)
        for share in (0.3, 0.7):
            max_loss, max_memory = binding_limits(problem, share)
            picks = fastest(problem, max_loss, max_memory)
            total = problem.totals(picks)
            assert total[1] <= max_loss * (1 + 1e-9) and total[2] <= max_memory, seed
            assert total[0] == pytest.approx(
                least_time_of_all_options(problem, max_loss, max_memory), rel=1e-5
            ), seed


def test_layers_of_one_format_get_it_as_trying_everything_finds():
    for seed in SEEDS:
        alone = random_problem(seed)
        layers = [
            np.column_stack(each) for each in zip(alone.time, alone.loss, alone.memory, strict=True)
        ]
        alike = [[(0, [i]), (1, [i] if i < len(layers[1]) else [])] for i in range(len(layers[0]))]
        alike += [[(0, []), (1, [i])] for i in range(len(layers[0]), len(layers[1]))]
        problem = AdditiveProblem.build([layer.tolist() for layer in layers], alike=alike)
        solutions = every_solution(alone)
        same = [
            picks[0] == picks[1]
            for picks in itertools.product(*(range(len(layer)) for layer in alone.time))
        ]
        for max_loss, max_memory in budgets(solutions, seed):
            within = solutions[is_within(solutions, max_loss, max_memory) & same]
            picks = fastest(problem, max_loss, max_memory)
            if len(within) == 0:
                assert picks is None, seed
            else:
                assert picks[0] == picks[1], seed
                assert problem.totals(picks)[0] == pytest.approx(within[:, 0].min(), rel=1e-5), seed


def unrelated_problem(seed, layers=300, choices=40):
    """Times, losses and bytes at random."""
    draw = np.random.default_rng(seed)
    return AdditiveProblem(
        tuple(draw.uniform(0.1, 5, (layers, choices))),
        tuple(draw.exponential(0.01, (layers, choices))),
        tuple(draw.integers(1000, 10**6, (layers, choices)).astype(float)),
    )


@pytest.mark.parametrize("make", [large_problem, unrelated_problem])
def test_three_hundred_layers_of_forty_options_take_seconds_at_most(make, capfd):
    one, two = [], []
    for seed, share in enumerate((0.3, 0.5, 0.7)):
        problem = make(seed)
        max_loss, max_memory = binding_limits(problem, share)
        for seconds, limits in ((one, (max_loss, None)), (two, (max_loss, max_memory))):
            started = time.process_time()
            assert problem.totals(fastest(problem, *limits))[1] <= max_loss * (1 + 1e-6)
            seconds.append(time.process_time() - started)
    # A tenth of it on a quiet machine; others run beside, and coverage slows the sweep down.
    assert sorted(one)[1] < 3.0 and sorted(two)[1] < 3.0, (one, two)
    assert capfd.readouterr().out == ""


def test_an_infinite_budget_is_none():
    problem = random_problem(0)
    assert fastest(problem, max_loss=math.inf, max_memory=math.inf) == fastest(problem)
    assert smallest(problem, max_loss=math.inf) == smallest(problem)
    most = problem.totals(fastest(problem))[2] * 0.9
    assert fastest(problem, max_loss=math.inf, max_memory=most) == fastest(problem, max_memory=most)
