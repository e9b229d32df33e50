"""Tiny models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy

_ADD = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


def write_gguf(
    model: Any,
    architecture: str,
    path: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, numpy.ndarray] | None = None,
) -> Path:
    """Write a model of the family that llama.cpp calls `architecture`.

    Llama's queries and keys are permuted, and Gemma's norms have one added.

    Args:
        keys: further keys, and others in the place of those of the model; None leaves a key out. Those that
            do not begin with `general.` and the like are the architecture's.
        tensors: further tensors, and others in the place of those of the model; None leaves a tensor out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_keys(model.config) | dict(keys or {})).items():
        full = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{architecture}.{key}"
        if value is not None:
            _ADD[type(value)](writer, full, value)
    for name, data in (_tensors(model, architecture) | dict(tensors or {})).items():
        if data is not None:
            writer.add_tensor(name, numpy.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    return {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", 16),
        "attention.value_length": getattr(config, "head_dim", 16),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(full["rope_theta"]),
    }


def _tensors(model: Any, architecture: str) -> dict[str, numpy.ndarray]:
    config = model.config
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for key, tensor in model.state_dict().items():
        module, _, suffix = key.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        count = heads.get(module.rpartition(".")[2])
        if architecture == "llama" and count:
            data = data.reshape(count, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if architecture.startswith("gemma") and module.endswith("norm"):
            data = data + 1
        tensors[f"{names.get_name(module)}.{suffix}"] = data
    return tensors
