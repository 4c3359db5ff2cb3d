"""Divergence at equal average bits: plans that each sensitivity allocates, refined, beside uniform
and heuristic ones.

    python studies/sensitivity/front.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT [--device cuda]
        [--methods fisher,path]

Arguments and OUT are those of compare.py, whose losses (`METHOD.json`) are used where they are
there. For each budget of average bits the plan of least summed loss is found exactly. With
`--refine` the plans of 3 and 3.5 bits are then improved by true evaluations on the calibration
text: the loss of each change is measured, the sums are solved again for a plan that differs in few
layers, and the plan is kept if it is truly better. With `--rounding gptq` (or hqq, clip) the last
method allocates once more, with weights of fewer than 8 bits rounded so, for the calibration text.
Divergences are mean KL per token to the unquantized model on the report text, in float32, with a
paired 95 % interval of the ratio to the first method's plan. OUT gets `front.json` and `front.md`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from compare import (
    FORMATS,
    Changes,
    Losses,
    Plan,
    average_bits,
    changes,
    parse,
    quality,
    score,
    set_up,
    subject,
)

from autoquant.candidates import A16
from autoquant.candidates.formats.low_bit import BitPlaneTensor
from autoquant.candidates.formats.rounding import ROUNDINGS, Grid, rounded_formats
from autoquant.delivery.rounding_inputs import Calibration
from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.logits import divergence_sum
from autoquant.evaluators.sensitivity import Change
from autoquant.evaluators.sensitivity.gradients import PlacedLinears, batch_logits
from autoquant.evaluators.sensitivity.together import CalibrationModel, PathSite
from autoquant.evaluators.sensitivity.weights import ChangedWeights, Room
from autoquant.intervals import paired_increase
from autoquant.models import LoadedModel
from autoquant.records import Site
from autoquant.solver.solve import AdditiveProblem, fastest

BUDGETS = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
SWEEPS = 4
MOST_CHANGED = 12


class Truth:
    """True divergences of plans on some windows.

    Changed weights are kept, so that a plan costs its forward passes only.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        sites: Sequence[Site],
        ids: torch.Tensor,
        device: str,
        rounded: Changes | None = None,
    ) -> None:
        self.evaluations = 0
        self._calibration = CalibrationModel(module, quality(ids, device))
        self._references = [
            self._calibration.reference(n) for n in range(len(self._calibration.batches))
        ]
        self._sites: dict[tuple[str, str], PathSite] = {}
        room = Room(1 << 40)
        with_change = {
            (change.site.name, change.numerics): change for change in changes(sites, None, rounded)
        }
        weights: dict[str, ChangedWeights] = {}
        for (name, numerics), change in with_change.items():
            parameter = module.get_parameter(change.site.parameters[0])
            kept = weights.setdefault(
                name,
                ChangedWeights(
                    parameter, getattr(torch, change.site.shape.dtype), room, parameter.device
                ),
            )
            self._sites[name, numerics] = site = PathSite(parameter, change, kept, parameter.device)
            site.stand_at(1.0)

    def windows(self, plan: Mapping[str, str]) -> list[float]:
        """Mean divergence per token of each window, in nats."""
        self.evaluations += 1
        with PlacedLinears([self._sites[key] for key in plan.items()]):
            return self.of(self._calibration.module)

    def of(self, module: torch.nn.Module) -> list[float]:
        """The same of any module that takes token ids."""
        found = []
        for reference, batch in zip(self._references, self._calibration.batches, strict=True):
            logits = batch_logits(module, batch)
            found += [divergence_sum(a, b) / len(b) for a, b in zip(reference, logits, strict=True)]
        return found

    def loss(self, plan: Mapping[str, str]) -> float:
        """Mean over all windows."""
        return float(np.mean(self.windows(plan)))


def allocate(
    losses: Losses,
    sites: Sequence[Site],
    bits: float,
    near: Plan | None = None,
    most: int = 0,
    groups: Sequence[Sequence[int]] = (),
) -> Plan:
    """The plan of least summed loss within a budget of average bits; it differs from `near` in at
    most `most` layers.

    Args:
        groups: Sites, by their numbers, that get one format.
    """
    names = list(FORMATS)
    size = {site.name: site.shape.n * site.shape.k for site in sites}
    total = sum(size.values())
    # To the solver the summed loss is time, the number of changes is loss, and bits are memory.
    costs = [
        [
            (
                losses[s.name, name],
                float(near is not None and near[s.name] != name),
                average_bits({s.name: name}, [s]) * share,
            )
            for name in names
        ]
        for s in sites
        for share in [size[s.name] / total]
    ]
    changed = None if near is None else most + 0.5
    together = [[(site, pick) for site in group] for group in groups for pick in range(len(names))]
    picks = fastest(
        AdditiveProblem.build(costs, together), max_loss=changed, max_memory=bits * (1 + 1e-9)
    )
    assert picks is not None
    return {site.name: names[i] for site, i in zip(sites, picks, strict=True)}


def refine(plan: Plan, sites: Sequence[Site], bits: float, truth: Truth) -> Plan:
    """A plan of truly lower divergence within the same bits, as long as one is found."""
    best = truth.loss(plan)
    most = MOST_CHANGED
    for sweep in range(SWEEPS):
        marginal = {
            (site.name, name): 0.0
            if plan[site.name] == name
            else truth.loss(plan | {site.name: name}) - best
            for site in sites
            for name in FORMATS
        }
        before = best
        while most >= 2:
            candidate = allocate(marginal, sites, bits, plan, most)
            loss = truth.loss(candidate)
            print(f"sweep {sweep}, at most {most} layers: {best:.4f} to {loss:.4f}", flush=True)
            if loss < best:
                plan, best = candidate, loss
                break
            most //= 2
        if best > 0.995 * before:
            break
    return plan


def heuristic(sites: Sequence[Site], bits: float) -> Plan | None:
    """More bits for the first and last blocks and for what goes back into the residual stream, as
    mixtures of llama.cpp do.
    """
    ladder = sorted(
        FORMATS,
        key=lambda name: average_bits(dict.fromkeys((site.name for site in sites), name), sites),
    )
    depth = [_block(site.name) for site in sites]
    edge = max(1, (max(depth) + 1) // 8)
    best: Plan | None = None
    for base in range(len(ladder)):
        for more in range(base, len(ladder)):
            plan = {}
            for site, block in zip(sites, depth, strict=True):
                important = (
                    block < edge
                    or block > max(depth) - edge
                    or site.name.endswith(("down_proj", "v_proj"))
                )
                plan[site.name] = ladder[more if important else base]
            used = average_bits(plan, sites)
            if used <= bits and (best is None or used > average_bits(best, sites)):
                best = plan
    return best


def _block(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def rounded_changes(
    loaded: LoadedModel, sites: Sequence[Site], ids: torch.Tensor, rounding: str
) -> Changes:
    """Changes to better rounded weights, made for what layers read on some windows."""
    which = next(each for each in ROUNDINGS if each.id == rounding)
    made = {}
    for name, (nearest, bits, group) in FORMATS.items():
        if bits < 8:
            grid = Grid(bits=bits, group=group, symmetric=True)
            pack = partial(BitPlaneTensor.pack, bits=bits)
            made[name] = next(
                fmt
                for fmt in rounded_formats(nearest, grid, pack, nearest.by_default)
                if f"-{which.id}/" in fmt.id
            )
    calibration = Calibration(ids.cpu())
    with torch.no_grad():
        calibration.prepare(
            loaded.module, {site.parameters[0]: list(made.values()) for site in sites}
        )
    return {
        (site.name, name): Change(
            site, name, fmt, A16, partial(calibration.stored, site.parameters[0], fmt)
        )
        for name, fmt in made.items()
        for site in sites
    }


def main() -> None:
    arguments = parse(__doc__, rounding=True)
    out = set_up(arguments)
    loaded, sites, calibration, report = subject(arguments)
    losses = {
        method: score(
            method, loaded, sites, calibration, arguments.device, out / f"{method}.json"
        ).losses
        for method in arguments.methods.split(",")
    }
    method = arguments.methods.split(",")[-1]
    better = (
        rounded_changes(loaded, sites, calibration, arguments.rounding)
        if arguments.rounding
        else None
    )
    if better:
        label = f"{method}, {arguments.rounding}"
        path = out / f"{method}-{arguments.rounding}.json"
        found = score(method, loaded, sites, calibration, arguments.device, path, better)
    with in_float32(loaded.module):
        inner, truth = (
            Truth(loaded.module, sites, ids, arguments.device) for ids in (calibration, report)
        )
        rows = [
            *(
                row(f"uniform {name}", {site.name: name for site in sites}, sites, truth)
                for name in FORMATS
            ),
            *fronts(losses, sites, inner if arguments.refine else None, truth),
        ]
        if better:
            truth = Truth(loaded.module, sites, report, arguments.device, better)
            rows += [
                row(label, allocate(found.losses, sites, bits), sites, truth, bits)
                for bits in BUDGETS
            ]
    (out / "front.json").write_text(json.dumps(rows))
    table = as_table(rows, next(iter(losses)))
    (out / "front.md").write_text(table)
    print(table)


def row(
    label: str, plan: Plan, sites: Sequence[Site], truth: Truth, budget: float = 0.0, **more: float
) -> dict[str, object]:
    found = {
        "label": label,
        "budget": budget,
        "bits": average_bits(plan, sites),
        "kl": truth.windows(plan),
        **more,
        "plan": plan,
    }
    print(f"{label}, {budget or ''} bits: {np.mean(found['kl']):.4f}", flush=True)
    return found


def fronts(
    losses: Mapping[str, Losses], sites: Sequence[Site], inner: Truth | None, truth: Truth
) -> list[dict[str, object]]:
    rows = []
    for bits in BUDGETS:
        plan = heuristic(sites, bits)
        if plan:
            rows.append(row("heuristic", plan, sites, truth, bits))
        for method, of in losses.items():
            plan = allocate(of, sites, bits)
            rows.append(row(method, plan, sites, truth, bits))
        if inner and bits <= 3.5:
            began, inner.evaluations = time.monotonic(), 0
            plan = refine(plan, sites, bits, inner)
            used = {"seconds": time.monotonic() - began, "evaluations": inner.evaluations}
            rows.append(row(f"{method}, refined", plan, sites, truth, bits, **used))
    return rows


def as_table(rows: Sequence[Mapping[str, object]], first: str) -> str:
    lines = [
        "| budget | plan | bits | KL | to the first method's | evaluations | seconds |",
        "| --- " * 7 + "|",
    ]
    for each in rows:
        base = next(
            (
                other["kl"]
                for other in rows
                if other["label"] == first and other["budget"] == each["budget"]
            ),
            None,
        )
        ratio = ""
        if base and each["label"] != first:
            increase = paired_increase(each["kl"], base, logarithmic=False)
            ratio = f"{increase.value:+.1%} ({increase.low:+.1%} to {increase.high:+.1%})"
        seconds = f"{each['seconds']:.0f}" if "seconds" in each else ""
        cells = [
            each["budget"] or "",
            each["label"],
            f"{each['bits']:.2f}",
            f"{np.mean(each['kl']):.4f}",
            ratio,
        ]
        lines.append(
            "| " + " | ".join(map(str, [*cells, each.get("evaluations", ""), seconds])) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
