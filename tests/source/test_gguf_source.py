"""A GGUF file computes what the model computes that it was written from, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import lmpress
from lmpress.errors import RequestError
from lmpress.source import load_dense, open_source
from tests.tiny import TINY, tiny_model
from tests.tiny_gguf import write_gguf

GEMMA2 = {
    "attention.sliding_window": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {"attention.sliding_window": 16, "attention.sliding_window_pattern": 3}
IDS = torch.randint(0, 250, (2, 60), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(path: Path, model: Any) -> Any:
    """The source of a GGUF file, once it is known to compute what `model` does."""
    source = open_source(path)
    assert source.config.model_type == model.config.model_type
    state = model.state_dict()
    for key, tensor in source.read(source.names).items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=1e-6, msg=key)
    torch.testing.assert_close(logits(load_dense(source, torch.float32)), logits(model), rtol=1e-3, atol=1e-3)
    return source


@pytest.mark.parametrize(
    ("family", "architecture", "keys"),
    [
        ("llama", "llama", {}),
        ("llama-untied", "llama", {"rope.dimension_count": 16, "attention.key_length": None}),
        ("llama-bias", "llama", {}),
        ("mistral", "llama", {"general.name": "mistral", "attention.sliding_window": 16}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("gemma2", "gemma2", GEMMA2),
        ("gemma3", "gemma3", GEMMA3),
        ("gemma3", "gemma3", GEMMA3 | {"attention.sliding_window_pattern": [True, True, False]}),
    ],
)
def test_it_gives_the_weights_and_the_logits_of_the_model(
    family: str, architecture: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family)
    same(write_gguf(model, architecture, tmp_path / "model.gguf", keys), model)


def test_a_mistral_has_no_biases(tmp_path: Path) -> None:
    keys = {"attention.sliding_window": 16}
    path = write_gguf(tiny_model("llama-bias"), "llama", tmp_path / "m.gguf", keys)
    with pytest.raises(RequestError, match=r"attn_k\.bias"):
        open_source(path)


def test_a_mistral_without_a_window_has_none(tmp_path: Path) -> None:
    path = write_gguf(tiny_model("mistral"), "llama", tmp_path / "m.gguf", {"general.name": "mistral"})
    assert open_source(path).config.sliding_window is None


def scaled(rope: dict[str, Any], config_class: Any = LlamaConfig) -> Any:
    config = TINY["llama" if config_class is LlamaConfig else "qwen2"]().to_dict()
    torch.manual_seed(0)
    changed = config_class(**config | {"rope_parameters": rope})
    model = AutoModelForCausalLM.from_config(changed, dtype=torch.float32).eval()
    model.load_state_dict(tiny_model(changed.model_type).state_dict())
    return model


def divisors(model: Any, theta: float) -> numpy.ndarray:
    plain = theta ** -(torch.arange(8) / 8)
    return (plain / model.model.rotary_emb.inv_freq).numpy().astype(numpy.float32)


@pytest.mark.parametrize("kind", [None, "linear"])
def test_linear_scaling(kind: str | None, tmp_path: Path) -> None:
    model = scaled({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    keys = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    same(write_gguf(model, "llama", tmp_path / "m.gguf", keys), model)
    old = write_gguf(model, "llama", tmp_path / "old.gguf", {"rope.scale_linear": 4.0})
    same(old, model)


def test_yarn(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = scaled(rope | {"beta_fast": 16.0, "beta_slow": 2.0}, Qwen2Config)
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
    }
    same(write_gguf(model, "qwen2", tmp_path / "m.gguf", keys), model)


def test_llama3(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = scaled(rope)
    tensors = {"rope_freqs.weight": divisors(model, 5e5)}
    source = same(write_gguf(model, "llama", tmp_path / "m.gguf", {}, tensors), model)
    assert source.config.rope_parameters == rope


def test_longrope(tmp_path: Path) -> None:
    long, short = ([1.0 + i * step for i in range(8)] for step in (0.5, 0.25))
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.2}
    rope |= {"original_max_position_embeddings": 64, "long_factor": long, "short_factor": short}
    model = scaled(rope)
    keys = {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": 1.2}
    keys |= {"rope.scaling.original_context_length": 64}
    tensors = {
        "rope_factors_long.weight": numpy.array(long, dtype=numpy.float32),
        "rope_factors_short.weight": numpy.array(short, dtype=numpy.float32),
    }
    same(write_gguf(model, "llama", tmp_path / "m.gguf", keys, tensors), model)


def test_gemma3_is_scaled_where_it_sees_everything(tmp_path: Path) -> None:
    config = TINY["gemma3"]()
    config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(tiny_model("gemma3").state_dict())
    keys = GEMMA3 | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    same(write_gguf(model, "gemma3", tmp_path / "m.gguf", keys), model)


def test_gemma3_without_a_window_sees_everything(tmp_path: Path) -> None:
    config = TINY["gemma3"]()
    config.layer_types = ["full_attention"] * 3
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (
        same(write_gguf(model, "gemma3", tmp_path / "m.gguf"), model).config.layer_types == config.layer_types
    )


def test_weights_of_64_bits(tmp_path: Path) -> None:
    model, name = tiny_model("llama"), "blk.0.ffn_up.weight"
    wide = model.model.layers[0].mlp.up_proj.weight.detach().double().numpy()
    same(write_gguf(model, "llama", tmp_path / "m.gguf", tensors={name: wide}), model)


def test_a_tokenizer_that_cannot_go_along_is_found_out_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model("llama"), "llama", tmp_path / "m.gguf", {"tokenizer.ggml.model": "rwkv"})
    monkeypatch.setattr("lmpress.pipeline.run.Run.execute", None)  # nothing of it is done
    with pytest.raises(RequestError, match="no tokenizer that transformers reads"):
        lmpress.compress(path, "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_is_used_and_a_missing_one_is_the_embedding(tmp_path: Path) -> None:
    untied = tiny_model("llama-untied")
    assert not same(write_gguf(untied, "llama", tmp_path / "own.gguf"), untied).config.tie_word_embeddings
    path = write_gguf(untied, "llama", tmp_path / "none.gguf", tensors={"output.weight": None})
    source = open_source(path)
    assert source.config.tie_word_embeddings
    assert "lm_head.weight" not in source.names


ROW = numpy.ones(64, dtype=numpy.float32)


@pytest.mark.parametrize(
    ("family", "architecture", "tensors", "words"),
    [
        ("llama", "llama", {"blk.0.attn_q.bias": ROW}, r"lacks.*k_proj\.bias and 6 more"),
        ("qwen3", "qwen3", {"blk.1.ffn_down.bias": ROW}, r"ffn_down\.bias"),
        ("qwen2", "qwen2", {"blk.1.attn_output.bias": ROW}, r"attn_output\.bias"),
        ("llama", "llama", {"blk.1.attn_q_norm.weight": ROW[:16]}, "attn_q_norm"),
        ("llama-untied", "llama", {"output.bias": numpy.ones(256, dtype=numpy.float32)}, r"output\.bias"),
        ("llama", "llama", {"token_embd_norm.weight": ROW}, "token_embd_norm"),
        ("llama", "llama", {"blk.0.attn_q.scale": ROW[:1]}, r"attn_q\.scale"),
        ("llama", "llama", {"blk.0.ffn_gate_exps.weight": ROW}, "ffn_gate_exps"),
        ("llama", "llama", {"blk.0.attn_q.weight.lora_a": ROW}, "lora_a"),
        ("gemma2", "gemma2", {"rope_freqs.weight": ROW[:4]}, "rope_freqs"),
        ("llama", "llama", {"rope_freqs.weight": ROW[:4]}, "8 positive numbers"),
        ("llama", "llama", {"rope_freqs.weight": ROW[:8] * 0}, "8 positive numbers"),
        ("llama", "llama", {"blk.1.ffn_up.weight": None}, r"layers\.1\.mlp\.up_proj\.weight"),
        ("llama", "llama", {"token_embd.weight": None}, r"token_embd\.weight"),
        ("llama", "llama", {"blk.0.attn_norm.weight": ROW[:32]}, "has shape"),
        ("llama", "llama", {"blk.0.attn_norm.weight": ROW.astype(numpy.int8)}, "type I8"),
    ],
)
def test_tensors_that_are_missing_too_many_or_wrong(
    family: str,
    architecture: str,
    tensors: dict[str, numpy.ndarray | None],
    words: str,
    tmp_path: Path,
) -> None:
    path = write_gguf(tiny_model(family), architecture, tmp_path / "m.gguf", tensors=tensors)
    with pytest.raises(RequestError, match=words) as refusal:
        open_source(path)
    assert "m.gguf" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_sees_beside_the_text_and_further_blocks_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {"v.patch_embd.weight": ROW, "blk.2.nextn.eh_proj.weight": ROW}
    open_source(write_gguf(tiny_model("llama"), "llama", tmp_path / "m.gguf", tensors=tensors))
    told = capsys.readouterr().err
    assert "not used" in told
    assert "v.patch_embd.weight" in told
    assert "blk.2.nextn" in told


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    weight = numpy.full(64, numpy.nan, dtype=numpy.float32)
    path = write_gguf(tiny_model("llama"), "llama", tmp_path / "m.gguf", {}, {"output_norm.weight": weight})
    with pytest.raises(RequestError, match=r"model\.norm\.weight holds NaN"):
        open_source(path).read(["model.norm.weight"])
