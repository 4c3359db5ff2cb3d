"""Make a GGUF of an unquantized Llama without llama.cpp's converter: a base for `export --to gguf`.

    python studies/engines/gguf/base.py MODEL SETTINGS.gguf OUT.gguf

MODEL is the Hugging Face folder. SETTINGS.gguf is any GGUF of the same model, quantized or not: its
tokenizer and settings are taken. Matrices are written as BF16 and vectors as F32, with rows of
queries and keys in the order that llama.cpp has them.
"""

from __future__ import annotations

import re
import sys

import gguf
import torch
from transformers import AutoModelForCausalLM

SKIPPED = ("general.architecture", "general.file_type", "general.quantization_version")


def main(model: str, settings: str, out: str) -> None:
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    reader, writer = gguf.GGUFReader(settings), gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in SKIPPED:
            kind = field.types[0]
            of_array = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=of_array)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    config = module.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if found := re.search(r"\.([qk])_proj\.", name):
            halves = tensor.reshape(heads[found[1]], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.BF16 if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
