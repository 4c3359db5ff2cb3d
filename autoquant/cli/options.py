"""Options that several commands take: which model, how to load it, and what to run it on."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Embedding(StrEnum):
    """What becomes of an embedding; see `autoquant.delivery.targets.EMBEDDINGS`."""

    PLAN = "plan"
    INT8 = "int8"
    HEAD = "head"


class KvCacheKind(StrEnum):
    """How keys and values are kept; see `autoquant.records.KvCache`."""

    INT8 = "int8"
    FLOAT8 = "float8"


class KvCacheChoice(StrEnum):
    """The same, or in the model's dtype."""

    INT8 = "int8"
    FLOAT8 = "float8"
    OFF = "off"


class KvCacheSearch(StrEnum):
    """The ways to keep keys and values that a search tries."""

    OFF = "off"
    AUTO = "auto"
    INT8 = "int8"
    FLOAT8 = "float8"


class Dtype(StrEnum):
    """The precision of the unquantized model."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FAST16 = "fast16"


class Minimize(StrEnum):
    """What the recommended plan has least of."""

    TIME = "time"
    MEMORY = "memory"


DeviceOption = Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu) or a device.")]
FolderDeviceOption = Annotated[
    str, typer.Option(help="auto (where the plan was made, else the best) or a device.")
]
KvCacheOption = Annotated[
    KvCacheChoice | None,
    typer.Option(
        help="Keep keys and values in 8 bits: half the memory for each token of the context.",
        show_default="as the plan says, else off",
    ),
]
FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="Folder that `autoquant apply` wrote, or an unquantized model.",
        show_default=False,
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the unquantized model.")]
ModelFactoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:CALLABLE",
        help="Builds the module of a state dict.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help="Tokenizer, if the model has none of its own.", show_default=False
    ),
]
TrustPickleOption = Annotated[
    bool, typer.Option("--trust-pickle", help="Load a pickled model: runs the code that is in it.")
]
TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that the model's folder brings (auto_map)."
    ),
]
SampleInputsOption = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:CALLABLE",
        help="Returns the inputs (tuple or dict) of a module that is no language model. Without"
        " --quality, variations of them show how far its outputs diverge.",
        show_default=False,
    ),
]
EvalTextOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Text that the search was judged on.", show_default="autoquant's own"
    ),
]
EvalDataOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:CONFIG][:SPLIT][:COLUMN]",
        help="Dataset that the search was judged on.",
        show_default=False,
    ),
]
QualityOption = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:CALLABLE",
        help="Loss that the search was judged by.",
        show_default=False,
    ),
]
WorkloadOption = Annotated[
    str | None,
    typer.Option(
        help="One request, e.g. prefill=512,decode=128. The default suits the model.",
        show_default=False,
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences at a time.")]
CandidatesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Candidates to consider, e.g. 'int4-g32/*'; repeatable. 'int4*' is int4s (symmetric),"
        " too. Default: all but the opt-in ones.",
        show_default=False,
    ),
]
MaxKlOption = Annotated[
    str | None,
    typer.Option(
        metavar="NATS",
        help="Limit of the mean KL to the unquantized model, e.g. 0.02.",
        show_default=False,
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Limit of the weights' memory, e.g. 2GiB.", show_default=False
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Only plans that this inference engine holds exactly: vllm, sglang, llama.cpp,"
        " transformers or executorch.",
        show_default=False,
    ),
]
MinimizeOption = Annotated[
    Minimize, typer.Option(help="What the recommended plan has least of, within the limits.")
]
