"""Train the demonstration model: a small Llama on the text of Python's own standard library.

    python demo/train.py --seconds 110

Training stops after a fixed time; the learning rate follows the clock, so the run ends annealed.
The text is small and the model could learn it by heart: dropout and weight decay slow that, and the
weights kept are those that did best on the validation tenth. The held-out tenth is measured once,
on what is saved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from corpus import SEPARATOR, Document, Part, documents, join
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Report = dict[str, Any]
PARTS: tuple[Part, ...] = ("train", "validation", "held-out")
EVALUATION_WINDOW = 512
EVALUATION_BATCH = 32
WARM_UP = 0.03
"""The share of the training time over which the learning rate rises."""


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a training run, apart from the text and the machine."""

    seconds: float = field(
        default=110.0, metadata={"help": "how long to train, without compilation and checks"}
    )
    hidden: int = field(default=512, metadata={"help": "width of the residual stream"})
    layers: int = field(default=4, metadata={"help": "number of decoder layers"})
    intermediate: int = field(default=1408, metadata={"help": "width of the feed-forward layers"})
    heads: int = field(default=8, metadata={"help": "attention heads"})
    kv_heads: int = field(default=4, metadata={"help": "key and value heads"})
    vocabulary: int = field(default=4096, metadata={"help": "size of the tokenizer's vocabulary"})
    context: int = field(default=1024, metadata={"help": "tokens per training sequence"})
    batch: int = field(default=32, metadata={"help": "sequences per step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "highest learning rate"})
    weight_decay: float = field(default=1.0, metadata={"help": "weight decay of the matrices"})
    dropout: float = field(
        default=0.3, metadata={"help": "dropout of embeddings and block outputs"}
    )
    seed: int = field(default=0, metadata={"help": "of the weights, the batches and the dropout"})


@dataclass(frozen=True)
class Text:
    """The corpus as tokens: to train on, to pick the weights with, and held out from both."""

    train: Tensor
    validation: Tensor
    held_out: Tensor


@dataclass
class Outcome:
    """Result of a training run.

    The state holds the weights that did best on the validation text.
    """

    steps: int = 0
    seconds: float = 0.0
    checks: int = 0
    best_step: int = 0
    validation_loss: float = math.inf
    state: dict[str, Tensor] = field(default_factory=dict)


def part_text(found: list[Document], part: Part) -> str:
    """One part of the corpus as text."""
    return join(document.text for document in found if document.part == part)


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer learnt from the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(f"{SEPARATOR}\n"), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, device: torch.device) -> Tensor:
    """The text's tokens on the device, encoded document by document."""
    pieces = text.split(SEPARATOR)
    texts = [*(piece + SEPARATOR for piece in pieces[:-1]), pieces[-1]]
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
    return torch.tensor(ids, device=device)


def build_model(recipe: Recipe, end: int) -> LlamaForCausalLM:
    """A Llama with fresh weights; `end` is the token that ends a document."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop parts of the embeddings and of every block's output while training."""

    def drop(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    if rate > 0:
        for name, module in model.named_modules():
            if name.endswith(("embed_tokens", "o_proj", "down_proj")):
                module.register_forward_hook(drop)


def make_optimizer(model: nn.Module, recipe: Recipe, fused: bool) -> torch.optim.Optimizer:
    """AdamW that decays the matrices and leaves the norms alone."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)


def make_loss(model: LlamaForCausalLM) -> Callable[[Tensor], Tensor]:
    """The mean loss per token over rows of tokens, in bfloat16 where that is fast."""

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    return loss


def batches(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless random rows of the text, each one token longer than the context."""
    generator = torch.Generator(device=tokens.device).manual_seed(recipe.seed)
    offsets = torch.arange(recipe.context + 1, device=tokens.device)
    last = len(tokens) - recipe.context
    while True:
        starts = torch.randint(last, (recipe.batch, 1), generator=generator, device=tokens.device)
        yield tokens[starts + offsets]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Return the mean loss per token over consecutive windows, each without earlier context."""
    model.eval()
    loss, count = make_loss(model), (len(tokens) - 1) // EVALUATION_WINDOW
    starts = torch.arange(count, device=tokens.device)[:, None] * EVALUATION_WINDOW
    rows = tokens[starts + torch.arange(EVALUATION_WINDOW + 1, device=tokens.device)]
    total = sum(float(loss(chunk)) * len(chunk) for chunk in torch.split(rows, EVALUATION_BATCH))
    model.train()
    return total / count


def learning_rate_share(progress: float) -> float:
    """Return the share of the highest learning rate at a point of the run.

    It rises first, then follows a cosine down to zero.
    """
    return min(1.0, progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))


def train(model: LlamaForCausalLM, text: Text, recipe: Recipe, checks: int) -> Outcome:
    """Train for the recipe's time, and keep the best weights.

    The validation loss is measured `checks` times.
    """
    on_gpu = text.train.device.type == "cuda"
    loss_of = torch.compile(make_loss(model)) if on_gpu else make_loss(model)
    optimizer = make_optimizer(model, recipe, fused=on_gpu)
    rows = batches(text.train, recipe)
    model.train()
    loss_of(next(rows)).backward()  # compiles, outside the time measured
    optimizer.zero_grad()
    outcome, started = Outcome(), time.perf_counter()
    while outcome.seconds < recipe.seconds:
        share = learning_rate_share(outcome.seconds / recipe.seconds)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * share
        loss = loss_of(next(rows))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        outcome.steps += 1
        if not on_gpu or outcome.steps % 16 == 0:
            loss.item()  # waits for the device, so that the clock does not run ahead of it
        outcome.seconds = time.perf_counter() - started
        if outcome.seconds >= recipe.seconds * (outcome.checks + 1) / checks:
            check(model, text.validation, loss.item(), outcome)
            started = time.perf_counter() - outcome.seconds
    return outcome


def check(model: LlamaForCausalLM, validation: Tensor, loss: float, outcome: Outcome) -> None:
    """Measure and print the validation loss, and keep the weights if they are the best."""
    now = evaluate(model, validation)
    outcome.checks += 1
    run_so_far = f"{outcome.seconds:6.1f} s  step {outcome.steps:6}"
    print(f"{run_so_far}  loss {loss:.4f}  validation {now:.4f}", flush=True)
    if now < outcome.validation_loss:
        outcome.validation_loss, outcome.best_step = now, outcome.steps
        outcome.state = {
            name: weight.detach().clone() for name, weight in model.state_dict().items()
        }


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's architecture."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.machine()})"
    )


def run(
    recipe: Recipe, library: Path | None, device: torch.device, checks: int, folder: Path
) -> Report:
    """Train the model and save it to the folder; returns the report to be saved beside it."""
    found = documents(library)
    source = part_text(found, "train")
    tokenizer = train_tokenizer(source, recipe.vocabulary)
    text = Text(*(encode(tokenizer, part_text(found, part), device) for part in PARTS))
    torch.manual_seed(recipe.seed)
    with device:
        model = build_model(recipe, end=tokenizer.encode(SEPARATOR).ids[0])
    add_dropout(model, recipe.dropout)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {len(text.train):,} tokens of training text", flush=True)
    outcome = train(model, text, recipe, checks)
    model.load_state_dict(outcome.state)
    model.bfloat16()
    loss = evaluate(model, text.held_out)
    save(model, tokenizer, recipe.context, folder)
    return {
        "parameters": parameters,
        **describe_outcome(outcome, recipe),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "evaluation_window": EVALUATION_WINDOW,
        "text": describe_text(source, text),
        "recipe": asdict(recipe),
        "device": device_name(device),
        "versions": versions(),
    }


def describe_outcome(outcome: Outcome, recipe: Recipe) -> Report:
    """How long the run was, and which step's weights were kept."""
    return {
        "seconds": round(outcome.seconds, 1),
        "steps": outcome.steps,
        "tokens": outcome.steps * recipe.batch * recipe.context,
        "kept_step": outcome.best_step,
        "validation_loss": round(outcome.validation_loss, 4),
    }


def describe_text(source: str, text: Text) -> Report:
    """How much text there was, and a hash by which to know the training text again."""
    return {
        "training_documents": source.count(SEPARATOR),
        "training_characters": len(source),
        "training_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "training_tokens": len(text.train),
        "validation_tokens": len(text.validation),
        "held_out_tokens": len(text.held_out),
    }


def versions() -> dict[str, str]:
    """The versions of what the training ran on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line: the recipe's fields, and where things are."""
    folder = Path(__file__).resolve().parent / "model"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for entry in fields(Recipe):
        option = "--" + entry.name.replace("_", "-")
        about = f"{entry.metadata['help']} ({entry.default})"
        parser.add_argument(option, type=type(entry.default), default=entry.default, help=about)
    parser.add_argument(
        "--out", type=Path, default=folder, help="where to save (model, beside this file)"
    )
    parser.add_argument(
        "--library", type=Path, metavar="DIR", help="another standard library's folder"
    )
    parser.add_argument(
        "--device", type=torch.device, default=device, help=f"cuda or cpu ({device})"
    )
    parser.add_argument(
        "--checks", type=int, default=20, help="how often to measure validation loss (20)"
    )
    return parser.parse_args()


def main() -> None:
    """Train as the command line says, and report."""
    options = parse_arguments()
    recipe = Recipe(**{entry.name: getattr(options, entry.name) for entry in fields(Recipe)})
    report = run(recipe, options.library, options.device, options.checks, options.out)
    text = json.dumps(report, indent=2) + "\n"
    (options.out / "training.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
