"""How well a factor for each numerics predicts what mixed plans are measured to lose.

    python studies/solver/loss_scale.py plan.db

For each proven plan of more than one numerics it prints the share of the limit that the plan uses,
and which share is predicted: with one factor for all layers, the median over the uniform plans, and
with a factor for the numerics of each. Both are learnt from the uniform plans alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace

from autoquant.solver.loss_scale import fit_loss_scale
from autoquant.store import open_store
from autoquant.study.study import Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("db")
    store = open_store(parser.parse_args().db, create=False)
    study = Study(store, next(iter(store.studies())))
    space = study.space()
    if space is None:
        raise SystemExit("this search ended before its layers were scored")
    plans, proofs = {plan.plan_id: plan for plan in study.plans()}, study.proofs()
    each = fit_loss_scale(space, study.limits, plans, proofs)
    if each.allowed is None:
        raise SystemExit("this search has no limit of quality")
    spaces = replace(each, factors={}).space(space), each.space(space)
    print(f"factors: usual {each.usual:.2f}")
    for numerics, factor in each.factors.items():
        print(f"  {numerics:32} {factor:.2f}")
    print(f"{'plan':32} {'measured':>9} {'one':>6} {'each':>6}   share of the limit")
    errors = []
    for plan_id, proof in proofs.items():
        plan, share = plans[plan_id], study.limits.used(proof)
        if plan.kind in ("original", "uniform") or share is None or share <= 0:
            continue
        shares = [scaled.plan_loss(plan) / each.allowed for scaled in spaces]
        errors.append([abs(math.log(found / share)) for found in shares if found > 0])
        print(f"{plan.label:32} {share:9.2f} {shares[0]:6.2f} {shares[1]:6.2f}")
    for name, found in zip(("one", "each"), zip(*errors, strict=True), strict=True):
        print(
            f"{name}: off by {math.exp(statistics.median(found)):.2f} times in the median,"
            f" {math.exp(max(found)):.2f} at worst"
        )


if __name__ == "__main__":
    main()
