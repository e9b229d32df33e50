"""The transformers config of a GGUF file: every key that changes the computation is read, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING

from lmpress.errors import RequestError
from lmpress.families import supported
from lmpress.progress import note
from lmpress.source.accounting import some
from lmpress.source.config_json import check_rope
from lmpress.source.gguf_file import GgufFile, computing_keys
from lmpress.source.gguf_rope import rope_parameters
from lmpress.source.tokenizer_files import check_vocabulary

Values = dict[str, Any]

COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""What every architecture states, and what transformers calls it."""

UNSET = (0, "", None)
"""What a key is set to where llama.cpp takes it as not set."""

NEUTRAL = {
    "attention.causal": (True,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (0, -1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_beta_fast": (0, 32),
    "rope.scaling.yarn_beta_slow": (0, 1),
}
"""The values of other keys that change nothing."""

LARGEST = {"gemma2": 46, "gemma3": 62}
"""The blocks of the 27B models, whose queries are scaled by the width of the model instead of the head."""


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is told in transformers.

    Attributes:
        model_type: its config's type.
        biases: switches of biases, by the tensors whose presence turns them on.
        rest: what it reads beside the common keys.
    """

    model_type: str
    biases: dict[str, tuple[str, ...]]
    rest: Callable[[GgufFile, Values], Values]


def gguf_config(file: GgufFile) -> Any:
    """The transformers config of a GGUF file.

    Raises:
        RequestError: an architecture that is not supported, a key that is missing, or one that changes the
            computation in a way that the architecture's class in transformers does not know.
    """
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        experts = " (a mixture of experts)" if file.own("expert_count", 0) else ""
        raise RequestError(
            f"{file.path} holds a model of the architecture {file.architecture!r}, which is not"
            f" supported{experts}; lmpress reads {', '.join(ARCHITECTURES)} from GGUF files, and the types"
            f" {', '.join(supported())} from safetensors"
        )
    try:
        values = _values(file, architecture)
        _account_for_keys(file)
        config = CONFIG_MAPPING[values.pop("model_type")](**values)
        check_rope(file.path, config)
        return config
    except RequestError:
        raise
    except Exception as error:  # transformers and Python raise whatever the values made them raise
        told = " ".join(str(error).split()) or repr(error)
        raise RequestError(f"{file.path} describes no model that transformers builds: {told}") from None


def _values(file: GgufFile, architecture: Architecture) -> Values:
    """What the file states, by the names that transformers has for it."""
    values: Values = {ours: file.own(key) for key, ours in COMMON.items()}
    values |= _heads(file, values) | _vocabulary(file) | _biases(file, architecture)
    values |= {"model_type": architecture.model_type, "rope_parameters": None}
    values |= architecture.rest(file, values)
    if values["rope_parameters"] is None:
        head_dim, context = values["head_dim"], values["max_position_embeddings"]
        values["rope_parameters"] = rope_parameters(file, head_dim, context)
    return values


def _heads(file: GgufFile, values: Values) -> Values:
    heads = values["num_attention_heads"]
    groups = file.own("attention.head_count_kv", heads)
    if not heads or not groups:
        raise RequestError(f"{file.path} has no attention heads")
    head_dim = int(file.own("attention.key_length", values["hidden_size"] // heads))
    file.require("attention.value_length", head_dim)
    file.require("rope.dimension_count", head_dim)
    return {"head_dim": head_dim, "num_key_value_heads": groups}


def _vocabulary(file: GgufFile) -> Values:
    """The rows of the embedding; whether the head is one of its own; and the tokens that begin and end."""
    table = file.stored().get("token_embd.weight")
    if table is None:
        raise RequestError(f"{file.path} lacks the weight token_embd.weight")
    rows = table.shape[0]
    file.require("vocab_size", rows)
    words = len(file.get("tokenizer.ggml.tokens", ()))
    check_vocabulary(str(file.path), words, words, rows)
    ends = {name: file.get(f"tokenizer.ggml.{name}_token_id", None) for name in ("bos", "eos", "padding")}
    known = {name: token for name, token in ends.items() if token is not None and token < rows}
    return {
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": known.get("bos"),
        "eos_token_id": known.get("eos"),
        "pad_token_id": known.get("padding"),
    }


def _biases(file: GgufFile, architecture: Architecture) -> Values:
    endings = {name.split(".", 2)[-1] for name in file.tensors if name.startswith("blk.")}
    return {switch: not endings.isdisjoint(names) for switch, names in architecture.biases.items()}


def _account_for_keys(file: GgufFile) -> None:
    """Refuse what llama.cpp computes with and nobody here reads; tell of keys that it does not know."""
    unread = {k: value for k, value in file.unread().items() if value not in NEUTRAL.get(k, UNSET)}
    known = computing_keys()
    wrong = [f"{file.architecture}.{key} = {value}" for key, value in unread.items() if key in known]
    if wrong:
        raise RequestError(
            f"{file.path} has {some(wrong)}, which lmpress does not read for this architecture; the result"
            " would be another model"
        )
    if unread:
        names = [f"{file.architecture}.{key}" for key in unread]
        note(f"{file.path}: {len(names)} keys are not read: {some(names)}")


def _llama(file: GgufFile, values: Values) -> Values:
    """llama.cpp has one architecture for Llama and Mistral, which differ by the sliding window alone."""
    window = file.own("attention.sliding_window", 0) or None
    file.own("tensor_data_layout", None)
    if window is None and file.get("general.name", "") != "mistral":
        return {}
    return {"model_type": "mistral", "sliding_window": window}


def _plain(file: GgufFile, values: Values) -> Values:
    return {}


def _gemma(file: GgufFile, values: Values) -> Values:
    """Sliding windows in most layers, and queries scaled by a width that the file does not state."""
    wide = LARGEST[file.architecture] == values["num_hidden_layers"]
    scalar = values["hidden_size"] // values["num_attention_heads"] if wide else values["head_dim"]
    stated = file.own("attention.scale", 0)
    if stated and abs(stated * scalar**0.5 - 1) > 1e-3:
        raise RequestError(
            f"{file.path}: {file.architecture}.attention.scale is {stated}, not {scalar**-0.5:.6g}"
        )
    caps = {f"{cap}_logit_softcapping": file.own(f"{cap}_logit_softcapping", 0) for cap in ("attn", "final")}
    return {"query_pre_attn_scalar": scalar} | {key: cap or None for key, cap in caps.items()}


def _gemma2(file: GgufFile, values: Values) -> Values:
    """What files of the first converters leave out is what llama.cpp takes: the numbers of all its models."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    stated = {key: file.own(key, cap) or None for key, cap in caps.items()}
    window = file.own("attention.sliding_window", 4096)
    file.require("attention.sliding_window_pattern", 2)
    return _gemma(file, values) | stated | {"sliding_window": window}


def _gemma3(file: GgufFile, values: Values) -> Values:
    """Layers with a window turn by a base of their own, and never scaled."""
    window = file.own("attention.sliding_window", 0) or None
    layers = values["num_hidden_layers"]
    sliding = file.get("gemma3.attention.sliding_window_pattern", 6)
    if not isinstance(sliding, list):  # every how many layers one sees everything; 0 for none
        sliding = [sliding == 0 or bool((i + 1) % sliding) for i in range(layers)]
    kinds = ["sliding_attention" if one and window else "full_attention" for one in sliding[:layers]]
    full = rope_parameters(file, values["head_dim"], values["max_position_embeddings"])
    local = {"rope_type": "default", "rope_theta": float(file.own("rope.freq_base_swa", 10000.0))}
    return _gemma(file, values) | {
        "sliding_window": window or values["max_position_embeddings"],  # the class wants one in any case
        "layer_types": kinds,
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
    }


_ATTENTION = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
_MLP = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")

ARCHITECTURES = {
    "llama": Architecture("llama", {"attention_bias": _ATTENTION, "mlp_bias": _MLP}, _llama),
    "qwen2": Architecture("qwen2", {}, _plain),
    "qwen3": Architecture("qwen3", {"attention_bias": _ATTENTION}, _plain),
    "gemma2": Architecture("gemma2", {"attention_bias": _ATTENTION}, _gemma2),
    "gemma3": Architecture("gemma3_text", {"attention_bias": _ATTENTION}, _gemma3),
}
"""The architectures of GGUF files that are read, by llama.cpp's names."""
