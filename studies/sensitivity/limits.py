"""How often a recommended plan breaks its limit on text that the search never saw, over searches on resampled texts.

    python studies/sensitivity/limits.py MODEL CALIBRATION_TEXT REPORT_TEXT OUT [--device cuda] [--methods fisher]

Arguments are those of compare.py. The plans are one front: allocated by the first method's losses for `BUDGETS` of average bits.
Each plan's loss is measured once on every window of the report text; a search then is a draw of 51 of these windows (with
replacement between searches, without within one), dealt to calibration, selection and report as `autoquant search` deals them.
It recommends the plan of fewest bits whose upper end of the paired 95 % interval on the selection part is within the limit, and
breaks the limit if the increase on the report part, or on all other windows, is above it. OUT gets `limits.json` and `limits.md`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compare import Plan, average_bits, changes, parse, quality, score, searched_sites, windows
from front import allocate

from autoquant.evaluators.emulate import in_float32
from autoquant.evaluators.sensitivity import EVERY_LAYER
from autoquant.evaluators.sensitivity.gradients import PlacedLinears, batch_logits
from autoquant.evaluators.sensitivity.together import Calibration
from autoquant.evaluators.statistics import paired_increase
from autoquant.evaluators.text import WANTED_WINDOWS, deal
from autoquant.models import load_model

BUDGETS = np.linspace(3.0, 8.0, 51)
LIMITS = (0.003, 0.01, 0.03)
SEARCHES = 100
Losses = list[list[float]]


def measure(arguments, out: Path) -> tuple[list[float], Losses]:  # noqa: ANN001 - a namespace
    """Average bits of each plan, and the mean negative log-likelihood of each window: of the unquantized model, then of plans."""
    loaded = load_model(arguments.model, device=arguments.device)
    sites = searched_sites(loaded, arguments.device)
    method = arguments.methods.split(",")[0]
    calibration = windows(loaded, arguments.calibration_text, 0, arguments.windows)
    scored = score(method, loaded, sites, calibration, arguments.device, out / f"{method}.json").losses
    losses = {key: loss for key, loss in scored.items() if key[0] != EVERY_LAYER}
    plans: list[Plan] = []
    for bits in BUDGETS:
        if (plan := allocate(losses, sites, float(bits))) not in plans:
            plans.append(plan)
    report = windows(loaded, arguments.report_text, arguments.skip_windows, arguments.report_windows)
    dtypes = {site.name: getattr(torch, site.shape.dtype) for site in sites}
    with in_float32(loaded.module):
        model = Calibration(loaded.module, quality(report, arguments.device))
        found = [window_losses(model, [])]
        for number, plan in enumerate(plans, 1):
            placed = model.sites(changes(sites, plan), dtypes)
            for site in placed:
                site.stand_at(1.0)
            found.append(window_losses(model, placed))
            print(f"plan {number} of {len(plans)}: {np.mean(found[-1]) - np.mean(found[0]):+.4f} nats", flush=True)
    return [average_bits(plan, sites) for plan in plans], found


def window_losses(model: Calibration, placed: Sequence) -> list[float]:
    """Mean negative log-likelihood per token of each window, in nats."""
    found = []
    for batch in model.batches:
        with PlacedLinears({id(site.parameter): site for site in placed}):
            logits = batch_logits(model.module, batch)[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        found += losses.reshape(len(batch), -1).mean(1).tolist()
    return found


def searches(bits: Sequence[float], losses: np.ndarray, limit: float, seed: int) -> list[dict[str, float]]:
    """What each search recommends, and what that costs on the report part and on all windows it did not draw."""
    generator = np.random.default_rng(seed)
    order = np.array(deal(WANTED_WINDOWS))
    by_bits = sorted(range(len(bits)), key=lambda plan: bits[plan])
    found = []
    for _ in range(SEARCHES):
        drawn = generator.permutation(losses.shape[1])
        parts = {part: drawn[: len(order)][order == part] for part in WANTED_WINDOWS}
        parts["others"] = drawn[len(order) :]

        def increase(plan: int, part: str, parts: dict[str, np.ndarray] = parts):  # noqa: ANN202
            chosen = parts[part]
            return paired_increase(losses[plan + 1, chosen].tolist(), losses[0, chosen].tolist(), logarithmic=True)

        plan = next((plan for plan in by_bits if increase(plan, "selection").high <= limit), None)
        if plan is None:
            found.append({"bits": 16.0, "report": 0.0, "others": 0.0})
        else:
            found.append({"bits": bits[plan], **{part: increase(plan, part).value for part in ("report", "others")}})
    return found


def main() -> None:
    arguments = parse()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    bits, losses = measure(arguments, out)
    lines = [
        "| limit | above it on the report part | on all other windows | median bits | increase on others: median, most |",
        "| --- " * 5 + "|",
    ]
    kept: dict[str, object] = {"bits": bits, "losses": losses}
    for limit in LIMITS:
        found = searches(bits, np.array(losses), limit, arguments.seed)
        kept[f"{limit:.1%}"] = found
        above = [sum(each[part] > limit for each in found) for part in ("report", "others")]
        others = [each["others"] for each in found]
        middle = np.median([each["bits"] for each in found])
        lines.append(
            f"| {limit:.1%} | {above[0]} of {SEARCHES} | {above[1]} | {middle:.2f} | {np.median(others):.2%}, {max(others):.2%} |"
        )
    (out / "limits.json").write_text(json.dumps(kept))
    (out / "limits.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
