"""Export a plan to what inference engines read: write it, and compare what their reader makes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates import get_format
from autoquant.candidates.flat import move_tensor
from autoquant.candidates.neutral import NeutralWeight
from autoquant.candidates.routed import RoutedWeight
from autoquant.delivery import checkpoint
from autoquant.delivery.applier import apply, shared_tables
from autoquant.delivery.held import check_linears, engine_notes, held_layers, rounding_notes
from autoquant.delivery.judging import Judge
from autoquant.delivery.layers import Layers, shape_of
from autoquant.delivery.likeness import Likeness, likeness, read_text
from autoquant.delivery.searched import load_searched
from autoquant.delivery.targets import Contents, ExportedLayer, Writer, writer
from autoquant.engines import Activations, Target
from autoquant.errors import CheckpointError
from autoquant.events import Listener, ignore, logged
from autoquant.files import move_whole, scratch_folder
from autoquant.models import LoadedModel
from autoquant.models.copies import shallow_copy
from autoquant.models.factory import tied_names
from autoquant.models.quiet import some
from autoquant.models.trust import NO_TRUST, Trust
from autoquant.records import Plan
from autoquant.store import StudyFacts

_ROUNDED_SCALE = 2**-7
"""How far the numbers of a reader may be that rounds scales to bfloat16, and then products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """A folder that `export_to_disk` wrote, read back and compared.

    Attributes:
        schemes: How many layers each scheme of the target has, by `VALUES as SCHEME`.
        file_bytes: Of all files.
        plan_bytes: What the plan predicts of all parameters.
        notes: What is otherwise than in the plan, and which engines cannot take it, a line each.
        reader: The packages that read the target; with versions if they did.
        likeness: What the reader made, beside the plan; None if it was not read.
        unread: Why it was not read, or "".
        written: What was checked of the files, one sentence.
        closing: What to know of their use.
    """

    out: Path
    target: Target
    files: tuple[str, ...]
    schemes: Mapping[str, int]
    unquantized: int
    file_bytes: int
    plan_bytes: int
    notes: tuple[str, ...]
    reader: str
    likeness: Likeness | None
    unread: str
    written: str
    closing: str


def export_to_disk(  # noqa: PLR0913 - the keywords of a public function
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    facts: StudyFacts,
    base: str | Path | None = None,
    embedding: str | None = None,
    device: str | None = None,
    listener: Listener = ignore,
    trust: Trust = NO_TRUST,
    activations: Activations = "rounded",
    judge: Judge | None = None,
    compare: bool = True,
) -> ExportReport:
    """Write the model that a plan quantizes as a new folder that another tool reads.

    Each layer is decoded from what is written and compared with the plan's numbers. Then the
    target's own reader loads the folder, if it is installed, and its weights and logits are
    compared with those of the plan in memory.

    Args:
        model: Path or name of the model.
        out: The folder to make. It must not exist yet, or be empty.
        to: Name of the target (see `autoquant.engines.TARGETS`).
        facts: Facts of the plan's study.
        base: A GGUF of the unquantized model for `gguf`, which is made of the model's folder if
            this is None. No other target takes it.
        embedding: For `gguf`, one of `EMBEDDINGS`; None is what the plan says.
        trust: The code that the user named.
        activations: What is taken of a layer where some kernels of its route round the activation
            and others do not.
        judge: Judges what was written before it is moved into place.
        compare: Read it back. False is for files that are only timed.

    Raises:
        PlanError: There is no such target, or it cannot hold the plan or the model. Or the judge
            refuses what was written.
        TrustError: The model needs code that the user did not name.
        ModelError: The model is not the one that was searched.
        CheckpointError: `out` cannot be written, or holds other numbers than the plan.
    """
    listener = logged(listener)
    made = writer(to) if base is None else writer(to).based_on(Path(base))
    if embedding is None and made.target.ties and shared_tables(plan):
        embedding = "head"
    made = made if embedding is None else made.with_embedding(embedding)
    held = held_layers(plan, made.target, activations)
    place = Path(out).absolute()
    checkpoint.check_new(place)
    made.check_given()
    loaded = load_searched(plan, model, facts, device, trust)
    check_linears(loaded.module, held.values())
    made.check(loaded)
    made = made.for_model(loaded)
    with checkpoint.writing(place), scratch_folder(place) as scratch:
        part = scratch / place.name
        part.mkdir()
        original = read_text(loaded) if compare and not loaded.stream else None
        if judge is not None:
            judge.before(loaded)
        kept = shallow_copy(loaded.module) if made.takes_original and not loaded.stream else None
        contents = _contents(plan, loaded, held, facts, listener)
        contents = replace(contents, original=kept)
        made.write(contents, part)
        found, unread = None, "it was not asked for"
        if compare:
            found, unread = _read_back(made, contents, original, part, trust, judge)
        files = sorted(path for path in part.iterdir() if path.is_file())
        report = ExportReport(
            out=place,
            target=made.target,
            files=tuple(path.name for path in files),
            schemes=_counted(held.values()),
            unquantized=len(plan.layers) - len(held),
            file_bytes=sum(path.stat().st_size for path in files),
            plan_bytes=plan.prediction.memory_bytes,
            notes=(
                *rounding_notes(held.values()),
                *engine_notes(made.target, held, plan),
                *made.notes(contents),
            ),
            reader=made.reader_words() if found else " and ".join(made.reader),
            likeness=found,
            unread=unread,
            written=made.written,
            closing=made.closing,
        )
        move_whole(part, place)
    return report


def _contents(
    plan: Plan,
    loaded: LoadedModel,
    held: Mapping[str, ExportedLayer],
    facts: StudyFacts,
    listener: Listener,
) -> Contents:
    """Apply the plan, or prepare to apply it layer by layer, and return what is to be written."""
    tied = {name for group in tied_names(loaded.module) for name in group}
    if loaded.stream is None:
        apply(plan, loaded.module, calibration=facts.calibration, listener=listener)
        shape, ties = loaded.module, tied_names(loaded.module)
        tensors: Iterator[tuple[str, torch.Tensor]] = iter(checkpoint.named_tensors(shape).items())
    else:
        layers = Layers(plan, loaded, facts.calibration, listener)
        shape = shape_of(plan, loaded.module)
        ties = tied_names(shape)
        tensors = layers.tensors(shape, ties)
    saved = set(shape.state_dict()) - {name for group in ties for name in _aliases(group, held)}
    return Contents(
        loaded=loaded,
        dtype=plan.dtype,
        layers=held,
        linears=_unquantized_linears(shape, held),
        tensors=_neutral((pair for pair in tensors if pair[0] in saved), plan.dtype, held),
        unties=not tied.isdisjoint(held),
    )


def _aliases(group: Sequence[str], held: Container[str]) -> list[str]:
    """Return all names of a tensor but the one that it is written under."""
    first = next((name for name in group if name in held), group[0])
    return [name for name in group if name != first]


def _unquantized_linears(module: nn.Module, held: Mapping[str, ExportedLayer]) -> tuple[str, ...]:
    """Name every module with a matrix for a weight that is neither quantized nor an embedding."""
    return tuple(
        name
        for name, part in module.named_modules()
        if not isinstance(part, nn.Embedding)
        and (weight := part._parameters.get("weight")) is not None
        and weight.ndim == 2
        and f"{name}.weight" not in held
    )


def _neutral(
    tensors: Iterator[tuple[str, torch.Tensor]], dtype: str, held: Mapping[str, ExportedLayer]
) -> Iterator[tuple[str, torch.Tensor | NeutralWeight]]:
    for name, tensor in tensors:
        if not isinstance(tensor, RoutedWeight):
            yield name, tensor.detach().cpu()
        elif name in held:
            weight = get_format(tensor.format_id).neutral
            assert weight is not None  # else the layer is refused
            yield name, weight(move_tensor(tensor.stored, "cpu"))
        else:  # a float of another kind
            yield name, tensor.dequantize().to(getattr(torch, dtype)).cpu()


def _read_back(
    made: Writer,
    contents: Contents,
    original: torch.Tensor | None,
    folder: Path,
    trust: Trust,
    judge: Judge | None,
) -> tuple[Likeness | None, str]:
    """Compare what the target's reader makes, or say why it was not read. Let it be judged.

    Args:
        original: Logits of the unquantized model, or None if it does not fit.
    """
    loaded = contents.loaded
    if original is None:
        return None, "the unquantized model does not fit"
    if missing := made.missing():
        names = " and ".join(missing)
        if judge is not None:
            judge.after(loaded.module)
        return None, f"{names} is not installed: pip install {' '.join(missing)}"
    with redirect_stderr(StringIO()):  # progress bars of libraries
        again = made.read(folder, contents, trust)
        quantized = list(contents.layers) if made.shows_weights else None
        found = likeness(loaded, again, quantized, original, rounded=made.rounds(loaded))
    if found.others_differ or found.farthest > _ROUNDED_SCALE:
        raise CheckpointError(
            f"{made.reader_words()} makes other weights of what was written"
            f" ({some(found.others_differ) or f'by {found.farthest:.2g}'}); please report this"
        )
    if judge is not None:
        judge.after(again)
    return found, ""


def _counted(layers: Iterable[ExportedLayer]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        key = f"{layer.values} as {layer.scheme.name}"
        counts[key] = counts.get(key, 0) + 1
    return counts
