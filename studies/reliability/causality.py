"""How much do later tokens change earlier logits, of models with and without a causal mask?

`autoquant.models.kinds.sees_ahead` takes a model whose change is below 1e-4 in float32 as causal.
"""

import torch
import transformers as t

from autoquant.models.kinds import _shifts

MASKLESS = {
    "BERT, masked LM": lambda shape: t.BertForMaskedLM(t.BertConfig(**shape)),
    "BERT, LM head, no decoder": lambda shape: t.BertLMHeadModel(t.BertConfig(**shape)),
    "RoBERTa, no decoder": lambda shape: t.RobertaForCausalLM(t.RobertaConfig(**shape)),
    "Electra, no decoder": lambda shape: t.ElectraForCausalLM(t.ElectraConfig(**shape)),
}
CAUSAL = {
    "BERT, decoder": lambda shape: t.BertLMHeadModel(t.BertConfig(**shape, is_decoder=True)),
    "Llama": lambda shape: t.LlamaForCausalLM(t.LlamaConfig(**shape)),
    "Mixtral": lambda shape: t.MixtralForCausalLM(
        t.MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4)
    ),
    "Qwen3 MoE": lambda shape: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(
            **shape,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        )
    ),
}


def main() -> None:
    transformers_log = t.utils.logging
    transformers_log.set_verbosity_error()
    for hidden in (32, 64, 256):
        shape = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "vocab_size": 512}
        for kind, models in (("no mask", MASKLESS), ("causal", CAUSAL)):
            for name, make in models.items():
                torch.manual_seed(0)
                model = make(shape).eval()
                for dtype in (torch.float32, torch.bfloat16):
                    shift = min(_shifts(model.to(dtype), "cpu", 512))
                    print(f"{kind:8} {hidden:4} {name:26} {str(dtype)[6:]:9} {shift:.1e}")


if __name__ == "__main__":
    main()
