"""How fast refinement makes the front grow, beside random plans and the same sampler without a warm
start.

    python studies/refinement/compare.py PLAN.DB TEXT OUT [--evaluations 40] [--seeds 3]

PLAN.DB is a finished search of a language model, TEXT the text that it was searched with. Each way
proposes plans; each plan is really applied and its perplexity measured on the selection part,
against the unquantized model window by window; its request time is what the search's calibrated
model predicts, so that the ways differ by their plans and not by noise of a clock. Told is the
hypervolume of all plans so far (see `autoquant.solver.hypervolume`) over that of the plans that a
search has proven when it begins to refine (uniform, heuristic, by bits and solved), by true
evaluations spent. OUT gets `growth.csv`, one row for each way, seed and evaluation, as they are
made, and `table.md`.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoquant.delivery.applier import Quantized, apply
from autoquant.delivery.searched import load_searched
from autoquant.evaluators.quality import TextQuality
from autoquant.evaluators.text import read_text
from autoquant.intervals import paired_increase
from autoquant.models import LoadedModel
from autoquant.records import BASELINES, Interval, LayerChoice, Plan, Proof
from autoquant.runtime.compiled import shallow_copy
from autoquant.solver.hypervolume import hypervolume
from autoquant.solver.planning import make_plan, predict
from autoquant.solver.refine import growth_of, point_of, proposals
from autoquant.solver.space import Options, SearchSpace
from autoquant.solver.uniform import original_plan
from autoquant.study.study import Study
from autoquant.tuner.prove import worst_numerics

SHOWN = (5, 10, 20, 30, 40)
Tell = Callable[[Proof | None], None]
Proposals = Iterator[tuple[Plan, Tell]]


@dataclass(slots=True)
class Evaluator:
    """Measures the quality of plans; each plan once, whoever proposes it."""

    loaded: LoadedModel
    quality: TextQuality
    original_ms: float
    reference: tuple[float, ...] = ()
    known: dict[str, Proof] = field(default_factory=dict)
    quantized: Quantized = field(default_factory=Quantized)

    def __call__(self, plan: Plan) -> Proof:
        self.reference = self.reference or self.quality.losses(self.loaded.module, "selection")
        if plan.plan_id not in self.known:
            self.known[plan.plan_id] = self._measure(plan)
        return self.known[plan.plan_id]

    def _measure(self, plan: Plan) -> Proof:
        module = shallow_copy(self.loaded.module)
        apply(plan, module, quantized=self.quantized)
        with worst_numerics(module, plan):
            losses = self.quality.losses(module, "selection")
        increase = paired_increase(losses, self.reference, logarithmic=True)
        return Proof(
            plan_id=plan.plan_id,
            request_ms=plan.prediction.request_ms,
            phase_ms={},
            original_request_ms=self.original_ms,
            original_phase_ms={},
            perplexity=None,
            loss=statistics.fmean(losses),
            increase=Interval(value=increase.value, low=increase.low, high=increase.high),
            selection_increase=increase,
            kl=None,
            memory_bytes=plan.prediction.memory_bytes,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What every way starts from."""

    space: SearchSpace
    known: dict[str, tuple[Plan, Proof]]

    def warm(self, seed: int, folder: str) -> Proposals:
        """What `autoquant search` does."""
        return self._proposals(self.known, seed, f"{folder}/warm{seed}.db")

    def cold(self, seed: int, folder: str) -> Proposals:
        """The same sampler in the same space, told of no plan."""
        untold = {
            plan_id: (replace(plan, kind="uniform"), proof)
            for plan_id, (plan, proof) in self.known.items()
        }
        return self._proposals(untold, seed, f"{folder}/cold{seed}.db")

    def random(self, seed: int, _folder: str) -> Proposals:
        """Every kind of layer gets one of its choices, drawn at random."""
        draw = random.Random(seed)
        while True:
            picked = [
                draw.choice([choice for choice in layer if not choice.joined])
                for layer in self.space.options
            ]
            yield make_plan(picked, "random", "refined", self.space.context), lambda _proof: None

    def _proposals(
        self, known: dict[str, tuple[Plan, Proof]], seed: int, database: str
    ) -> Proposals:
        url = f"sqlite:///{database}"
        return proposals(self.space, storage_url=url, seed=seed, known=known, max_memory_bytes=None)


def main() -> None:
    """Compare, and write what came out."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    setting, evaluate = prepare(arguments.database, arguments.text)
    rows = []
    with (arguments.out / "growth.csv").open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(
            file, ["way", "seed", "evaluation", "hypervolume", "seconds"], lineterminator="\n"
        )
        writer.writeheader()
        for row in compare(setting, evaluate, arguments.evaluations, arguments.seeds):
            writer.writerow(row)
            rows.append(row)
    table = as_table(rows, arguments.evaluations)
    (arguments.out / "table.md").write_text(table)
    print(table)


def prepare(database: str, text: str) -> tuple[Setting, Evaluator]:
    """The plans that refinement starts from, measured."""
    study = Study.open(database)
    facts = study.facts
    space = study.space()
    if space is None:
        raise SystemExit(f"{database} holds no finished search: run autoquant search to its end")
    plans = study.plans()
    loaded = load_searched(plans[0], str(facts.source["path"]), facts, None)
    parts = read_text(Path(text), loaded.tokenizer, max_positions=loaded.max_positions)
    quality = TextQuality(parts, facts.device.type)
    if quality.key != facts.identity["quality"]:
        raise SystemExit(f"{text} is not the text that {database} was searched with")
    original = original_plan(replace(space, unquantized=[layer[0] for layer in space.options]))
    evaluate = Evaluator(loaded, quality, original.prediction.request_ms)
    proven = [
        plan
        for plan in plans
        if plan.kind in (*BASELINES, "front") and plan.plan_id in study.proofs()
    ]
    start = [
        replace(plan, prediction=predict(_calibrated(plan, space.options), space.context))
        for plan in proven
    ]
    return Setting(
        space, {plan.plan_id: (plan, evaluate(plan)) for plan in (original, *start)}
    ), evaluate


def compare(
    setting: Setting, evaluate: Evaluator, evaluations: int, seeds: int
) -> Iterator[dict[str, object]]:
    """The hypervolume after each evaluation, over that of the start."""
    growth = growth_of(setting.known, "time")
    start = hypervolume(growth.points, growth.reference)
    for way in ("warm", "cold", "random"):
        for seed in range(seeds):
            points, began = list(growth.points), time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                proposed = getattr(setting, way)(seed, folder)
                for number, (plan, tell) in zip(range(1, evaluations + 1), proposed, strict=False):
                    proof = evaluate(plan)
                    tell(proof)
                    points.append(point_of(proof, "time") or growth.reference)
                    ratio = hypervolume(points, growth.reference) / start
                    seconds = round(time.monotonic() - began, 1)
                    yield {
                        "way": way,
                        "seed": seed,
                        "evaluation": number,
                        "hypervolume": ratio,
                        "seconds": seconds,
                    }


def as_table(rows: Sequence[dict[str, object]], evaluations: int) -> str:
    """Mean growth over seeds, with the least and the largest."""
    shown = [count for count in SHOWN if count <= evaluations]
    lines = [
        "Hypervolume over that before refinement, mean over seeds (least to largest):\n",
        f"| way | {' | '.join(f'{count} evaluations' for count in shown)} |",
        f"| --- |{' --- |' * len(shown)}",
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for count in shown:
            reached: dict[object, float] = {}
            for row in rows:
                if row["way"] == way and int(str(row["evaluation"])) <= count:
                    reached[row["seed"]] = float(str(row["hypervolume"]))
            values = list(reached.values())
            cells.append(
                f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
                if values
                else ""
            )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _calibrated(plan: Plan, options: Options) -> list[LayerChoice]:
    """The plan's choices with their times as they are in the options."""
    return [
        next(
            (
                c
                for c in layer
                if (c.format, c.route, c.joined) == (own.format, own.route, own.joined)
            ),
            own,
        )
        for own, layer in zip(plan.layers, options, strict=True)
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("database", help="a finished search")
    parser.add_argument("text", help="the text it was searched with")
    parser.add_argument("out", type=Path, help="folder for what comes out")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
