"""Whether config.json asks for a model that the weights beside it can be: asked before any of it is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lmpress.checkpoint.files import read_header, read_json, shard_paths
from lmpress.errors import RequestError
from lmpress.families import skeleton

BLOCKS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Keys that count blocks: each has a tensor at least."""

SIDES = ("hidden_size", "head_dim", "d_model", "n_embd", "num_attention_heads", "num_key_value_heads")
"""Keys of sizes for which a model makes real vectors even without its weights, or that it divides by."""


def check_bounds(directory: Path) -> None:
    """Hold the sizes in config.json against the headers of the weights.

    Raises:
        RequestError: config.json is no object with a `model_type`, or it asks for more blocks than there are
            tensors, for a vector that is longer than the files, or for none of these; config or weights are
            missing or damaged.
    """
    path = directory / "config.json"
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise RequestError(f"{path} names no model_type: it is not the config of a model")
    shards = shard_paths(directory)
    tensors = sum(len(read_header(shard)) for shard in shards)
    size = sum(shard.stat().st_size for shard in shards)
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, dict) else {}):
        _check(path, config, dict.fromkeys(BLOCKS, tensors), f"there are {tensors} tensors")
        _check(path, config, dict.fromkeys(SIDES, size), f"the weights take {size} bytes")


def _check(path: Path, config: Mapping[str, Any], most: Mapping[str, int], told: str) -> None:
    for key in most.keys() & config.keys():
        value = config[key]
        if isinstance(value, int | float) and not 1 <= value <= most[key]:
            raise RequestError(f"{path}: {key} is {value}, and {told}; fetch the model again")


def dense_model(directory: Path) -> Any:
    """The model that config.json asks for, without its weights and without a plan.

    Raises:
        RequestError: transformers makes none of it, and see `check_bounds`.
    """
    check_bounds(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return skeleton(config)
    except RequestError:
        raise
    except Exception as error:  # transformers raises whatever the file made it raise
        told = " ".join(str(error).split())[:300] or repr(error)
        where = directory / "config.json"
        raise RequestError(f"{where}: transformers makes no model of this config ({told})") from None
