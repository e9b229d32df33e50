"""What config.json asks for is computed, told of, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import RequestError
from lmpress.source import open_source
from lmpress.source.config_json import read_config
from tests.tiny import TINY


@pytest.fixture
def changed(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def directory(name: str = "llama", **values: Any) -> Path:
        path = Path(shutil.copytree(tiny(name), tmp_path / name))
        raw = json.loads((path / "config.json").read_text()) | values
        raw = {key: value for key, value in raw.items() if value != "DROP"}
        (path / "config.json").write_text(json.dumps(raw))
        return path

    return directory


@pytest.mark.parametrize("name", list(TINY))
def test_it_is_what_transformers_reads(
    name: str, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(name)
    capsys.readouterr()  # what saving the model told
    read, original = read_config(path).to_dict(), TINY[name]().to_dict()
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in read.items() if k not in ignored} == {
        k: v for k, v in original.items() if k not in ignored
    }
    assert capsys.readouterr().err == ""


def test_a_byte_order_mark_is_let_be(changed: Callable[..., Path], tmp_path: Path) -> None:
    path = changed()
    for name in ("config.json", "generation_config.json"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(b"\xef\xbb\xbf" + content)
    lmpress.compress(path, "int8", tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").read_bytes().startswith(b"\xef")
    lmpress.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is broken: no JSON"),
        ("", "is broken: no JSON"),
        ("[1]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": "of_tomorrow"}', "'of_tomorrow' is not supported"),
    ],
)
def test_a_file_that_is_no_config(content: str, words: str, changed: Callable[..., Path]) -> None:
    path = changed()
    (path / "config.json").write_text(content)
    with pytest.raises(RequestError, match=words) as refusal:
        read_config(path)
    assert "compress again" not in str(refusal.value)


def test_directories_that_hold_no_model(changed: Callable[..., Path], tmp_path: Path) -> None:
    path = changed()
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"an adapter beside the model.*merge"):
        read_config(path)
    (path / "config.json").unlink()
    with pytest.raises(RequestError, match=r"is an adapter, not a model.*merge"):
        read_config(path)
    (path / "adapter_config.json").unlink()
    (path / "model.GGUF").write_bytes(b"")
    with pytest.raises(RequestError, match=r"no config\.json.*name the file .*model\.GGUF"):
        read_config(path)


@pytest.mark.parametrize(
    "key", ["quantization_config", "compression_config", "quantization", "quant_config", "text_quant_config"]
)
@pytest.mark.parametrize("value", [{"load_in_8bit": True}, {"quant_method": "awq"}, "awq"])
def test_a_quantization_under_any_key(key: str, value: Any, changed: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match=f"already quantized.*{key}"):
        read_config(changed(**{key: value}))


@pytest.mark.parametrize("value", [{}, None, {"load_in_8bit": False}])
def test_an_empty_quantization_is_none(value: Any, changed: Callable[..., Path]) -> None:
    config = read_config(changed(quantization_config=value, _pre_quantization_dtype="float16"))
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize(
    "name",
    [
        *("LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel"),
        *("LlamaForQuestionAnswering", "LlavaForConditionalGeneration", "MistralModel"),
    ],
)
def test_other_heads_are_refused(name: str, changed: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match=f"is a {name}.*no causal language model"):
        read_config(changed(architectures=[name]))


@pytest.mark.parametrize(
    "names", [["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"], [], None, "DROP"]
)
def test_names_of_the_same_model(
    names: Any, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(architectures=names)
    capsys.readouterr()
    read_config(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("n_routed_experts", 64),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.06),
        ("use_qk_norm", True),
        ("qk_layernorm", True),
        ("use_parallel_residual", True),
        ("no_rope_layers", [1, 0]),
        ("scale_depth", 1.4),
        ("per_layer_config", {"0": {"intermediate_size": 32}}),
        ("block_configs", [{"ffn": 1}]),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "of_tomorrow", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "high"}),
        ("intermediate_size", [96, 64]),
        ("num_attention_heads", [4, 2]),
        ("hidden_act", "of_tomorrow"),
        ("vocab_size", "many"),
    ],
)
def test_what_the_class_does_not_compute(key: str, value: Any, changed: Callable[..., Path]) -> None:
    path = changed(**{key: value})
    with pytest.raises(RequestError) as refusal:
        open_source(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("key", [{"use_bidirectional_attention": True}, {"is_causal": False}])
def test_a_model_that_sees_both_ways(key: dict[str, bool], changed: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="both ways"):
        read_config(changed("gemma3", **key))


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64},
    ],
)
def test_scalings_as_older_configs_write_them(
    scaling: dict[str, Any], changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(rope_parameters="DROP", rope_scaling=scaling, rope_theta=5e5)
    capsys.readouterr()
    rope = read_config(path).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (
        scaling["type"],
        scaling["factor"],
        5e5,
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("of_a_fork", 3, "of_a_fork"),
        ("of_a_fork", True, "of_a_fork"),
        ("sliding_window", 16, "sliding_window"),
        ("auto_map", {"AutoModelForCausalLM": "m.M"}, "auto_map"),
        ("architectures", ["MistralForCausalLM"], "model_type counts"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1]},
            "mrope_section",
        ),
    ],
)
def test_what_plays_no_part_is_told(
    key: str, value: Any, words: str, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    read_config(changed(**{key: value}))
    told = capsys.readouterr().err.splitlines()
    assert any(words in line for line in told)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 0),
        ("embedding_multiplier", 1.0),
        ("no_rope_layers", [1, 1]),
        ("attn_implementation", "flash_attention_2"),
        ("_attn_implementation", "flash_attention_2"),
        ("layer_types", ["full_attention", "full_attention"]),
        ("temperature", 0.7),
        ("torch_dtype", "float16"),
        ("attn_logit_softcapping", None),
    ],
)
def test_what_changes_nothing_passes_in_silence(
    key: str, value: Any, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(**{key: value})
    capsys.readouterr()
    read_config(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_way_to_run_that_is_not_at_hand_is_not_asked_for(key: str, changed: Callable[..., Path]) -> None:
    assert open_source(changed(**{key: "of_tomorrow"})).skeleton.config.model_type == "llama"
