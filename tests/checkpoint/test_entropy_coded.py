"""Checkpoints of entropy-coded weights: load, run, save again, and what they take."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lmpress
from lmpress.checkpoint import LmpressConfig, put_forms
from lmpress.errors import LmpressError, RequestError
from lmpress.evaluation import (
    linear_bits_per_weight,
    module_table,
    nominal_compression,
    resident_bytes,
    stored_bits_per_weight,
)
from lmpress.evaluation.modules import block_linears
from lmpress.forms import (
    Bitmap,
    CompressedEmbedding,
    CompressedLinear,
    Dense,
    EntropyCoded,
    Form,
    LowRank,
    Pivoted,
    Quantized,
    ScaledCodes,
    Sparse,
    Sum,
    ans,
    ans_encoder,
)
from lmpress.forms.linear import FormHolder
from tests.tiny import tiny_model

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
UP = "model.layers.1.mlp.up_proj"

TOLD: dict[str, Any] = {
    "sizes": {"weight_bytes": 1, "bytes_16bit": 1, "linear_bpw": 1.0},
    "recipe": {"name": "none"},
    "source": {"name": "none"},
    "calibration": [],
}


def coded(weight: Tensor, step: float = 0.4) -> EntropyCoded:
    """`weight` rounded between two scales; one weight of 90 deviations has a code beyond a byte."""
    weight = weight.detach().clone()
    row_scale = (step * weight.std(1, keepdim=True)).half()
    column_scale = (1 + 0.3 * torch.sin(torch.arange(weight.shape[1])))[None].half()
    weight[1, 2] = 90 * weight.std()
    codes = (weight / row_scale.float() / column_scale.float()).round()
    return EntropyCoded.from_codes(codes, row_scale, column_scale, 1000)


def all_coded(model: Any) -> dict[str, Form]:
    return {n: coded(model.get_submodule(n).weight) for n in [EMBEDDING, *block_linears(model.config)]}


def mixed(model: Any) -> dict[str, Form]:
    """An entropy-coded part in every kind of expression, and modules without one."""
    weight = {n: model.get_submodule(n).weight.detach() for n in block_linears(model.config)}
    q, k, v, o, gate, up, down = (name for name in weight if ".0." in name)
    pivots = torch.arange(64) % 4 == 1
    basis, rest = coded(weight[q][pivots]), coded(torch.eye(64)[:48, :16] + 0.1 * weight[o][:48, :16])
    mask = weight[gate].abs() > 0.1
    values = EntropyCoded.from_codes(
        (weight[gate][mask] / 0.02).round()[None], torch.full((1, 1), 0.02), torch.ones(1, 1)
    )
    half = torch.arange(64).expand(96, 64) % 2 == 0
    return {
        EMBEDDING: Sum((coded(model.get_submodule(EMBEDDING).weight), Dense(torch.full((256, 64), 0.01)))),
        q: Pivoted.from_parts(basis, rest, pivots),
        k: LowRank(coded(weight[o][:32, :20] + 0.01), Dense(weight[k][:20])),
        v: Sum((Sparse.from_dense(weight[v], weight[v] > 0.1), coded(weight[v] * (weight[v] <= 0.1)))),
        o: Quantized.from_codes((weight[o] * 30).round().clamp(-8, 7), torch.full((64, 1), 1 / 30), None, 4),
        gate: Sparse(Bitmap.from_mask(mask), values, torch.full((96, 1), 1.5).half()),
        up: Sparse(Bitmap.from_mask(half), coded(weight[up][:, ::2])),
        down: coded(weight[down]),
    }


def held(forms: dict[str, Form], resident: bool = False) -> Any:
    """A tiny llama that runs `forms`, as they are stored or as they are best run."""
    model = tiny_model("llama")
    put_forms(model, {name: form.resident() if resident else form for name, form in forms.items()})
    return model


def save(forms: dict[str, Form], directory: Path) -> Path:
    """A checkpoint, as the format says."""
    model = held(forms)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    plan = {name: form.describe() for name, form in forms.items()}
    config["quantization_config"] = {"quant_method": "lmpress", "version": 1, "plan": plan}
    (directory / "config.json").write_text(json.dumps(config))
    file = directory / "model.safetensors"
    save_file({k: v for k, v in model.state_dict().items() if not k.startswith(HEAD)}, file)
    known = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    }
    manifest = {"files": known, "modules": {}, **TOLD}
    (directory / "lmpress.json").write_text(json.dumps(manifest))
    return directory


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def quantization(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


def assert_saved_alike(first: Path, second: Path) -> None:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name
    assert quantization(first) == quantization(second)


@pytest.fixture(scope="module")
def forms() -> dict[str, Form]:
    return all_coded(tiny_model("llama"))


@pytest.fixture(scope="module")
def checkpoint(forms: dict[str, Form], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(forms, tmp_path_factory.mktemp("coded"))


def test_it_loads_runs_and_is_saved_as_it_was(
    forms: dict[str, Form], checkpoint: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for name in forms:
        module = model.get_submodule(name)
        assert isinstance(module.form, ScaledCodes)
        assert module.form.codes.dtype == torch.int8
        assert module.form.overflow is not None
        assert module.kept_beside() == []
    assert torch.equal(logits(model), logits(held(forms, resident=True)))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(IDS[:, :5], use_cache=True, **options)
    assert torch.equal(generated, model.generate(IDS[:, :5], use_cache=False, **options))
    model.to("cpu").save_pretrained(tmp_path / "again")
    assert_saved_alike(checkpoint, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "third")
    bytes_of = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("again", "third")]
    assert bytes_of[0] == bytes_of[1]


def test_a_tied_head_runs_the_codes_of_the_embedding(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, CompressedEmbedding)
    assert isinstance(head, CompressedLinear)
    assert head.weight is embedding.weight
    assert isinstance(head.form, ScaledCodes)
    for name, tensor in head.form.tensors().items():
        assert tensor.data_ptr() == embedding.form.tensors()[name].data_ptr(), name


def test_it_runs_in_bfloat16_and_is_saved_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    single = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    exact, dense = logits(single), single.dequantize().to(torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map={"": "cpu"})
    own, others = ((logits(m).float() - exact).norm() / exact.norm() for m in (model, dense))
    assert logits(model).dtype == torch.bfloat16
    assert float(own) < min(0.3, 1.2 * float(others))  # the outliers make this model sensitive
    module = model.get_submodule(UP)
    assert module.form.row_scale.dtype == torch.float16
    model.save_pretrained(tmp_path)
    coded_again = load_file(tmp_path / "model.safetensors")
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        assert torch.equal(tensor.to(coded_again[name].dtype), coded_again[name]), name
    assert quantization(tmp_path) == quantization(checkpoint)


def test_dequantize(forms: dict[str, Form], checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    before = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, FormHolder) for module in dense.modules())
    for name, form in forms.items():
        assert torch.equal(dense.get_submodule(name).weight, form.dense())
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(logits(dense), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("resident", ["decoded", "coded"])
def test_mixed_expressions(resident: str, tmp_path: Path) -> None:
    forms = mixed(tiny_model("llama"))
    checkpoint = save(forms, tmp_path / "first")
    model = lmpress.load(checkpoint, dtype=torch.float32, resident=resident)
    formulas = {name: model.get_submodule(name).form.formula for name in forms}
    assert any("ec" in formula for formula in formulas.values()) == (resident == "coded")
    torch.testing.assert_close(logits(model), logits(held(forms)), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert_saved_alike(checkpoint, tmp_path / "again")
    for name, form in forms.items():
        assert torch.equal(model.get_submodule(name).stored_form.dense(), form.dense()), name


def test_a_damaged_chunk_names_its_module(forms: dict[str, Form], tmp_path: Path) -> None:
    form = forms[UP]
    assert isinstance(form, EntropyCoded)
    payload = form.payload.clone()
    payload[int(form._coded()._starts[2]) + 5] ^= 4
    checkpoint = save(forms | {UP: form.with_tensors(form.tensors() | {"payload": payload})}, tmp_path)
    message = rf"^chunk 2 of {UP} is corrupt; fetch the checkpoint again$"
    with pytest.raises(LmpressError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(LmpressError, match=message):
        lmpress.load(checkpoint)


def test_weights_may_stay_coded(
    forms: dict[str, Form], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = lmpress.load(checkpoint, dtype=torch.float32)
    model = lmpress.load(checkpoint, dtype=torch.float32, resident="coded")
    for name in [*forms, HEAD]:
        assert isinstance(model.get_submodule(name).form, EntropyCoded)
    assert resident_bytes(model) < resident_bytes(decoded)
    weights = sum(form.num_bytes for form in forms.values())
    norms = sum(p.nbytes for n, p in model.named_parameters() if "norm" in n)
    buffers = sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
    assert resident_bytes(model) == weights + norms + buffers
    assert torch.equal(logits(model), logits(decoded))
    chunks: list[int] = []
    decode = ans.Coded.decode_chunk
    monkeypatch.setattr(ans.Coded, "decode_chunk", lambda c, n: chunks.append(n) or decode(c, n))  # type: ignore[func-returns-value]
    rows = model.get_input_embeddings()(torch.tensor([[7, 7]]))
    assert len(chunks) == 1
    assert torch.equal(rows[0], forms[EMBEDDING].dense()[[7, 7]])
    model.save_pretrained(tmp_path)
    assert_saved_alike(checkpoint, tmp_path)
    assert "resident" not in quantization(tmp_path)


def test_a_config_may_say_that_weights_stay_coded(forms: dict[str, Form], tmp_path: Path) -> None:
    checkpoint = save(forms, tmp_path / "first")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["resident"] = "coded"
    (checkpoint / "config.json").write_text(json.dumps(config))
    for asked, kind in ((None, EntropyCoded), ("decoded", ScaledCodes)):
        model = lmpress.load(checkpoint, resident=asked)
        assert isinstance(model.get_submodule(UP).form, kind)
        model.save_pretrained(tmp_path / str(asked))
        assert quantization(tmp_path / str(asked))["resident"] == "coded"


def test_another_way_to_be_resident_is_refused(checkpoint: Path) -> None:
    with pytest.raises(RequestError, match="decoded or coded, not 'packed'"):
        LmpressConfig(resident="packed")
    with pytest.raises(RequestError, match="decoded or coded, not 'packed'"):
        lmpress.load(checkpoint, resident="packed")


def test_what_is_coded_by_another_encoder_is_saved_by_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ans_encoder, "RESOLUTIONS", (4.0,))
        forms = all_coded(tiny_model("llama"))
    model = AutoModelForCausalLM.from_pretrained(save(forms, tmp_path / "first"))
    model.save_pretrained(tmp_path / "again")
    assert quantization(tmp_path / "again") != quantization(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_sizes_in_files_and_in_memory(forms: dict[str, Form], checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    model = lmpress.load(checkpoint)
    linears = {name: forms[name] for name in block_linears(config)}
    weights = sum(form.shape[0] * form.shape[1] for form in linears.values())
    on_disk = sum(8 * form.num_bytes for form in linears.values()) / weights
    assert stored_bits_per_weight(checkpoint, config) == pytest.approx(on_disk)
    assert nominal_compression(checkpoint) == (0.0, pytest.approx(on_disk))
    assert on_disk < 6.5
    in_memory = sum(8 * form.resident().num_bytes for form in linears.values()) / weights
    assert linear_bits_per_weight(model) == pytest.approx(in_memory)
    assert in_memory > 8
    assert resident_bytes(model) > sum(form.resident().num_bytes for form in forms.values())
    rows = {row.name: row for row in module_table(checkpoint)}
    assert rows[UP].formula == f"ec{forms[UP].bits_per_weight:.2f}"
    assert rows[UP].bytes == forms[UP].num_bytes
    assert rows[HEAD].formula == f"ec{forms[EMBEDDING].bits_per_weight:.2f}, tied"
    loaded = {row.name: row for row in module_table(model)}
    assert loaded[UP].bytes == forms[UP].resident().num_bytes
    assert loaded[HEAD].bytes == 0
