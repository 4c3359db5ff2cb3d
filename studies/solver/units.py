"""What it costs that neighbouring blocks get the same choice.

    python studies/solver/units.py plan.db

Solves the first study of a search's database with units and with each layer for itself. For budgets
of summed loss it prints the predicted milliseconds of all linears in a request, and of how many
makes the blocks are.
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

from autoquant.solver import units
from autoquant.solver.space import SearchSpace
from autoquant.solver.units import block_of
from autoquant.store import open_store
from autoquant.study.study import Study

BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("db")
    store = open_store(parser.parse_args().db, create=False)
    space = Study(store, next(iter(store.studies()))).space()
    if space is None:
        raise SystemExit("this search ended before its layers were scored")
    print(f"{'loss':>6}  {'units: ms':>10} {'makes':>5}  {'layers: ms':>10} {'makes':>5}  slower")
    for budget in BUDGETS:
        tied = solved(space, budget)
        with patch.object(units, "MAKES", len(space.options)):
            alone = solved(SearchSpace(space.options, space.context), budget)
        if tied and alone:
            (ms, makes), (least_ms, most) = tied, alone
            print(
                f"{budget:6}  {ms:10.1f} {makes:5}  {least_ms:10.1f} {most:5}"
                f"  {ms / least_ms - 1:+.2%}"
            )


def solved(space: SearchSpace, budget: float) -> tuple[float, int] | None:
    """Return the time of the fastest plan within a budget, and how many makes of blocks it has."""
    picks = space.solve("time", max_summed_loss=budget, max_memory_bytes=None)
    if picks is None:
        return None
    blocks: dict[tuple[str, int], list[tuple[str, object]]] = {}
    for choice in space.chosen(picks):
        if place := block_of(choice.name):
            role = choice.name.rpartition(".")[2]
            blocks.setdefault(place, []).append((role, (choice.format, choice.route)))
    makes = {tuple(make) for make in blocks.values()}
    return space.problem.totals(picks)[0], len(makes)


if __name__ == "__main__":
    main()
