"""Keys of a GGUF file: those that change the computation are read or refused, the others told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmpress.errors import RequestError
from lmpress.source import open_source
from lmpress.source.gguf_config import ARCHITECTURES
from tests.tiny import tiny_model
from tests.tiny_gguf import write_gguf


def opened(tmp_path: Path, keys: dict[str, Any], family: str = "llama", architecture: str = "llama") -> Any:
    return open_source(write_gguf(tiny_model(family), architecture, tmp_path / "m.gguf", keys))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expert_count": 8, "expert_used_count": 2}, r"llama\.expert_count = 8"),
        ({"attention.scale": 0.5}, r"attention\.scale"),
        ({"logit_scale": 8.0}, "logit_scale"),
        ({"residual_scale": 0.22}, "residual_scale"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention.causal": False}, "attention.causal = False"),
        ({"attention.max_alibi_bias": 8.0}, "max_alibi_bias"),
        ({"attention.clamp_kqv": 8.0}, "clamp_kqv"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers"),
        ({"feed_forward_length": [96, 64]}, "feed_forward_length differs from layer to layer"),
        ({"attention.head_count_kv": [2, 4]}, "head_count_kv differs from layer to layer"),
        ({"attention.value_length": 8}, "value_length is 8"),
        ({"rope.dimension_count": 8}, "dimension_count is 8"),
        ({"vocab_size": 300}, "vocab_size is 300"),
        ({"attention.head_count": None}, "lacks the key llama.attention.head_count"),
        ({"attention.layer_norm_rms_epsilon": None}, "lacks the key"),
        ({"context_length": None}, "lacks the key"),
        ({"attention.head_count": 0}, "no attention heads"),
        ({"block_count": "two"}, "describes no model"),
        ({"rope.freq_base": "high"}, "describes no model"),
        ({"rope.freq_base": 0.0}, "rope_theta of its rotary frequencies is 0"),
        ({"rope.scaling.factor": -2.0}, "factor of its rotary frequencies is -2"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 2.0},
            "attn_fac",
        ),
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 4.0}, "by 'ntk'"),
        ({"rope.scaling.type": "longrope"}, "rope_factors_long"),
        ({"rope.scaling.alpha": 4.0}, r"rope\.scaling\.alpha"),
        ({"tokenizer.ggml.tokens": ["a"] * 257}, "257 tokens.*256 rows"),
    ],
)
def test_what_would_make_another_model(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        opened(tmp_path, keys)
    assert "m.gguf" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_count": 0, "attention.causal": True, "logit_scale": 1.0, "rope.scaling.attn_factor": 1.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"feed_forward_length": [96, 96], "attention.head_count_kv": [2, 2]},
        {"tensor_data_layout": "Meta AI original pth", "general.file_type": 1},
        {"rope.scaling.original_context_length": 64, "rope.scaling.finetuned": True},
    ],
)
def test_what_changes_nothing(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = opened(tmp_path, keys).config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.intermediate_size == 96
    assert capsys.readouterr().err == ""


def test_keys_that_llama_cpp_does_not_know_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path, {"of_a_fork": 3})
    assert "llama.of_a_fork" in capsys.readouterr().err


def test_the_tokens_at_the_ends_are_those_of_the_file(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.eos_token_id": 9}
    config = opened(tmp_path, keys).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 9, None)
    config = opened(tmp_path, {}).config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_gemmas_without_what_the_first_files_lack(tmp_path: Path) -> None:
    config = opened(tmp_path, {}, "gemma2", "gemma2").config
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.sliding_window, config.query_pre_attn_scalar) == (4096, 16)
    keys = {"attention.sliding_window": 16, "attention.sliding_window_pattern": 0}
    assert set(opened(tmp_path, keys, "gemma3", "gemma3").config.layer_types) == {"sliding_attention"}
    config = opened(tmp_path, {}, "gemma3", "gemma3").config
    assert set(config.layer_types) == {"full_attention"}
    assert config.attn_logit_softcapping is None
    with pytest.raises(RequestError, match=r"attention\.scale"):
        opened(tmp_path, {"attention.scale": 0.5}, "gemma2", "gemma2")


def test_an_architecture_that_is_not_supported(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(model, "deci", tmp_path / "m.gguf")
    with pytest.raises(RequestError, match=r"'deci'.*llama, qwen2") as refusal:
        open_source(path)
    assert all(known in str(refusal.value) for known in ARCHITECTURES)
    with pytest.raises(RequestError, match="mixture of experts"):
        open_source(write_gguf(model, "deci", tmp_path / "moe.gguf", {"expert_count": 4}))
