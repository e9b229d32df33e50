"""Bits a weight, in memory and on disk, and the table of modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lmpress
from lmpress.errors import RequestError
from lmpress.evaluation import linear_bits_per_weight, module_table, stored_bits_per_weight
from lmpress.evaluation.modules import block_linears, nominal_compression
from lmpress.forms import CompressedEmbedding, CompressedLinear, Dense, Form, LowRank, Quantized
from tests.tiny import TINY, save_tiny, tiny_model


def rounded(weight: torch.Tensor, bits: int = 8) -> Quantized:
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return Quantized.from_codes((weight / scale).round().to(torch.int64), scale.half(), None, bits)


def put(model: Any, name: str, form: Form, bias: torch.Tensor | None = None) -> None:
    model.set_submodule(name, CompressedLinear(form, bias))


def compressed(name: str) -> tuple[Any, int]:
    """A tiny model with three kinds of linears, and the bytes of its blocks' linears by hand."""
    model = tiny_model(name)
    size = 0
    for linear in block_linears(model.config):
        module = model.get_submodule(linear)
        weight, bias = module.weight.detach(), module.bias
        rows, columns = weight.shape
        if ".0.self_attn" in linear:  # factors of rank 5, the left one in 4 bits
            left, right = torch.randn(rows, 8), torch.randn(8, columns).bfloat16()
            put(model, linear, LowRank(rounded(left, 4), Dense(right)), bias)
            size += rows * 8 // 2 + 2 * rows + 2 * 8 * columns
        elif ".0.mlp.down" in linear:  # 32 of the neurons are gone
            put(model, linear, rounded(weight[:, :64]), bias)
            size += rows * 64 + 2 * rows
        elif ".0.mlp" in linear:
            put(model, linear, rounded(weight[:64]), bias)
            size += 64 * columns + 2 * 64
        else:
            size += 4 * rows * columns
    return model, size


def test_a_dense_model_has_the_bits_of_its_dtype() -> None:
    assert linear_bits_per_weight(tiny_model("llama-bias")) == 32
    assert linear_bits_per_weight(tiny_model("opt").to(torch.float16)) == 16


def test_bits_are_relative_to_the_original_weights() -> None:
    model, size = compressed("llama")
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)  # two blocks; two of four heads are key/value
    assert linear_bits_per_weight(model) == pytest.approx(8 * size / weights)


def test_a_bias_counts_only_where_the_original_has_none() -> None:
    name = "model.layers.1.mlp.up_proj"
    for family, extra in (("llama", 96 * 4), ("llama-bias", 0)):
        model = tiny_model(family)
        before = linear_bits_per_weight(model)
        put(model, name, Dense(model.get_submodule(name).weight.detach()), torch.zeros(96))
        weights = sum(model.get_submodule(n).weight.numel() for n in block_linears(model.config))
        assert linear_bits_per_weight(model) == pytest.approx(before + 8 * extra / weights)


def test_adapters_count() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["o_proj"]))
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64)
    adapters = 2 * 4 * (64 + 64)  # in float32, as the weights are
    assert linear_bits_per_weight(wrapped) == pytest.approx(32 * (1 + adapters / weights))


def test_the_table_of_a_model() -> None:
    model, size = compressed("llama")
    rows = {row.name: row for row in module_table(model)}
    assert next(iter(rows)) == "model.embed_tokens"
    assert list(rows)[-1] == "lm_head"
    assert sum(row.bytes for row in rows.values() if row.in_block) == size
    assert rows["lm_head"].bytes == 0
    assert rows["lm_head"].formula == "fp32, tied"
    assert rows["model.embed_tokens"].bytes == 256 * 64 * 4
    down = rows["model.layers.0.mlp.down_proj"]
    assert (down.formula, down.shape, down.original_shape) == ("int8", (64, 64), (64, 96))
    assert down.bits_per_weight == pytest.approx(8 * (64 * 64 + 128) / (64 * 96))
    assert json.loads(json.dumps([row.to_json() for row in rows.values()]))[0]["shape"] == [256, 64]


def save_compressed(model: Any, directory: Path) -> None:
    """What the checkpoint's format says, written by hand."""
    from safetensors.torch import save_file

    plan = {
        name: module.form.describe()
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear | CompressedEmbedding)
    }
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "lmpress", "version": 1, "plan": plan}
    (directory / "config.json").write_text(json.dumps(config))
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, directory / "model.safetensors")
    report = {"model.layers.0.mlp.up_proj": {"relative_error": 0.125}}
    manifest = {
        "modules": report,
        "files": {},
        "sizes": {"weight_bytes": 1, "bytes_16bit": 1, "linear_bpw": 1.0},
        "recipe": {"name": "none"},
        "source": {"name": "none"},
        "calibration": [],
    }
    (directory / "lmpress.json").write_text(json.dumps(manifest))


def test_files_tell_the_same_as_the_model(tmp_path: Path) -> None:
    model, _ = compressed("llama")
    save_compressed(model, tmp_path)
    assert stored_bits_per_weight(tmp_path, model.config) == linear_bits_per_weight(model)
    on_disk, in_memory = module_table(tmp_path), module_table(model)
    for disk, memory in zip(on_disk, in_memory, strict=True):
        assert (disk.name, disk.shape, disk.bytes, disk.in_block) == (
            memory.name,
            memory.shape,
            memory.bytes,
            memory.in_block,
        )
    assert {r.name: r.report for r in on_disk if r.report} == {
        "model.layers.0.mlp.up_proj": {"relative_error": 0.125}
    }


def test_a_dense_directory(tmp_path: Path) -> None:
    path = save_tiny("qwen2", tmp_path)
    config = TINY["qwen2"]()
    assert stored_bits_per_weight(path, config) == 32
    rows = module_table(path)
    assert rows[0].formula == "f32"
    assert rows[-1].formula == "f32, tied"
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(RequestError, match="truncated"):
        module_table(path)


def test_files_with_other_names_say_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"h.0.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert stored_bits_per_weight(tmp_path, TINY["llama"]()) is None


def test_a_gguf_file(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    q8 = quants.quantize(torch.randn(16, 64).numpy(), GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", q8, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", torch.randn(16, 64).half().numpy())
    writer.add_tensor("blk.0.attn_norm.weight", torch.ones(64).numpy())
    writer.add_tensor("token_embd.weight", torch.randn(32, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # 32 weights of Q8_0 take 34 bytes, 8.5 bits; the other matrix takes 16
    assert stored_bits_per_weight(tmp_path / "m.gguf", TINY["llama"]()) == pytest.approx((8.5 + 16) / 2)
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(RequestError, match="is no GGUF file"):
        stored_bits_per_weight(tmp_path / "bad.gguf", TINY["llama"]())


def test_a_family_that_is_not_supported() -> None:
    from transformers import GPT2Config

    with pytest.raises(RequestError, match="gpt2"):
        block_linears(GPT2Config())


def test_modules_that_are_no_linear_are_not_in_the_table() -> None:
    names = {row.name for row in module_table(tiny_model("opt-post-norm"))}
    assert not any("project" in name or "norm" in name for name in names)
    assert isinstance(tiny_model("opt-post-norm").model.decoder.project_in, nn.Linear)


def test_entropy_coded_weights_count_at_their_real_bits_on_paper(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = {
        "calibration": {"samples": 4, "seq_len": 32},
        "steps": [
            {"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 8}},
            {"entropy_quantize": {"targets": "mlp", "bits": 3}},
        ],
    }
    result = lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
    coded = stored = 0
    for name, told in result.manifest["modules"].items():
        if ".mlp." in name and told.get("bytes"):
            coded += 8 * told["bytes"]
    attention = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64)  # two blocks, 16 bits a weight
    stored = attention + 2 * 3 * 64 * 72
    sparsity, bits = nominal_compression(tmp_path / "out")
    assert sparsity == pytest.approx(1 - stored / (attention + 2 * 3 * 64 * 96))
    assert bits == pytest.approx((coded + 16 * attention) / stored, rel=1e-4)
