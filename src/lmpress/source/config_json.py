"""The config.json of a model directory: each key that changes the computation is answered for."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as short
from types import SimpleNamespace
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from lmpress.checkpoint import check_bounds, read_json
from lmpress.errors import RequestError
from lmpress.families import layout_of
from lmpress.progress import note
from lmpress.source.accounting import some

CONFIG = "config.json"

QUANTIZED = re.compile(r"^(?!_).*quant|compression_config")
"""Keys under which tools write how the weights were quantized."""

COMPUTING = re.compile(
    r"softcap|multiplier|logits?_scal|num_(local_|routed_|shared_)?experts|n_routed_experts|moe_|per_layer"
    r"|block_configs|layer_types|partial_rotary|(residual|embedding|attention|logit)_scale|alibi|clip_qkv"
    r"|qk_(layer_?)?norm|parallel_(residual|attn)|no_rope|scale_(emb|depth)"
)
"""Keys that change what a model of some family computes, wherever its class reads them."""

RUNNING = {"attn_implementation", "_attn_implementation"}
"""Keys that ask for a way to run, which may not be at hand here."""

UNTOLD = {
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "rope_type", "original_max_position_embeddings"),
    *("sliding_window_pattern", "head_dim", "hidden_act", "torch_dtype", "auto_map"),
    *(*RUNNING, "is_llama_config"),
    *("name_or_path", "tokenizer_class", "model_max_length", "task_specific_params", "torchscript"),
    *("pruned_heads", "use_bfloat16", "unsloth_version", "unsloth_fixed", "transformers.js_config"),
    *("_attn_implementation_autoset", "_flash_attn_2_enabled", "_commit_hash", "_pre_quantization_dtype"),
}
"""Keys beside a class's own that it reads under another name, or that change no computation."""

ROPE = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate", "finetuned"),
    ),
    "longrope": (
        *("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""The kinds of rotary frequencies that the families read, and what belongs to each."""


POSITIVE = ("rope_theta", "factor")
"""What frequencies are divided by."""


def read_config(directory: Path) -> Any:
    """The transformers config of a dense causal language model.

    Raises:
        RequestError: the directory holds no model, an adapter, a quantized model, or one that does something
            else than write text; or its config asks for what the model's class does not compute.
    """
    _check_directory(directory)
    path = directory / CONFIG
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise RequestError(f"{path} names no model_type: it is not the config of a model")
    _refuse_quantized(path, raw)
    check_bounds(directory)  # before a model of such a size is built
    config = _built(path, raw)
    layout_of(config)
    _check_architectures(path, raw)
    _check_keys(path, raw, config)
    check_rope(path, config)
    return config


def _check_directory(directory: Path) -> None:
    adapter, config = (directory / "adapter_config.json").is_file(), (directory / CONFIG).is_file()
    if adapter:
        beside = "holds an adapter beside the model" if config else "is an adapter, not a model"
        raise RequestError(
            f"{directory} {beside} (adapter_config.json): merge it into its model, and compress the result"
        )
    if not config:
        held = sorted(path.name for path in directory.iterdir() if path.suffix.lower() == ".gguf")
        hint = f"; name the file {directory / held[0]}" if held else ""
        raise RequestError(f"{directory} has no {CONFIG}: it is no model directory{hint}")


def _refuse_quantized(path: Path, raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if not QUANTIZED.search(key) or not (any(value.values()) if isinstance(value, dict) else value):
            continue
        told = value.get("quant_method") or some(sorted(value)) if isinstance(value, dict) else value
        raise RequestError(
            f"{path.parent} is already quantized ({key} in {CONFIG}: {told}); compress the dense model"
        )


def _built(path: Path, raw: Mapping[str, Any]) -> Any:
    """The config as its class in transformers reads it; as it is, of a type that there is none for."""
    model_type = raw["model_type"]
    if model_type not in CONFIG_MAPPING:
        return SimpleNamespace(**raw)
    try:
        return CONFIG_MAPPING[model_type].from_dict(
            copy.deepcopy({k: v for k, v in raw.items() if k not in RUNNING and not QUANTIZED.search(k)})
        )
    except Exception as error:  # transformers raises whatever the file made it raise
        told = " ".join(str(error).split())[:400] or repr(error)
        raise RequestError(f"{path} is no config that transformers reads: {told}") from None


def _check_architectures(path: Path, raw: Mapping[str, Any]) -> None:
    """A model with another head on the same body is no causal language model."""
    model_type = raw["model_type"]
    known = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], MODEL_MAPPING_NAMES[model_type]}
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise RequestError(f"{path}: architectures is a list of names, not {short(architectures)}")
    for name in architectures:
        if str(name).casefold() in {one.casefold() for one in known}:
            continue
        if not str(name).casefold().endswith("forcausallm"):
            raise RequestError(
                f"{path} says that the model is a {name}, which is no causal language model; lmpress reads"
                f" {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]} and the like"
            )
        note(f"{path}: the architecture is {name} and the model_type {model_type}; the model_type counts")


def _check_keys(path: Path, raw: Mapping[str, Any], config: Any) -> None:
    """Keys that the class has no field for: refused where they would change the computation, else told of."""
    known = {*type(config)().to_dict(), *type(config).attribute_map, *UNTOLD, *GenerationConfig().to_dict()}
    unread = [key for key, value in raw.items() if key not in known and value]
    unread = [key for key in unread if not QUANTIZED.search(key) and not _neutral(raw[key])]
    wrong = [f"{key}: {raw[key]}" for key in unread if COMPUTING.search(key)]
    if getattr(config, "use_bidirectional_attention", None) or raw.get("is_causal") is False:
        raise RequestError(f"{path} is of a model that sees both ways, which no causal language model does")
    if wrong:
        raise RequestError(
            f"{path} has {some(wrong)}, which {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]} does not"
            " compute; the result would be another model"
        )
    if raw.get("auto_map"):
        note(f"{path}: code that comes with the model (auto_map) is not run; transformers' own class is")
    if unread:
        note(f"{path}: {type(config).__name__} does not read these keys, which play no part: {some(unread)}")


def _neutral(value: Any) -> bool:
    """Whether a number is one that changes nothing, or layers are all of the usual kind."""
    if isinstance(value, list):
        return all(one == "full_attention" or _neutral(one) for one in value)
    return value == 1 and not isinstance(value, bool)


def check_rope(path: Path, config: Any) -> None:
    """Refuse rotary frequencies that the families do not compute; tell of parameters that play no part."""
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        kind = rope.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in ROPE:
            raise RequestError(
                f"{path} has rotary frequencies of type {short(kind)}; lmpress reads {', '.join(ROPE)}"
            )
        for key in POSITIVE:
            value = rope.get(key, 1)
            if not isinstance(value, int | float) or not value > 0:
                raise RequestError(
                    f"{path}: the {key} of its rotary frequencies is {short(value)}, not above 0"
                )
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise RequestError(
                f"{path} turns only a part of each head (partial_rotary_factor"
                f" {rope['partial_rotary_factor']}), which {type(config).__name__} does not compute"
            )
        known = {*ROPE[kind], "rope_type", "type", "rope_theta", "partial_rotary_factor"}
        unread = [key for key, value in rope.items() if key not in known and value is not None]
        if unread:
            note(f"{path}: rotary frequencies of type {kind!r} do not read {some(unread)}")


def _ropes(parameters: Any) -> Iterable[Mapping[str, Any]]:
    """One set of parameters, or one for each type of layer."""
    if not isinstance(parameters, Mapping):
        return ()
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or (parameters,)
