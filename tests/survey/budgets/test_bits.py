"""Whole bits: they stay within the target, and no other shares of it lose less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lmpress
from lmpress.checkpoint import plan_of
from lmpress.forms import Quantized
from lmpress.survey.budgets import bits as module
from lmpress.survey.budgets.base import Sight
from lmpress.survey.budgets.bits import Bits
from tests.survey.budgets.made import recipe


def mixed_leaves(directory: Path) -> dict[str, Quantized]:
    forms = {name: form for name, form in plan_of(directory).items() if ".layers." in f".{name}"}
    assert all(isinstance(form, Quantized) for form in forms.values())
    return forms  # type: ignore[return-value]


@pytest.mark.parametrize("solver", ["round", "gptq"])
@pytest.mark.parametrize(("bits", "granularity"), [(4.25, "group:32"), (3.1, "channel"), (6.0, "tensor")])
def test_mixed_bits_stay_within_the_target(
    bits: float,
    granularity: str,
    solver: str,
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    step = {"bits": bits, "allocation": "mixed", "granularity": granularity, "solver": solver}
    made = recipe({"quantize": step})
    result = lmpress.compress(tiny("llama"), made, tmp_path / "out", calibration=str(text_file))
    told, real = result.manifest["allocation"]["step 1"], result.manifest["sizes"]["linear_bpw"]
    assert told["exact"]
    assert real == pytest.approx(told["bits_per_weight"], abs=1e-5)
    assert bits - 0.1 <= real <= bits
    widths = {form.bits for form in mixed_leaves(tmp_path / "out").values()}
    assert len(widths) > 1


def test_mixed_bits_are_those_of_exhaustive_search(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six modules, every way to give them bits: the shares that come out lose least within the budget."""
    outlooks: list[tuple[list[float], list[int]]] = []
    original = Bits.look

    def look(self: Bits, sight: Sight) -> tuple[list[float], list[int]]:
        outlooks.append(original(self, sight))
        return outlooks[-1]

    monkeypatch.setattr(Bits, "look", look)
    monkeypatch.setattr(module, "CHOICES", (2, 3, 4, 6))
    step = {"targets": "*.mlp.*", "bits": 3.6, "allocation": "mixed"}
    result = lmpress.compress(
        tiny("llama"), recipe({"quantize": step}), tmp_path / "out", calibration=str(text_file)
    )
    forms = mixed_leaves(tmp_path / "out")
    assert len(outlooks) == len(forms) == 6
    budget = 3.6 * sum(math.prod(form.shape) for form in forms.values())
    best = min(
        sum(losses[k] for (losses, _), k in zip(outlooks, choice, strict=True))
        for choice in itertools.product(range(4), repeat=6)
        if sum(sizes[k] for (_, sizes), k in zip(outlooks, choice, strict=True)) <= budget
    )
    assert 2 * result.manifest["allocation"]["step 1"]["expected_loss"] == pytest.approx(best)


def test_scales_of_tiny_weights_count_as_they_are_stored(
    text_file: Path, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    """Where float16 cannot hold a scale it takes four bytes, and the budget holds all the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[0, :32] *= 1e-7
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "model")
    step = {"bits": 6.0, "allocation": "mixed", "granularity": "group:32"}
    made = recipe({"quantize": step})
    result = lmpress.compress(tmp_path / "model", made, tmp_path / "out", calibration=str(text_file))
    dtypes = {form.scale.dtype for form in mixed_leaves(tmp_path / "out").values()}
    assert dtypes == {torch.float16, torch.float32}
    real = result.manifest["sizes"]["linear_bpw"]
    assert real == pytest.approx(result.manifest["allocation"]["step 1"]["bits_per_weight"], abs=1e-5)
    assert real <= 6.0
