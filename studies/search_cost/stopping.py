"""How often is a plan within the limit stopped early, and how many windows does stopping save?

    python studies/search_cost/stopping.py plan.db [--trials 2000]

Reads the losses of every window of the plans that a search has proven whole, and prints after how
many a plan would be stopped, by the limit. **Error**: windows are drawn again from a
plan's own differences of losses, with replacement and so often as there are, and moved so that
their mean is just within the limit. That is the worst case. What is stopped then is stopped
wrongly; at most 0.1 % is promised.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence

from autoquant import Study
from autoquant.evaluators.text import LEAST_WINDOWS
from autoquant.records import ORIGINAL_LABEL, PARTLY
from autoquant.solver.beyond import ERROR, looks, surely_beyond
from autoquant.solver.limits import Limits

LIMITS = 0.002, 0.005, 0.01, 0.02, 0.05


def stopped_after(differences: Sequence[float], limit: float) -> int:
    """Return after how many windows a plan is stopped; all of them if it is not."""
    for seen in sorted(looks(len(differences), LEAST_WINDOWS["selection"])):
        beyond = surely_beyond(
            Limits(max_ppl_increase=limit),
            differences[:seen],
            [0.0] * seen,
            (),
            logarithmic=True,
            unseen=len(differences) - seen,
        )
        if beyond:
            return seen
    return len(differences)


def wrongly(differences: Sequence[float], limit: float, trials: int) -> int:
    """Return how many of the drawn plans, which are just within the limit, are stopped."""
    draw, count, wrong = random.Random(0), len(differences), 0
    for _ in range(trials):
        drawn = draw.choices(differences, k=count)
        shift = math.log1p(limit) - 1e-9 - math.fsum(drawn) / count
        wrong += stopped_after([each + shift for each in drawn], limit) < count
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("database")
    parser.add_argument("--trials", type=int, default=2_000)
    arguments = parser.parse_args()
    study = Study.open(arguments.database)
    plans = {plan.plan_id: plan.label for plan in study.plans()}
    proofs = {plans[plan_id]: proof for plan_id, proof in study.proofs().items()}
    reference = proofs.pop(ORIGINAL_LABEL).selection_losses
    wrong = trials = 0
    print("windows of the selection part measured, by the limit")
    print(f"{'increase':>9}  " + "  ".join(f"{limit:>6.1%}" for limit in LIMITS) + "  plan")
    for label, proof in proofs.items():
        if any(note.startswith(PARTLY) for note in proof.notes):
            continue
        pairs = zip(proof.selection_losses, reference, strict=True)
        differences = [loss - before for loss, before in pairs]
        seen = [stopped_after(differences, limit) for limit in LIMITS]
        cells = "  ".join(f"{count:>6}" for count in seen)
        print(f"{proof.selection_increase.value:>+9.2%}  {cells}  {label}", flush=True)
        wrong += wrongly(differences, 0.01, arguments.trials)
        trials += arguments.trials
    print(
        f"stopped wrongly: {wrong} of {trials} plans just within the limit,"
        f" {wrong / max(trials, 1):.3%}; {ERROR:.1%} at most is promised"
    )


if __name__ == "__main__":
    main()
