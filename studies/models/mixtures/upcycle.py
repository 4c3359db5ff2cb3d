"""Make a mixture of experts of a dense Llama: each expert is its MLP with noise of its own.

    python upcycle.py LLAMA OUT [EXPERTS]

With shares that sum to one, experts without noise would compute what the dense model does. 5 % of
noise on every weight keeps the text that it writes, and makes the experts' errors differ.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

NOISE, ROUTER = 0.05, 0.05
KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def several(weight: torch.Tensor, experts: int) -> torch.Tensor:
    """Return `[experts, n, k]` of a weight `[n, k]`."""
    return torch.stack([weight * (1 + NOISE * torch.randn_like(weight)) for _ in range(experts)])


def main(source: str, out: str, experts: int = 8) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device)
    kept = {name: getattr(dense.config, name) for name in KEPT}
    config = MixtralConfig(**kept, num_local_experts=experts, num_experts_per_tok=2)
    torch.manual_seed(0)
    with device:
        mixture = MixtralForCausalLM(config).bfloat16()
    own = dense.state_dict()
    filled = {}
    for name, tensor in mixture.state_dict().items():
        mlp = name.partition(".mlp.")[0] + ".mlp."
        if name in own:
            filled[name] = own[name]
        elif name.endswith("gate_up_proj"):
            both = torch.cat([own[f"{mlp}gate_proj.weight"], own[f"{mlp}up_proj.weight"]])
            filled[name] = several(both, experts)
        elif name.endswith("down_proj"):
            filled[name] = several(own[f"{mlp}down_proj.weight"], experts)
        else:  # the router
            filled[name] = ROUTER * torch.randn_like(tensor)
    mixture.load_state_dict(filled)
    mixture.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    print(f"{sum(each.numel() for each in mixture.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
