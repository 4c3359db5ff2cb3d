"""What a writer of exported plans gets, and what it has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from autoquant.candidates.neutral import NeutralWeight
from autoquant.engines import Scheme, Target, Values
from autoquant.engines.values import A16
from autoquant.errors import PlanError
from autoquant.models import LoadedModel
from autoquant.models.trust import Trust
from autoquant.records import LayerChoice


@dataclass(frozen=True, slots=True)
class ExportedLayer:
    """One quantized layer.

    Attributes:
        values: Which numbers its weight holds.
        scheme: How the target holds it.
        choice: What the plan says of it.
        activation: How its activation is to be rounded, which the scheme may not do.
    """

    name: str
    values: Values
    scheme: Scheme
    choice: LayerChoice
    activation: str = A16


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A model that a plan was applied to, for a writer.

    Attributes:
        loaded: The model, with its source and tokenizer.
        dtype: The dtype of what is not quantized, e.g. `bfloat16`.
        layers: The quantized layers, by the name of the weight.
        linears: Names of the modules that keep an unquantized linear weight.
        tensors: Yields every tensor that a state dict has, by name, each as it is made: quantized
            ones in the neutral form, and of tied ones the first.
        unties: A weight that was tied to an embedding is quantized now, and the embedding is not.
        original: The unquantized model, if the writer asks for it and it fits.
    """

    loaded: LoadedModel
    dtype: str
    layers: Mapping[str, ExportedLayer]
    linears: tuple[str, ...]
    tensors: Iterator[tuple[str, torch.Tensor | NeutralWeight]]
    unties: bool
    original: nn.Module | None = None


EMBEDDINGS = ("plan", "int8", "head")
"""What an embedding may become: what the plan says, Q8_0, or the quantized head's own tensor."""


class Writer(ABC):
    """Writes one target, and reads it back.

    Attributes:
        target: Its table.
        reader: The packages that read what it writes, by the names that pip knows.
        shows_weights: What the reader makes has the weights of the model by name. Otherwise only
            what it computes is compared.
        takes_original: The reader needs the unquantized model in memory.
        written: What was checked of the files, one sentence.
        closing: What to know of their use, one or more sentences.
    """

    target: Target
    reader: tuple[str, ...]
    shows_weights: bool = True
    takes_original: bool = False
    written: str = "Each layer was decoded from what was written: its numbers are the plan's."
    closing: str = (
        "Speed: the engine multiplies with kernels of its own, not with those that the search"
        " timed. Time it there."
    )

    def missing(self) -> list[str]:
        """Return those of the reader's packages that are not installed."""
        return [name for name in self.reader if not _version(name)]

    def reader_words(self) -> str:
        """Return the reader's packages with their versions, e.g. `transformers 5.23.0`."""
        return " and ".join(f"{name} {_version(name)}" for name in self.reader)

    def based_on(self, base: Path) -> Writer:
        """Return a writer that begins with a file of the user's.

        Raises:
            PlanError: The target is written without one.
        """
        raise PlanError(f"--base is for gguf: {self.target.name} is written without it")

    def with_embedding(self, kind: str) -> Writer:
        """Return a writer that rounds the embedding, too.

        Args:
            kind: One of `EMBEDDINGS`.

        Raises:
            PlanError: The target has no quantized embedding, or there is no such kind.
        """
        raise PlanError(f"--embedding is for gguf: {self.target.name} keeps embeddings as they are")

    def rounds(self, loaded: LoadedModel) -> tuple[str, ...]:
        """Return the names of tensors that are rounded although the plan leaves them alone."""
        return ()

    def notes(self, contents: Contents) -> tuple[str, ...]:
        """Return what to know of the files, a line each."""
        return ()

    def check_given(self) -> None:  # noqa: B027 - most targets need nothing
        """Refuse to write without what an export needs beside the model. A search does not need it.

        Raises:
            PlanError: A package or a file is missing.
        """

    def for_model(self, loaded: LoadedModel) -> Writer:
        """Return a writer of one model.

        Raises:
            PlanError: An export of it takes another file, which was not given: it says which.
        """
        return self

    @abstractmethod
    def check(self, loaded: LoadedModel) -> None:
        """Refuse a model that the target has no form for, before any work.

        Raises:
            PlanError: It is one.
        """

    @abstractmethod
    def write(self, contents: Contents, folder: Path) -> None:
        """Write the files into an existing, empty folder.

        Each layer is decoded again and compared with its numbers, and each file with what was
        written into it.

        Raises:
            CheckpointError: They differ.
        """

    @abstractmethod
    def read(self, folder: Path, contents: Contents, trust: Trust) -> nn.Module:
        """Return the model as the target's own reader makes it.

        Raises:
            CheckpointError: It cannot.
        """


def _version(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
