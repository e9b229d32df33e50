"""Plan names in models of other kinds than the causal one that was compressed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import lmpress
from lmpress.api import inspect
from lmpress.checkpoint import plan_of
from lmpress.forms.linear import FormHolder
from tests.tiny import TINY

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
HEADS = {"score", "qa_outputs"}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out[0] if isinstance(out[0], torch.Tensor) else out.logits


def held(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FormHolder)]


@pytest.fixture(scope="module")
def dense(
    compressed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The same numbers as a plain checkpoint: what the compressed one is to do, transformers does with it."""
    root = tmp_path_factory.mktemp("dense")

    def directory(name: str) -> Path:
        if not (root / name).is_dir():
            model = AutoModelForCausalLM.from_pretrained(compressed(name), dtype=torch.float32)
            model.dequantize().save_pretrained(root / name)
        return root / name

    return directory


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *[(family, AutoModel) for family in TINY],
        *[(family, AutoModelForSequenceClassification) for family in ("llama", "llama-untied", "opt")],
        ("llama-untied", AutoModelForTokenClassification),
        ("opt", AutoModelForQuestionAnswering),
    ],
)
def test_other_kinds_of_model_load_save_and_dequantize(
    family: str,
    kind: Any,
    compressed: Callable[[str], Path],
    dense: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    plain, expected = kind.from_pretrained(dense(family), dtype=torch.float32, output_loading_info=True)
    model, info = kind.from_pretrained(compressed(family), dtype=torch.float32, output_loading_info=True)
    assert len(held(model)) == len(plan_of(compressed(family)).keys() - {"lm_head"})
    assert set(info["missing_keys"]) == set(expected["missing_keys"])
    assert {key.split(".")[0] for key in info["unexpected_keys"]} <= {"lm_head"}
    for head in HEADS & set(dict(model.named_children())):
        model.get_submodule(head).load_state_dict(plain.get_submodule(head).state_dict())
    before = outputs(model)
    torch.testing.assert_close(before, outputs(plain), rtol=1e-3, atol=2e-4)

    model.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert held(again) == held(model)
    assert torch.equal(outputs(again), before)

    model.dequantize()
    assert not held(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-3, atol=2e-4)


def test_a_bare_model_that_was_saved_goes_back_under_a_head(
    compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = AutoModelForCausalLM.from_pretrained(compressed("llama"), dtype=torch.float32)
    AutoModel.from_pretrained(compressed("llama"), dtype=torch.float32).save_pretrained(tmp_path / "bare")
    assert torch.equal(outputs(lmpress.load(tmp_path / "bare", dtype=torch.float32)), outputs(whole))


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_the_table_of_a_bare_model_is_that_of_the_whole_one(
    family: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    for kind in (AutoModel, AutoModelForCausalLM):
        kind.from_pretrained(compressed(family)).save_pretrained(tmp_path / kind.__name__)
    told, rows = inspect(tmp_path / "AutoModel")
    whole, expected = inspect(tmp_path / "AutoModelForCausalLM")
    assert rows == expected
    assert told["sizes"]["linear_bpw"] == whole["sizes"]["linear_bpw"]


def test_fewer_blocks_than_the_plan_names(compressed: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("llama-untied"), num_hidden_layers=2)
    assert len(model.model.layers) == 2
    assert "lm_head" in held(model)


def test_a_fresh_model_of_the_config_is_dense(compressed: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(compressed("llama"))
    assert not held(AutoModelForCausalLM.from_config(config))
