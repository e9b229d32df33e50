"""The transformers plug-in: load, save again, dequantize, generate, train an adapter on top."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmpress
from lmpress.checkpoint import plan_of, register
from lmpress.evaluation import linear_bits_per_weight, resident_bytes
from lmpress.forms import CompressedEmbedding, CompressedLinear
from tests.tiny import TINY

FAMILIES = ["llama", "llama-untied", "llama-bias", "gemma3", "opt"]
IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", list(TINY))
def test_saving_again_gives_the_same_tensors(
    family: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed(family))
    model.save_pretrained(tmp_path / "again")
    first = {k: v for p in compressed(family).glob("model*.safetensors") for k, v in load_file(p).items()}
    again = {k: v for p in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(p).items()}
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        if tensor.dtype == again[name].dtype:
            assert torch.equal(tensor, again[name]), name
        else:
            torch.testing.assert_close(tensor.float(), again[name].float())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(model), logits(reloaded))


SPARSE = {
    "bitmap": [{"sparsify": {"sparsity": 0.5}}],
    "ragged-codes": [{"sparsify": {"sparsity": 0.4, "bits": 3, "granularity": "group:32"}}],
    "zero-points": [{"sparsify": {"pattern": "2:4", "bits": 4, "symmetric": False}}],
    "eight-bits": [{"sparsify": {"method": "wanda", "sparsity": 0.5}}, {"quantize": {"solver": "gptq"}}],
    "sum": [{"sparse_low_rank": {"pattern": "2:4", "bits": 4, "factor_bits": 8, "iterations": 10}}],
    "factors": [{"svd": {"targets": "linears", "ratio": 0.8}}, {"sparsify": {"sparsity": 0.5}}],
}


@pytest.mark.parametrize("case", list(SPARSE))
def test_sparse_weights_run_filled_and_are_saved_as_they_were(
    case: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = {"calibration": {"samples": 4, "seq_len": 32}, "steps": SPARSE[case]}
    lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    plan = plan_of(tmp_path / "out")
    for name in plan:
        module = model.get_submodule(name)
        assert "Sparse" in plan[name].formula
        assert "Sparse" not in module.form.formula
        assert torch.equal(module.form.dense(), module.stored_form.dense())
        assert module.stored_form.describe()["form"] == plan[name].describe()["form"]
    model.to("cpu").save_pretrained(tmp_path / "again")
    first = {k: v for p in (tmp_path / "out").glob("model*.safetensors") for k, v in load_file(p).items()}
    again = {k: v for p in (tmp_path / "again").glob("*.safetensors") for k, v in load_file(p).items()}
    assert first.keys() == again.keys()
    for key in first:
        if key.rpartition(".")[0] in plan:
            assert first[key].dtype == again[key].dtype, key
        assert torch.equal(first[key].float(), again[key].float()), key
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(model), logits(reloaded))


def test_resident_bytes_of_sparse_weights_are_those_of_what_runs(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = {"calibration": {"samples": 4, "seq_len": 32}, "steps": SPARSE["bitmap"]}
    lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weights = sum(form.shape[0] * form.shape[1] for form in plan_of(tmp_path / "out").values())
    # the zeros are written out, and the bitmaps stay beside them
    assert resident_bytes(model) - resident_bytes(dense) == weights / 8
    assert linear_bits_per_weight(model) == 32 + 1


@pytest.mark.parametrize("family", list(TINY))
def test_dequantize_gives_a_stock_model(
    family: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed(family), dtype=torch.float32)
    before = logits(model)
    dense = model.dequantize()
    kinds = {type(m) for m in dense.modules()}
    assert CompressedLinear not in kinds
    assert CompressedEmbedding not in kinds
    torch.testing.assert_close(logits(dense), before, rtol=1e-3, atol=2e-4)
    dense.save_pretrained(tmp_path / "stock")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'stock')!r})\n"
        "assert 'lmpress' not in sys.modules\n"
        "print(float(m(torch.tensor([[5, 6, 7]])).logits.sum()))"
    )
    if family == "llama":  # one process is enough to know that no import is needed
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        with torch.no_grad():
            own = float(dense(torch.tensor([[5, 6, 7]])).logits.sum())
        assert float(done.stdout) == pytest.approx(own, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_dequantize_to_another_type_casts_all_of_the_model(
    dtype: torch.dtype | str, compressed: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("llama"), dtype=torch.float32)
    before = logits(model)
    after = logits(model.dequantize(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {after.dtype}
    assert float((after.float() - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_and_device_map(family: str, compressed: Callable[[str], Path]) -> None:
    exact = logits(AutoModelForCausalLM.from_pretrained(compressed(family), dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(
        compressed(family), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert model.dtype == torch.bfloat16
    rough = logits(model)
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.1
    scales = [b for n, b in model.named_buffers() if n.endswith("scale") and "embed_scale" not in n]
    assert scales
    assert all(scale.dtype == torch.float16 for scale in scales), (
        "a scale keeps the type that it is stored in"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(
    family: str, compressed: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed(family), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(compressed(family))
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(**inputs, use_cache=True, **options)
    without = model.generate(**inputs, use_cache=False, **options)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_an_adapter_trains_on_top_and_nothing_else_does(
    family: str, compressed: Callable[[str], Path]
) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(compressed(family), dtype=torch.float32)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = ["q_proj", "down_proj"] if family == "llama" else ["q_proj", "fc2"]
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = peft(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    peft.unload()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_without_the_import_loading_fails_loudly(family: str, compressed: Callable[[str], Path]) -> None:
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(compressed(family))!r})\n"
        "print('LOADED')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "size mismatch" in done.stderr or "mismatch" in done.stderr.lower()


def test_registering_twice_is_harmless() -> None:
    register()
    register()


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_tied_embeddings_stay_one_tensor(family: str, compressed: Callable[[str], Path]) -> None:
    model = lmpress.load(compressed(family))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.form.tensors()["scale"].data_ptr() == embedding.form.tensors()["scale"].data_ptr()
    stored = json.loads((compressed(family) / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(name.startswith("lm_head") for name in stored)


def test_untied_heads_are_compressed_of_their_own(compressed: Callable[[str], Path]) -> None:
    model = lmpress.load(compressed("llama-untied"))
    assert isinstance(model.get_output_embeddings(), CompressedLinear)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_a_newer_format_is_refused(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "newer"
    shutil.copytree(compressed("llama"), copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(lmpress.LmpressError, match="format 99"):
        lmpress.load(copy)
