"""Directories that `save_pretrained` wrote, in everything that takes a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

import lmpress
from lmpress import api
from lmpress.checkpoint import plan_of
from lmpress.cli.app import app
from lmpress.errors import RequestError
from tests.tiny import tiny_tokenizer

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "whole": lambda model, to: model.save_pretrained(to),
    "sharded": lambda model, to: model.save_pretrained(to, max_shard_size="20KB"),
    "bfloat16": lambda model, to: model.to(torch.bfloat16).save_pretrained(to),
    "dequantized": lambda model, to: model.dequantize().save_pretrained(to),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_what_was_saved_again_is_used_as_a_checkpoint(
    family: str, way: str, compressed: Callable[[str], Path], other_text: Path, tmp_path: Path
) -> None:
    model, again = lmpress.load(compressed(family), dtype=torch.float32), tmp_path / "again"
    WAYS[way](model, again)
    expected = logits(model)
    difference = (logits(lmpress.load(again)) - expected).norm() / expected.norm()
    assert difference <= (
        0.03 if way == "bfloat16" else 0
    )  # `.to` rounds the rotary frequencies of any model

    for use in (
        lambda: api.generate(again, "the quick"),
        lambda: lmpress.evaluate(again, text=str(other_text), max_tokens=100),
    ):
        with pytest.raises(RequestError, match="has no tokenizer") as refused:
            use()
        assert "\n" not in str(refused.value)
        tiny_tokenizer().save_pretrained(again)
        use()
        (again / "tokenizer.json").unlink()
        (again / "tokenizer_config.json").unlink()
    tiny_tokenizer().save_pretrained(again)
    text = pipeline("text-generation", str(again))("the quick", max_new_tokens=3, do_sample=False)
    assert text[0]["generated_text"].startswith("the quick")


def test_inspect_measures_what_no_manifest_tells(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    lmpress.load(compressed("llama")).save_pretrained(tmp_path / "again")
    told, rows = api.inspect(tmp_path / "again")
    known, _ = api.inspect(compressed("llama"))
    assert told["sizes"]["linear_bpw"] == pytest.approx(known["sizes"]["linear_bpw"])
    assert told["sizes"]["bytes_16bit"] == known["sizes"]["bytes_16bit"]
    assert told["recipe"] is None
    assert len(rows) == 2 * 7 + 2
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "again")])
    assert shown.exit_code == 0
    assert "bits a weight" in shown.stdout
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "again"), "--json"])
    assert json.loads(shown.stdout)["sizes"] == told["sizes"]


def test_a_card_needs_a_manifest(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    lmpress.load(compressed("llama")).save_pretrained(tmp_path / "again")
    with pytest.raises(RequestError, match=r"lmpress\.json is missing, and a card is made from it"):
        api.check_card(tmp_path / "again")


def test_evaluating_says_that_it_cannot_refuse_text(
    compressed: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lmpress.load(compressed("llama")).save_pretrained(tmp_path / "again")
    tiny_tokenizer().save_pretrained(tmp_path / "again")
    lmpress.evaluate(tmp_path / "again", text=str(text_file), max_tokens=100)
    told = capsys.readouterr().err.splitlines()
    assert any(line.endswith("no hashes are compared") for line in told), "one line each"
    assert any(line.endswith("text that was seen is not refused") for line in told)


def test_weights_that_were_changed_are_saved_as_they_are(
    compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    model = lmpress.load(compressed("llama"), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0001)
        model.model.layers[0].self_attn.q_proj.left_scale.mul_(2)
        model.model.layers[1].self_attn.o_proj = torch.nn.Linear(64, 64, bias=False)
    model.save_pretrained(tmp_path / "again")
    again = lmpress.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    plan = config["quantization_config"]["plan"]
    assert "model.layers.1.self_attn.o_proj" not in plan
    assert "model.layers.0.self_attn.o_proj" in plan


def test_trained_factors_are_not_rounded_to_the_type_of_the_plan(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16).save_pretrained(half)
    tiny_tokenizer().save_pretrained(half)
    recipe = {"steps": [{"svd": {"targets": "linears", "ratio": 0.8, "whiten": False}}]}
    lmpress.compress(half, recipe, tmp_path / "out")
    model = lmpress.load(tmp_path / "out", dtype=torch.float32)
    lmpress.load(tmp_path / "out", dtype=torch.float32).save_pretrained(tmp_path / "same")
    first, same = plan_of(tmp_path / "out"), plan_of(tmp_path / "same")
    assert {n: f.describe() for n, f in first.items()} == {n: f.describe() for n, f in same.items()}
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(1.0001)
    model.save_pretrained(tmp_path / "again")
    again = lmpress.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
