"""Results in sentences: the study, the recommended plan, and the numbers of one plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autoquant.engines import Values
from autoquant.engines import engine as find_engine
from autoquant.records import (
    DISTURBED,
    ORIGINAL_LABEL,
    PARTLY,
    STAND_IN,
    Device,
    LayerChoice,
    Plan,
    Proof,
    Workload,
)
from autoquant.report import units

NOT_RUN = "Not timed yet as you will run it: the same `autoquant search` does that."

_LARGEST_ERROR = 0.1
_OFF_PLANS = 3
_TIES_SHOWN = 3
_BASELINE_WORDS = {
    "uniform": "a uniform plan",
    "heuristic": "the structural heuristic",
    "bits": "the allocation by bits alone",
}


def study_line(source: Mapping[str, Any], device: Device, workload: Workload) -> str:
    """Return model, device and workload of a study in one line."""
    return f"{source_name(source)} on {device_words(device)}, {workload}"


def device_words(device: Device) -> str:
    """Return a device's name, and how many threads it computes with, if that counts."""
    return f"{device.name}, {device.threads} threads" if device.threads else device.name


def source_name(source: Mapping[str, Any]) -> str:
    """Return a model's short name: the last part of its path."""
    path = str(source.get("path") or "")
    return path.rstrip("/").rpartition("/")[2] or "live module"


def recommendation(
    rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any], workload: Workload
) -> str:
    """Return the recommended plan in words, or why there is none, and the plans refused."""
    return "\n".join([_recommended(rows, limits, workload), *refused_lines(rows)])


def _recommended(
    rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any], workload: Workload
) -> str:
    row = next((row for row in rows if row["recommended"]), None)
    if not rows:
        return (
            "No plan has been proven yet: run the same command again with a larger --time-budget."
        )
    if row is None:
        return (
            f"No proven plan is within the limits ({limits_words(limits)}): "
            "allow more, or take one from the table."
        )
    if row["label"] == ORIGINAL_LABEL:
        return f"Recommended: the unquantized model. {_why_unquantized(rows, limits)}"
    original = next((other for other in rows if other["label"] == ORIGINAL_LABEL), None)
    within = [other for other in rows if other["within_limits"]]
    lines = [
        f"Recommended: plan {row['plan_id']} ({row['label']})",
        *(f"  {line}" for line in as_run_lines(row, workload) or [NOT_RUN]),
        f"  in the search: {_speed(row)}",
        f"  {measure_words(row).lower()} {increase_words(row)}, 95% interval {_ends(row)}",
        *_accuracy_lines(row, original),
        f"  memory {_memory(row, original)}",
    ]
    if row["kind"] in _BASELINE_WORDS:
        kind = _BASELINE_WORDS[row["kind"]]
        lines.append(f"  It is {kind}: choosing layer by layer brought nothing more here.")
        lines += [f"  {line}" for line in _searched(within, row)]
    lines += [f"  {line}" for line in ties_lines(within, row)]
    return "\n".join(lines)


def _accuracy_lines(row: Mapping[str, Any], original: Mapping[str, Any] | None) -> list[str]:
    """Return how many labels a plan gets right, or no lines without labels."""
    if row.get("accuracy") is None:
        return []
    before = None if original is None else original.get("accuracy")
    unquantized = "" if before is None else f", {before:.1%} unquantized"
    return [f"  accuracy {row['accuracy']:.1%}{unquantized}"]


def _why_unquantized(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> str:
    if any(refused(rows)):
        return "No plan that is faster in the search is faster as you will run it."
    other = "smaller" if limits.get("minimize") == "memory" else "faster"
    return f"No {other} plan is within the limits ({limits_words(limits)})."


def as_run_lines(row: Mapping[str, Any], workload: Workload) -> list[str]:
    """Return how a plan runs for its user against unquantized, or no lines if that is unknown."""
    if row.get("as_run_request_ms") is None:
        return []
    ends = f"95% interval {row['as_run_speedup_low']:.2f}x to {row['as_run_speedup_high']:.2f}x"
    lines = [
        f"As you will run it ({loop_words(row['as_run_loop'], workload)}): "
        f"{_change(row, 'request_ms')} a request, {times_words(row['as_run_speedup'])} ({ends})"
    ]
    parts = []
    if row["as_run_first_token_ms"] is not None and row["as_run_step_ms"] is not None:
        parts = [
            f"first token {_change(row, 'first_token_ms')}",
            f"{_change(row, 'step_ms')} a further token",
        ]
    lines += [f"  {', '.join(parts)}"] if parts else []
    return lines + ([f"  note: {row['as_run_notes']}"] if row["as_run_notes"] else [])


def loop_words(loop: str, workload: Workload) -> str:
    """Return what a user runs, in words: `generate, prompt 512 + 128`."""
    if loop == "forward":
        return "one forward pass"
    batch = f", batch {workload.batch}" if workload.batch > 1 else ""
    return f"{loop}, prompt {workload.prompt_tokens} + {workload.new_tokens}{batch}"


def times_words(speedup: float) -> str:
    return f"{speedup:.2f} times faster" if speedup >= 1 else f"{1 / speedup:.2f} times slower"


def refused(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of plans that are not recommended because of how their user runs them."""
    return [row for row in rows if row.get("not_recommended")]


def refused_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"Not recommended: plan {row['plan_id']} ({row['label']}): {row['not_recommended']}"
        for row in refused(rows)
    ]


def _change(row: Mapping[str, Any], name: str) -> str:
    before, after = row[f"as_run_original_{name}"], row[f"as_run_{name}"]
    return f"{units.duration_ms(before)} -> {units.duration_ms(after)}"


def _ends(row: Mapping[str, Any]) -> str:
    return units.interval(row["perplexity_increase_low"], row["perplexity_increase_high"])


def ties_lines(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> list[str]:
    """Return the plans that differ from this one only by noise, or no lines."""
    ids = str(row.get("ties", "")).split()
    rivals = [f"{other['label']} ({other['plan_id']})" for other in rows if other["plan_id"] in ids]
    if not rivals:
        return []
    more = f" and {len(rivals) - _TIES_SHOWN} more" if len(rivals) > _TIES_SHOWN else ""
    return [
        f"A tie with {', '.join(rivals[:_TIES_SHOWN])}{more}: neither speed nor quality differs by"
        " more than noise."
    ]


def _searched(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any]) -> list[str]:
    """Compare the fastest searched plan of the baseline's quality with the baseline.

    Return no lines if there is none, or if one is a tie with the baseline.

    Args:
        rows: The rows within the limits.
    """
    own = [r for r in rows if r["kind"] not in (*_BASELINE_WORDS, "original")]
    if {r["plan_id"] for r in own} & set(str(baseline.get("ties", "")).split()):
        return []
    as_good = [r for r in own if r["perplexity_increase"] <= baseline["perplexity_increase_high"]]
    if not as_good:
        return []
    best = min(as_good, key=lambda r: r["measured_request_ms"])
    change = best["measured_request_ms"] / baseline["measured_request_ms"] - 1
    return [
        f"The search's own plan {best['plan_id']} ({best['label']}) of such quality "
        f"takes {change:+.1%} time."
    ]


def left_out_lines(left_out: Mapping[str, str]) -> list[str]:
    """Return why plans to beat are missing."""
    return [f"No plan of kind {kind}: {reason}." for kind, reason in left_out.items()]


def plan_lines(
    plan: Plan,
    row: Mapping[str, Any] | None,
    proof: Proof | None = None,
    failure: str | None = None,
) -> list[str]:
    """Return a plan in words, with its predictions and its measurements."""
    predicted = plan.prediction
    formats = ", ".join(f"{count} x {name}" for name, count in plan.formats().items())
    lines = [
        f"Plan {plan.plan_id} ({plan.label}), {plan.kind}, {plan.dtype}: {formats or 'no layers'}",
        f"Predicted: {units.duration_ms(predicted.request_ms)} a request "
        f"({units.duration_ms(predicted.linear_ms)} of it linear layers), "
        f"loss {units.digits(predicted.loss)}, {units.size(predicted.memory_bytes)}",
    ]
    if row is None:
        lines.append(
            "Not "
            f"proven{f': {failure}' if failure else ' yet: the same search goes on to prove it'}"
        )
        return lines
    quality = ""
    if row["perplexity"] is not None:
        quality = f"perplexity {units.digits(row['perplexity'], 5)}, "
    increase = "output divergence" if row["measure"] == "divergence" else "increase"
    divergence = "" if row["kl"] is None else f", KL {units.digits(row['kl'])}"
    lines.append(
        f"Measured: {_speed(row)}; {quality}{increase} {increase_words(row)} "
        f"({_ends(row)}){divergence}; {units.size(row['memory_bytes'])}"
    )
    return lines + (_proof_lines(proof) if proof else [])


def is_off(relative_error: float) -> bool:
    """Return whether a prediction is so far off that the report says so."""
    return abs(relative_error) > _LARGEST_ERROR


def spent_words(seconds: Mapping[str, float]) -> str:
    """Return what a search took, and which of its stages took most of it."""
    stages = [f"{name} {units.clock_s(took)}" for name, took in seconds.items() if took >= 1]
    parts = f" ({', '.join(stages)})" if stages else ""
    return f"Time: {units.clock_s(sum(seconds.values()))}{parts}"


def memory_words(memory_bytes: Mapping[str, Mapping[str, int]]) -> str:
    """Return the most memory that each stage of a search took; empty if it is not known."""
    parts = []
    for stage, sizes in memory_bytes.items():
        places = [f"{units.size(size)} on the {place}" for place, size in sizes.items()]
        parts.append(f"{stage} {' and '.join(places)}")
    return ", ".join(parts)


def off_predictions(rows: Sequence[Mapping[str, Any]], database: str) -> list[str]:
    """Return the plans whose predicted time is off and the command that says why, or no lines.

    Args:
        rows: The rows of `Study.rows`.
        database: The database, written as in a command.
    """
    errors = {
        row["plan_id"]: row["predicted_request_ms"] / row["measured_request_ms"] - 1 for row in rows
    }
    off = sorted(
        (row for row in rows if is_off(errors[row["plan_id"]])),
        key=lambda row: -abs(errors[row["plan_id"]]),
    )
    # What a cache of keys and values changes is not predicted.
    off = [row for row in off if row["label"] != ORIGINAL_LABEL and not row.get("kv_cache")]
    if not off:
        return []
    worst = ", ".join(f"{row['label']} {errors[row['plan_id']]:+.0%}" for row in off[:_OFF_PLANS])
    more = f" and {len(off) - _OFF_PLANS} more" if len(off) > _OFF_PLANS else ""
    plans = " ".join(f"--plan {row['plan_id']}" for row in off[:_OFF_PLANS])
    return [
        f"Predicted and measured request time differ by more than {_LARGEST_ERROR:.0%}: "
        f"{worst}{more}.",
        f"Which layers that comes from: autoquant bench {database} {plans} --attribute",
    ]


def disturbed_proofs(
    proofs: Mapping[str, Proof], recommended: str | None, database: str
) -> list[str]:
    """Return how many plans other programs disturbed and how to time them again, or no lines.

    Args:
        proofs: The proofs by plan id.
        recommended: The id of the recommended plan, or None.
        database: The database, written as in a command.
    """
    disturbed = [
        plan_id
        for plan_id, proof in proofs.items()
        if any(note.startswith(DISTURBED) for note in proof.notes)
    ]
    if not disturbed:
        return []
    among = ", the recommended one among them" if recommended in disturbed else ""
    return [
        f"Other programs used the machine while {len(disturbed)} of {len(proofs)} plans "
        f"were timed{among}.",
        f"Time them again when it is idle: autoquant bench {database} --compare uniform",
    ]


def exception_lines(proofs: Iterable[Proof]) -> list[str]:
    """Say what was not measured as usual: a model that does not fit, plans beyond the limit."""
    notes = [note for proof in proofs for note in proof.notes]
    lines = []
    if stood_in := [note for note in notes if note.startswith(STAND_IN)]:
        how = stood_in[0].partition("; ")[0]
        lines.append(f"Unquantized times are a stand-in's: {how}.")
    if partly := sum(note.startswith(PARTLY) for note in notes):
        plans = "1 plan" if partly == 1 else f"{partly} plans"
        lines.append(
            f"Quality was measured on some windows only for {plans} surely beyond the limit;"
            " their intervals are the wider for it."
        )
    return lines


def _proof_lines(proof: Proof) -> list[str]:
    phases = ", ".join(
        f"{phase} {units.duration_ms(time)} (unquantized {units.duration_ms(before)})"
        for phase, time in proof.phase_ms.items()
        if (before := proof.original_phase_ms.get(phase)) is not None
    )
    return [f"By phase, {proof.execution}: {phases}", *(f"Note: {note}" for note in proof.notes)]


def _speed(row: Mapping[str, Any]) -> str:
    speedup, time = row["speedup"], row["measured_request_ms"]
    after, before = units.duration_ms(time), units.duration_ms(time * speedup)
    return f"{times_words(speedup)} than unquantized ({after} a request instead of {before})"


def _memory(row: Mapping[str, Any], original: Mapping[str, Any] | None) -> str:
    stored = units.size(row["memory_bytes"])
    if original is None or not original["memory_bytes"]:
        return stored
    share = row["memory_bytes"] / original["memory_bytes"]
    return f"{stored} instead of {units.size(original['memory_bytes'])} ({share:.0%})"


def measure_words(row: Mapping[str, Any]) -> str:
    """Return the measure of quality: `Perplexity`, `Loss` or `Output divergence`."""
    return (
        "Output divergence" if row["measure"] == "divergence" else str(row["measure"]).capitalize()
    )


def increase_heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a heading for `increase_words`, such as `Perplexity increase`."""
    word = measure_words(rows[0]) if rows else "Perplexity"
    return word if word == "Output divergence" else f"{word} increase"


def increase_words(row: Mapping[str, Any]) -> str:
    """Return how much worse quality is than unquantized. A divergence has no sign."""
    return units.percent(row["perplexity_increase"], signed=row["measure"] != "divergence")


def constraints_words(constraints: Mapping[str, Any]) -> str:
    """Return the constraints of a study as options, or an empty text.

    Those of an older version are written as they were given.
    """
    parts = []
    for name, value in constraints.items():
        option = "for" if name == "engine" else name
        parts += [f"--{option} {each}" for each in (value if isinstance(value, list) else [value])]
    return " ".join(parts)


def engine_lines(engine: str | None, plan: str, chosen: Plan | None = None) -> list[str]:
    """Say which engine a plan was made for, what writes it for that, and whose speed was measured.

    No lines without an engine.

    Args:
        plan: The plan as arguments of a command, e.g. `plan.db --plan ID`.
        chosen: The plan itself. One that quantizes nothing is of use for some engines only.
    """
    if engine is None:
        return []
    target = find_engine(engine).target
    if chosen is not None and not any(map(_is_quantized, chosen.layers)):
        as_it_is = (
            f"autoquant export {plan} --to {target.name} writes the unquantized model for {engine}"
            if target.converts
            else f"{engine} reads the unquantized model itself"
        )
        return [f"{as_it_is}. For a quantized one name another plan with --plan ID."]
    return [
        f"Made for {engine}, which reads what this writes:"
        f" autoquant export {plan} --to {target.name}",
        f"Times are those of autoquant's kernels; {engine} has kernels of its own.",
        *(
            [f"Memory is that of the weights as --to {target.name} writes them."]
            * bool(target.stores)
        ),
    ]


def _is_quantized(layer: LayerChoice) -> bool:
    return not Values.parse(layer.format).is_plain


def limits_words(limits: Mapping[str, Any]) -> str:
    """Return the limits of a study in words, and its objective if that is not time."""
    parts = []
    if limits.get("max_ppl_increase") is not None:
        parts.append(
            f"{limits.get('measure', 'increase')} at most "
            f"{units.percent(limits['max_ppl_increase'])}"
        )
    if limits.get("max_kl") is not None:
        parts.append(f"KL at most {limits['max_kl']:g}")
    if limits.get("max_memory_bytes") is not None:
        parts.append(f"memory at most {units.size(limits['max_memory_bytes'])}")
    if limits.get("minimize") == "memory":
        parts.append("least memory")
    return ", ".join(parts) or "none set"
