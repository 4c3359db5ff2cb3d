"""Write a GGUF file's model again in other types: the files that `peers.py` times.

    python studies/cpu_peers/gguf_files.py MODEL.gguf OUT bf16 q8_0 q4_0

Tensors of one dimension stay as they are. All others are dequantized and rounded to nearest by the
package `gguf`, as llama.cpp does with `--pure`. It cannot make K-quants.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

TYPES = {
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
}
_FILE_TYPES = {
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
}
_WRITTEN_BY_ITSELF = ("GGUF.", "general.architecture", "general.file_type")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("types", nargs="+", choices=TYPES)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.types:
        path = options.out / f"{name}.gguf"
        write(GGUFReader(options.model), path, TYPES[name])
        print(f"{path.name}: {path.stat().st_size / 2**20:.0f} MiB")


def write(reader: GGUFReader, path: Path, kind: GGMLQuantizationType) -> None:
    """Write the model with all matrices in one type."""
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture)
    writer.add_file_type(_FILE_TYPES[kind])
    for field in reader.fields.values():
        if not field.name.startswith(_WRITTEN_BY_ITSELF):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, numbers.astype(np.float32))
        else:
            writer.add_tensor(tensor.name, quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
