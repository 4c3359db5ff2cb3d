"""Train two small models of kinds that are no causal language models, and save them as folders.

- `digits-vit`: a vision transformer of transformers on scikit-learn's digits, enlarged to 32 x 32;
- `turned-t5`: an encoder-decoder that says the words of a sentence in the opposite order.

Each folder is what `save_pretrained` writes. Beside it lies what judges it: rows with labels that
were not trained on, `digits.jsonl` and `turned.jsonl`.

    python studies/models/kinds/train.py OUT [digits-vit] [turned-t5]
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as t

WORDS = re.findall(
    r"\w+",
    "the a one old young small red blue green dark tall quick slow kind loud wise cold warm dog cat"
    " bird horse fish man woman child king queen farmer sailor baker runs walks sleeps sings eats"
    " jumps reads waits falls swims here there now then soon today away home again never always",
)
SIDE = 32
TRAINED_S = 100.0  # of the processor, one thread


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures `[1797, 32, 32]` of 0 to 255, and their classes, in an order drawn once."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    scaled = (found.images[order] * (255 / 16)).round().astype(np.uint8)
    large = [np.asarray(Image.fromarray(each).resize((SIDE, SIDE))) for each in scaled]
    return np.stack(large), found.target[order]


def train_vit(out: Path) -> None:
    pictures, classes = digits()
    held = 500
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        num_labels=10,
    )
    model = t.ViTForImageClassification(config)
    x = (
        torch.tensor(pictures[held:], dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 127.5
        - 1
    )
    y = torch.tensor(classes[held:])
    fit(model, lambda rows: {"pixel_values": x[rows], "labels": y[rows]}, len(x), batch=32)
    save(model, out)
    t.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(out)
    with (out.parent / "digits.jsonl").open("w") as rows:
        for picture, label in zip(pictures[:held], classes[:held], strict=True):
            rows.write(json.dumps({"image": picture.tolist(), "label": int(label)}) + "\n")


def tokenizer(folder: Path) -> t.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", known["</s>"])]
    )
    fast = t.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def train_t5(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    words = tokenizer(out)
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    config = t.T5Config(
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        vocab_size=len(WORDS) + 3,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    model = t.T5ForConditionalGeneration(config)

    def sentence() -> list[str]:
        return [str(word) for word in draw.choice(WORDS, int(draw.integers(4, 13)))]

    def batch(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        count = int(draw.integers(4, 13))
        said = [[str(word) for word in draw.choice(WORDS, count)] for _ in rows]
        read = words([" ".join(each) for each in said], return_tensors="pt")
        told = words([" ".join(each[::-1]) for each in said], return_tensors="pt")
        return {"input_ids": read["input_ids"], "labels": told["input_ids"]}

    fit(model, batch, 1 << 16, batch=32, rate=1e-3)
    save(model, out)
    with (out.parent / "turned.jsonl").open("w") as rows:
        for _ in range(500):
            said = sentence()
            rows.write(json.dumps({"text": " ".join(said), "target": " ".join(said[::-1])}) + "\n")


def fit(
    model: torch.nn.Module,
    batch_of: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    count: int,
    *,
    batch: int,
    rate: float = 5e-4,
) -> None:
    """Train for a fixed time, with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    torch.set_num_threads(1)
    started = shown = time.process_time()
    steps = 0
    while (spent := time.process_time() - started) < TRAINED_S:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 0.02 + spent / 5) * (1 - spent / TRAINED_S)
        rows = torch.randint(count, (batch,), generator=generator)
        loss = model(**batch_of(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if time.process_time() - shown > 10:
            shown = time.process_time()
            print(f"{steps} steps, {spent:.0f} s, loss {loss.item():.4f}", flush=True)
    model.eval()


def save(model: t.PreTrainedModel, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    print(f"{out}: {sum(each.numel() for each in model.parameters()):,} parameters")


if __name__ == "__main__":
    place, chosen = Path(sys.argv[1]), sys.argv[2:] or ["digits-vit", "turned-t5"]
    if "digits-vit" in chosen:
        train_vit(place / "digits-vit")
    if "turned-t5" in chosen:
        train_t5(place / "turned-t5")
