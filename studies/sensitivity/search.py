"""How low the divergence at 3.0 average bits can be brought by true evaluations, however many:
several searches side by side.

    python studies/sensitivity/search.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT
        [--device cuda] [--seconds 30]

Arguments and OUT are those of compare.py; plans start from the losses of the first of `--methods`.
Each search proposes plans within the budget and evaluates them on the calibration windows, in TF32
on a GPU, one CUDA graph for all windows. `refine`: as front.py does. `exchange`: every change of
one layer and the most promising exchanges between two, until none pays. `anneal`: simulated
annealing over exchanges, which a linear model of all plans evaluated so far pre-selects.
`elsewhere`: the same from a random plan. `regression`: losses fitted to plans drawn around the
best, solved exactly, again from there. `pairs`: the interaction of every pair of layers measured at
the plan, the quadratic model annealed, its best plans evaluated. `oracle`: `anneal` on the report
windows themselves: what nothing that is fair can reach. What each found is evaluated on the report
windows in float32. OUT gets `search.json` and `search.md`.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
import torch
from compare import FORMATS, Plan, parse, score, set_up, subject
from front import Truth, allocate, refine

from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.sensitivity.gradients import batch_logits
from autoquant.intervals import paired_increase
from autoquant.records import Site

BITS = 3.0
NAMES = list(FORMATS)
Picks = tuple[int, ...]
"""A plan as the number of each site's format."""


class Weights:
    """The model's weights in every format, put in place where a plan wants another one than is
    there.
    """

    def __init__(self, module: torch.nn.Module, sites: Sequence[Site]) -> None:
        self.parameters = [module.get_parameter(site.parameters[0]) for site in sites]
        self._original = [parameter.detach().clone() for parameter in self.parameters]
        self._made = [
            [
                fmt.dequantize(fmt.store(p.to(getattr(torch, site.shape.dtype)))).float()
                for fmt, _, _ in FORMATS.values()
            ]
            for p, site in zip(self._original, sites, strict=True)
        ]
        self._there: list[int | None] = [None] * len(sites)

    def put(self, picks: Picks | None) -> None:
        """A plan's; None: the model's own."""
        for i, parameter in enumerate(self.parameters):
            wanted = None if picks is None else picks[i]
            if wanted != self._there[i]:
                parameter.copy_(self._original[i] if wanted is None else self._made[i][wanted])
                self._there[i] = wanted


class Landscape:
    """Mean divergence of plans on some windows, each evaluated once."""

    def __init__(
        self, module: torch.nn.Module, weights: Weights, ids: torch.Tensor, device: str
    ) -> None:
        self.module, self.weights = module, weights
        self.ids = ids.to(device)
        weights.put(None)
        self._p = batch_logits(module, self.ids).softmax(-1)
        self._entropy = torch.xlogy(self._p, self._p).sum(-1)
        self.known: dict[Picks, float] = {}
        self._graph = self._captured() if device.startswith("cuda") else None

    def __call__(self, picks: Picks) -> float:
        if picks not in self.known:
            self.weights.put(picks)
            if self._graph is not None:
                self._graph.replay()
                self.known[picks] = float(self._out.item())
            else:
                self.known[picks] = float(self._divergence().item())
        return self.known[picks]

    def _divergence(self) -> torch.Tensor:
        logits = batch_logits(self.module, self.ids)
        return (self._entropy + logits.logsumexp(-1) - (self._p * logits).sum(-1)).mean()

    def _captured(self) -> torch.cuda.CUDAGraph:
        torch.backends.cuda.matmul.allow_tf32 = True
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._divergence()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._out = self._divergence()
        torch.backends.cuda.matmul.allow_tf32 = False
        return graph


class Space:
    """Plans within the budget of average bits, and how to get from one to another."""

    def __init__(self, sites: Sequence[Site], seed: int) -> None:
        self.sites = sites
        self.rng = random.Random(seed)
        width = np.array(
            [bits + 16 / group if group else 0.0 for _, bits, group in FORMATS.values()]
        )
        sizes = np.array([site.shape.n * site.shape.k for site in sites], dtype=float)
        rows = np.array([[8 + 16 / site.shape.k] for site in sites])
        self.cost = np.where(width > 0, width, rows) * (sizes / sizes.sum())[:, None]
        ladder = np.argsort(self.cost[0])
        self.near = [
            [int(g) for g in ladder[max(0, r - 2) : r + 3] if g != f] for f, r in ranks(ladder)
        ]

    def bits(self, picks: Picks) -> float:
        return float(sum(self.cost[i, f] for i, f in enumerate(picks)))

    def fits(self, picks: Picks, slack: float = 0.03) -> bool:
        return BITS - slack <= self.bits(picks) <= BITS * (1 + 1e-9)

    def allocated(self, losses: np.ndarray, near: Picks | None = None, most: int = 0) -> Picks:
        """The plan of least summed loss within the budget, see `allocate`."""
        named = {
            (site.name, name): float(losses[i, f])
            for i, site in enumerate(self.sites)
            for f, name in enumerate(NAMES)
        }
        return self.picks(
            allocate(named, self.sites, BITS, None if near is None else self.plan(near), most)
        )

    def plan(self, picks: Picks) -> Plan:
        return {site.name: NAMES[f] for site, f in zip(self.sites, picks, strict=True)}

    def picks(self, plan: Plan) -> Picks:
        return tuple(NAMES.index(plan[site.name]) for site in self.sites)

    def exchanged(self, picks: Picks, layers: int = 2) -> Picks:
        """So many layers changed at random by at most two steps of bits, within the budget."""
        while True:
            found = list(picks)
            for i in self.rng.sample(range(len(picks)), layers):
                found[i] = self.rng.choice(self.near[found[i]])
            if self.fits(tuple(found)):
                return tuple(found)


def ranks(ladder: np.ndarray) -> Iterator[tuple[int, int]]:
    """Each format with its place on the ladder."""
    yield from ((f, int(np.flatnonzero(ladder == f)[0])) for f in range(len(ladder)))


def fitted(known: dict[Picks, float], prior: np.ndarray, most: int = 3000) -> np.ndarray:
    """Losses `[sites, formats]` whose sums best explain the last plans evaluated, as near to the
    prior as that leaves open.
    """
    plans = list(known)[-most:]
    x = np.zeros((len(plans), prior.size))
    for row, picks in enumerate(plans):
        x[row, [i * prior.shape[1] + f for i, f in enumerate(picks)]] = 1.0
    y = np.array([known[picks] for picks in plans])
    mean, centre = y.mean(), x.mean(0)
    x, left = x - centre, y - mean - (x - centre) @ prior.ravel()
    change = np.linalg.solve(x.T @ x + 0.3 * np.eye(prior.size), x.T @ left)
    return prior + change.reshape(prior.shape)


Ends = Callable[[], bool]


def anneal(
    f: Landscape, space: Space, start: Picks, prior: np.ndarray, ends: Callable[[], float]
) -> Picks:
    """Simulated annealing whose proposals a linear model pre-selects; `ends` gives the share of
    time that is used up.
    """
    hot, cold = 0.01, 0.0002
    losses, here, value = prior, start, f(start)
    best, least, fitted_at = start, value, 0
    while (used := ends()) < 1:
        temperature = hot * (cold / hot) ** used
        if len(f.known) > 2 * fitted_at + 200 or len(f.known) > fitted_at + 1500:
            losses, fitted_at = fitted(f.known, prior), len(f.known)
        other = selected(space, here, losses, 2 * temperature)
        tried = f(other)
        if tried < value or space.rng.random() < math.exp((value - tried) / temperature):
            here, value = other, tried
        if value < least:
            best, least = here, value
    return best


def selected(space: Space, picks: Picks, losses: np.ndarray, temperature: float) -> Picks:
    """An exchange that the linear model would accept."""
    for _ in range(200):
        other = space.exchanged(picks, space.rng.choice((1, 2, 2, 3)))
        changed = sum(
            losses[i, g] - losses[i, f]
            for i, (f, g) in enumerate(zip(picks, other, strict=True))
            if f != g
        )
        if changed < 0 or space.rng.random() < math.exp(-changed / temperature):
            return other
    return other


def exchange(f: Landscape, space: Space, start: Picks, ends: Callable[[], float]) -> Picks:
    """Steepest single changes, then exchanges in the order of their summed effects, until 400 in a
    row gain nothing.
    """
    best = start
    while ends() < 1:
        marginal = marginals(f, best)
        found = next(
            (p for p in promising(space, best, marginal)[:400] if ends() < 1 and f(p) < f(best)),
            None,
        )
        if found is None:
            return best
        best = found
    return best


def marginals(f: Landscape, picks: Picks) -> np.ndarray:
    """What each change of one layer truly costs at a plan."""
    base = f(picks)
    return np.array(
        [
            [f((*picks[:i], g, *picks[i + 1 :])) - base for g in range(len(NAMES))]
            for i in range(len(picks))
        ]
    )


def promising(space: Space, picks: Picks, marginal: np.ndarray) -> list[Picks]:
    """Plans within the budget that differ in one or two layers, the least sum of effects first."""
    left = BITS * (1 + 1e-9) - space.bits(picks)
    extra = space.cost - space.cost[range(len(picks)), picks][:, None]
    found = []
    for i, j in combinations(range(len(picks)), 2):
        fits = extra[i][:, None] + extra[j][None, :] <= left
        sums = np.where(fits, marginal[i][:, None] + marginal[j][None, :], np.inf)
        for flat in np.argsort(sums, axis=None)[:4]:
            a, b = np.unravel_index(flat, sums.shape)
            other = list(picks)
            other[i], other[j] = int(a), int(b)
            if math.isfinite(sums[a, b]) and tuple(other) != picks:
                found.append((float(sums[a, b]), tuple(other)))
    return list(dict.fromkeys(plan for _, plan in sorted(found)))


def regression(
    f: Landscape, space: Space, start: Picks, prior: np.ndarray, ends: Callable[[], float]
) -> Picks:
    """Losses at the plan itself, over random mixtures around it.

    Fitted, solved, and again from the better plan.
    """
    best, losses = start, prior
    while ends() < 1:
        for _ in range(300):
            f(space.exchanged(best, space.rng.randint(2, 10)))
        losses = fitted(f.known, losses)
        tried = [
            space.allocated(losses - losses.min(), best, most) for most in (4, 8, 16, len(best))
        ]
        best = min([*tried, best], key=f)
    return best


def pairs(f: Landscape, space: Space, start: Picks, ends: Callable[[], float]) -> Picks:
    """The quadratic model of what changes of two layers cost together, measured at the plan,
    annealed and tried out.
    """
    base, count = f(start), len(start)
    options = [
        [
            start[i],
            *sorted(
                space.near[start[i]],
                key=lambda g, i=i: abs(space.cost[i, g] - space.cost[i, start[i]]),
            )[:2],
        ]
        for i in range(count)
    ]
    single = {
        (i, g): f((*start[:i], g, *start[i + 1 :])) - base for i in range(count) for g in options[i]
    }
    both = np.zeros((count, len(NAMES), count, len(NAMES)))
    for i, j in combinations(range(count), 2):
        if ends() >= 1:
            break
        for g in options[i][1:]:
            for h in options[j][1:]:
                plan = list(start)
                plan[i], plan[j] = g, h
                both[i, g, j, h] = both[j, h, i, g] = (
                    f(tuple(plan)) - base - single[i, g] - single[j, h]
                )
    best = start
    for damping in (0.25, 0.5, 0.75, 1.0):
        for _ in range(5):
            best = min(best, _annealed(space, start, options, single, damping * both), key=f)
    return best


def _annealed(
    space: Space, start: Picks, options: list[list[int]], single: dict, both: np.ndarray
) -> Picks:
    here, sites = list(start), np.arange(len(start))
    steps = 20_000
    for step in range(steps):
        temperature = 0.01 * 0.01 ** (step / steps)
        i, j = space.rng.sample(range(len(start)), 2)
        g, h = space.rng.choice(options[i]), space.rng.choice(options[j])
        other = list(here)
        other[i], other[j] = g, h
        if other == here or not space.fits(tuple(other), 0.1):
            continue
        now = np.array(here)
        change = sum(single[k, other[k]] - single[k, here[k]] for k in (i, j))
        for k in (i, j):
            rest = (sites != i) & (sites != j)
            effect = (
                both[k, other[k], sites[rest], now[rest]] - both[k, here[k], sites[rest], now[rest]]
            )
            change += float(effect.sum())
        change += float(both[i, g, j, h] - both[i, here[i], j, here[j]])
        if change < 0 or space.rng.random() < math.exp(-change / temperature):
            here = other
    return tuple(here)


def clock(seconds: float) -> Callable[[], float]:
    """The share of the time that is used up."""
    began = time.monotonic()
    return lambda: (time.monotonic() - began) / seconds


class Named:
    """A landscape as front.py asks for it."""

    def __init__(self, f: Landscape, space: Space) -> None:
        self._f, self._space = f, space

    def loss(self, plan: Plan) -> float:
        return self._f(self._space.picks(plan))


SEARCHES = "refine,exchange,regression,pairs,anneal,elsewhere,oracle"
SHOWN = (100, 300, 600, 1000, 3000)


def search(name: str, f: Landscape, space: Space, prior: np.ndarray, seconds: float) -> Picks:
    """The best plan that a search finds from the allocated one."""
    start, ends = space.allocated(prior), clock(seconds)
    if name == "refine":
        return space.picks(refine(space.plan(start), space.sites, BITS, Named(f, space)))
    if name == "exchange":
        return exchange(f, space, start, ends)
    if name == "regression":
        return regression(f, space, start, prior, ends)
    if name == "pairs":
        return pairs(f, space, start, ends)
    if name == "elsewhere":
        start = space.allocated(prior * np.exp(np.random.default_rng(1).normal(0, 1, prior.shape)))
    return anneal(f, space, start, prior, ends) if name != "allocated" else start


def trace(f: Landscape, space: Space) -> dict[int, float]:
    """The least divergence of a plan within the budget, by how many evaluations it took."""
    values = [
        value if space.bits(picks) <= BITS * (1 + 1e-9) else math.inf
        for picks, value in f.known.items()
    ]
    least = np.minimum.accumulate(values)
    return {count: float(least[count - 1]) for count in SHOWN if count <= len(least)}


def main() -> None:
    arguments = parse(__doc__, searches=SEARCHES)
    out = set_up(arguments)
    loaded, sites, calibration, report = subject(arguments)
    method = arguments.methods.split(",")[0]
    losses = score(
        method, loaded, sites, calibration, arguments.device, out / f"{method}.json"
    ).losses
    prior = np.array([[losses[site.name, name] for name in NAMES] for site in sites])
    space = Space(sites, arguments.seed)
    rows: list[dict[str, object]] = []
    with in_float32(loaded.module):
        weights = Weights(loaded.module, sites)
        f, oracle = (
            Landscape(loaded.module, weights, ids, arguments.device)
            for ids in (calibration, report)
        )
        truth = Truth(loaded.module, sites, report, arguments.device)
        for name in ["allocated", *arguments.searches.split(",")]:
            landscape = oracle if name == "oracle" else f
            landscape.known.clear()
            began = time.monotonic()
            best = search(name, landscape, space, prior, arguments.seconds)
            seconds, evaluations = time.monotonic() - began, len(landscape.known)
            reached, inner = trace(landscape, space) if landscape.known else {}, landscape(best)
            weights.put(None)
            kl = truth.windows(space.plan(best))
            rows.append(
                {
                    "label": name,
                    "evaluations": evaluations,
                    "seconds": seconds,
                    "calibration": inner,
                    "kl": kl,
                }
                | {"bits": space.bits(best), "plan": space.plan(best), "trace": reached}
            )
            print(
                f"{name}: {evaluations} in {seconds:.0f} s, {reached}, {inner:.4f}, report "
                f"{np.mean(kl):.4f}",
                flush=True,
            )
            (out / "search.json").write_text(json.dumps(rows))
    (out / "search.md").write_text(as_table(rows))
    print(as_table(rows))


def as_table(rows: Sequence[dict]) -> str:
    lines = [
        "| search | evaluations | seconds | bits | calibration KL | report KL | to the allocated "
        "plan's |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        increase = paired_increase(row["kl"], rows[0]["kl"], logarithmic=False)
        ratio = (
            f"{increase.value:+.1%} ({increase.low:+.1%} to {increase.high:+.1%})"
            if row is not rows[0]
            else ""
        )
        lines.append(
            f"| {row['label']} | {row['evaluations']} | {row['seconds']:.0f} | {row['bits']:.3f} "
            f"| {row['calibration']:.4f} |"
            f" {np.mean(row['kl']):.4f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
