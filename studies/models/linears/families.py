"""Dense language models of many families, tiny and with random weights, through the whole loop.

    python studies/models/linears/families.py coverage|loop [FAMILY ...] > OUT.txt

Each is made here and saved with a tokenizer. `coverage` shows what is recorded; before is by calls
of `F.linear` alone. `loop` also searches with one candidate, applies the fastest plan, loads it in
a new process and generates.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import transformers as t

import autoquant
from autoquant.events import ignore
from autoquant.models import load_model
from autoquant.profiler.record import record_model
from autoquant.records import Recording, Workload

for switch in ("AUTOQUANT_EAGER", "AUTOQUANT_IN_PROCESS", "HF_HUB_OFFLINE"):
    os.environ.setdefault(switch, "1")  # nothing is timed here that anyone should quote

W, H, V = 128, 256, 256
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WIDE = {
    "hidden_size": W,
    "intermediate_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": V,
    "max_position_embeddings": 512,
    **IDS,
}
GROUPED = WIDE | {"num_key_value_heads": 2}
OLD = {"n_embd": W, "n_layer": 2, "n_head": 4, "vocab_size": V, "n_positions": 512, **IDS}
WINDOWS = {"head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
}
BART_LIKE = {"attention_heads": 4, "vocab_size": V, "max_position_embeddings": 512, **IDS}

FAMILIES = {
    "GPT2": OLD,
    "GPTNeoX": WIDE,
    "GPTJ": OLD | {"rotary_dim": 16},
    "GPTNeo": {
        "hidden_size": W,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": V,
        "max_position_embeddings": 512,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 32,
        **IDS,
    },
    "GPTBigCode": OLD,
    "OPT": WIDE | {"ffn_dim": H, "word_embed_proj_dim": 64},
    "Bloom": {"hidden_size": W, "n_layer": 2, "n_head": 4, "vocab_size": V, **IDS},
    "Mpt": {"d_model": W, "n_layers": 2, "n_heads": 4, "vocab_size": V, "max_seq_len": 512},
    "Falcon": WIDE,
    "Phi": WIDE,
    "Phi3": GROUPED | {"original_max_position_embeddings": 48, "rope_parameters": LONG},
    "StableLm": GROUPED,
    "Gemma2": GROUPED | WINDOWS,
    "Gemma3": GROUPED | WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": GROUPED | {"sliding_window": 32},
    "Qwen2": GROUPED | {"tie_word_embeddings": True},
    "Llama": GROUPED,
    "Granite": GROUPED,
    "Cohere2": GROUPED | {"sliding_window": 32},
    "CodeGen": OLD | {"rotary_dim": 16},
    "BioGpt": WIDE,
    "XGLM": BART_LIKE | {"d_model": W, "ffn_dim": H, "num_layers": 2},
    "SmolLM3": GROUPED,
    "Starcoder2": GROUPED | {"sliding_window": 32},
    "Glm4": GROUPED | {"head_dim": 32},
    "Roberta": WIDE | {"max_position_embeddings": 514, "is_decoder": True},
    "CTRL": OLD | {"dff": H},
    "XLNet": {"d_model": W, "d_inner": H, "n_layer": 2, "n_head": 4, "vocab_size": V, **IDS},
}
_CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
_HEADS = {"GPT2": "GPT2LMHeadModel", "CTRL": "CTRLLMHeadModel", "XLNet": "XLNetLMHeadModel"}
_READ = """
import sys, torch, autoquant
model = autoquant.load(sys.argv[1])
ids = torch.arange(2, 18)[None]
new = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
torch.save((model(ids).logits, new.shape[1] - ids.shape[1]), sys.argv[2])
"""


def save(family: str, folder: Path) -> None:
    """Make a tiny model of a family with random weights, and save it with a tokenizer of bytes."""
    config, head = _CLASSES.get(
        family, (f"{family}Config", _HEADS.get(family, f"{family}ForCausalLM"))
    )
    torch.manual_seed(0)
    made = getattr(t, head)(getattr(t, config)(**FAMILIES[family]))
    # XLNet's second layer fails in bfloat16, in transformers itself.
    made.to(torch.float32 if family == "XLNet" else torch.bfloat16).save_pretrained(folder)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    t.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def recorded(folder: Path) -> Recording:
    """Return what the recorder finds."""
    return record_model(load_model(folder), Workload.parse("prefill=16,decode=4"), ignore)


def shares(recording: Recording) -> list[str]:
    """Return the shares of all weights, of those beside embeddings, and of the FLOPs of decoding."""
    embedded = sum(left.share for left in recording.skipped if "embedding" in left.reason)
    weights = recording.weights_share
    found = (weights, weights / (1 - embedded), recording.flops_share["decode"])
    return [f"{share:.1%}" for share in found]


def looped(folder: Path, text: Path) -> list[str]:
    """Search, apply, load in a new process and generate; return how each ended."""
    ended = []
    model = load_model(folder).module
    with torch.no_grad():
        right = model(torch.arange(2, 18)[None]).logits.float()
    try:
        study = autoquant.search(
            str(folder),
            eval_text=str(text),
            device="cpu",
            workload="prefill=32,decode=4",
            candidates=["int8-row/plain/int-mm"],
            time_budget_s=1,
            db=folder.with_suffix(".db"),
            listener=ignore,
        )
        ended.append(f"{len(study.pareto())} plans")
        plan = study.best(max_ppl_increase=None)
        out, result = folder.with_name(folder.name + "-out"), folder.with_suffix(".pt")
        command = [sys.executable, "-m", "autoquant", "apply", folder.with_suffix(".db")]
        command += ["--plan", plan.plan_id, "--out", out]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        ended.append("yes")
        reader = [sys.executable, "-c", _READ, str(out), str(result)]
        subprocess.run(reader, check=True, capture_output=True)
        logits, new = torch.load(result)
        ended += [f"{(logits.float() - right).norm() / right.norm():.1%} off", f"{new} tokens"]
    except subprocess.CalledProcessError as error:
        ended.append(error.stderr.decode().strip().splitlines()[-1][:160])
    except Exception as error:  # noqa: BLE001
        ended.append(f"{type(error).__name__}: {str(error)[:160]}")
    return ended + ["-"] * (4 - len(ended))


def main() -> None:
    what, *only = sys.argv[1:]
    place = Path(tempfile.mkdtemp(prefix="families-"))
    text = place / "text.txt"
    text.write_text((Path(__file__).parents[3] / "docs" / "method.md").read_text()[:9_000])
    loop = " | search | apply | loaded logits | generate" if what == "loop" else ""
    columns = "weights | beside embeddings | FLOPs of decoding"
    print(f"family | {columns}, before and after{loop} | s", flush=True)
    for family in only or FAMILIES:
        started = time.monotonic()
        save(family, place / family)
        with mock.patch("autoquant.models.huggingface.show_linears"):
            before = shares(recorded(place / family))
        after = shares(recorded(place / family))
        row = [", ".join(pair) for pair in zip(before, after, strict=True)]
        row += looped(place / family, text) if what == "loop" else []
        print(" | ".join([family, *row, f"{time.monotonic() - started:.0f}"]), flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
