"""How often a recommended plan breaks its limit on text that the search never saw, over searches on
resampled texts.

    python studies/sensitivity/limits.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT
        [--device cuda] [--methods path]

Arguments are those of compare.py. The plans are one front: allocated by the first method's losses
for `BUDGETS` of average bits. Each plan's loss is measured once on every window of the report text;
a search then is a draw of 56 of these windows (with replacement between searches, without within
one), dealt to calibration, selection and report as `autoquant search` deals them. It recommends the
plan of fewest bits whose upper end of the paired 95 % interval on the selection part is within the
limit, and breaks the limit if the increase on the report part, or on all other windows, is above
it. Beside the interval of the mean stands that of the mean of as many other windows as the report
part has, which autoquant uses (`RULES`). OUT gets `limits.json` (bits and losses, which are not
measured again where they are there) and `limits.md`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compare import Plan, average_bits, changes, parse, quality, score, set_up, subject
from front import allocate

from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.sensitivity import EVERY_LAYER
from autoquant.evaluators.sensitivity.gradients import PlacedLinears, batch_logits
from autoquant.evaluators.sensitivity.together import CalibrationModel
from autoquant.evaluators.text import WANTED_WINDOWS, deal
from autoquant.intervals import paired_increase
from autoquant.records import Interval

BUDGETS = np.linspace(3.0, 8.0, 51)
LIMITS = (0.003, 0.01, 0.03)
SEARCHES = 2000
RULES = {
    "mean": 1.0,
    "another mean": math.sqrt(1 + WANTED_WINDOWS["selection"] / WANTED_WINDOWS["report"]),
}
UNQUANTIZED = {"bits": 16.0, "report": 0.0, "others": 0.0}
Losses = list[list[float]]


def measure(arguments: argparse.Namespace, out: Path) -> tuple[list[float], Losses]:
    """Average bits of each plan, and the mean negative log-likelihood of each window.

    Of the unquantized model, then of plans.
    """
    kept = out / "limits.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        return found["bits"], found["losses"]
    loaded, sites, calibration, report = subject(arguments)
    method = arguments.methods.split(",")[0]
    scored = score(
        method, loaded, sites, calibration, arguments.device, out / f"{method}.json"
    ).losses
    losses = {key: loss for key, loss in scored.items() if key[0] != EVERY_LAYER}
    plans: list[Plan] = []
    for bits in BUDGETS:
        if (plan := allocate(losses, sites, float(bits))) not in plans:
            plans.append(plan)
    dtypes = {site.name: getattr(torch, site.shape.dtype) for site in sites}
    with in_float32(loaded.module):
        model = CalibrationModel(loaded.module, quality(report, arguments.device))
        found = [window_losses(model, [])]
        for number, plan in enumerate(plans, 1):
            placed = model.sites(changes(sites, plan), dtypes)
            for site in placed:
                site.stand_at(1.0)
            found.append(window_losses(model, placed))
            print(
                f"plan {number} of {len(plans)}: {np.mean(found[-1]) - np.mean(found[0]):+.4f} "
                "nats",
                flush=True,
            )
    bits = [average_bits(plan, sites) for plan in plans]
    kept.write_text(
        json.dumps({"bits": bits, "losses": [[round(loss, 6) for loss in of] for of in found]})
    )
    return bits, found


def window_losses(model: CalibrationModel, placed: Sequence) -> list[float]:
    """Mean negative log-likelihood per token of each window, in nats."""
    found = []
    for batch in model.batches:
        with PlacedLinears(placed):
            logits = batch_logits(model.module, batch)[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        found += losses.reshape(len(batch), -1).mean(1).tolist()
    return found


Found = dict[tuple[float, str], list[dict[str, float]]]


def searches(bits: Sequence[float], losses: np.ndarray, seed: int) -> Found:
    """By limit and rule, what each search recommends, and its increase on the report part and on
    all windows not drawn.
    """
    generator = np.random.default_rng(seed)
    order = np.array(deal(WANTED_WINDOWS))
    plans = sorted(range(len(bits)), key=lambda plan: bits[plan])
    found: Found = {(limit, rule): [] for limit in LIMITS for rule in RULES}
    for _ in range(SEARCHES):
        drawn = generator.permutation(losses.shape[1])
        parts = {part: drawn[: len(order)][order == part] for part in WANTED_WINDOWS} | {
            "others": drawn[len(order) :]
        }

        def increase(plan: int, part: str, parts: dict[str, np.ndarray] = parts) -> Interval:
            chosen = parts[part]
            return paired_increase(
                losses[plan + 1, chosen].tolist(), losses[0, chosen].tolist(), logarithmic=True
            )

        selection = {plan: increase(plan, "selection") for plan in plans}
        for (limit, rule), of in found.items():
            plan = next(
                (plan for plan in plans if upper_end(selection[plan], RULES[rule]) <= limit), None
            )
            costs = (
                {part: increase(plan, part).value for part in ("report", "others")}
                if plan is not None
                else {}
            )
            of.append(UNQUANTIZED if plan is None else {"bits": bits[plan], **costs})
    return found


def upper_end(interval: Interval, reach: float) -> float:
    """Of an interval whose half is `reach` times as long, in the logarithm of perplexity."""
    middle, high = math.log1p(interval.value), math.log1p(interval.high)
    return math.expm1(middle + reach * (high - middle))


def main() -> None:
    arguments = parse(__doc__, methods="path")
    out = set_up(arguments)
    bits, losses = measure(arguments, out)
    heading = [
        "limit",
        "interval of",
        "above it: report part",
        "all others",
        "first 100; hundreds above 5",
        "median bits",
    ]
    lines = [[*heading, "increase on all others"], ["---"] * 7]
    for (limit, rule), found in searches(bits, np.array(losses), arguments.seed).items():
        above = {
            part: np.array([each[part] > limit for each in found]) for part in ("report", "others")
        }
        others = [each["others"] for each in found]
        shares = [f"{100 * above[part].mean():.1f} of 100" for part in above]
        hundreds = above["report"].reshape(-1, 100).sum(1)
        cells = [
            f"{limit:.1%}",
            rule,
            *shares,
            f"{hundreds[0]}; {(hundreds > 5).sum()} of {len(hundreds)}",
        ]
        bits_used = np.median([each["bits"] for each in found])
        lines.append(
            [*cells, f"{bits_used:.2f}", f"{np.median(others):.2%}, at most {max(others):.2%}"]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (out / "limits.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
