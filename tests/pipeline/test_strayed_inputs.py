"""Asymmetric calibration, from the public function on: what C is, and that it is used with the right sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.forms import Form
from lmpress.methods.result import Rewritten
from lmpress.recipes import LeafContext, Quantize
from lmpress.statistics import InputStatistics

FAMILIES = ["llama", "opt"]


def recipe(asymmetry: float, bits: int = 3) -> dict[str, Any]:
    step = {"bits": bits, "solver": "gptq", "asymmetry": asymmetry}
    calibration = {"samples": 48, "seq_len": 32, "precision": "float32"}
    return {"name": "strayed", "calibration": calibration, "dtype": "float32", "steps": [{"quantize": step}]}


def inputs_of(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """By name of every linear, what comes into it, (tokens, in), float64."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach().flatten(0, -2).double()

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if not list(module.children()) and "layers." in name and "norm" not in name and "act" not in name
    ]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cross_matrix_is_that_of_both_models(
    family: str,
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """E[(x_fp - x) x^T], x_fp what comes into a linear in the dense model, x in the compressed one."""
    told: list[tuple[Tensor, Tensor]] = []
    rewrite = Quantize.rewrite

    def listening(
        self: Quantize, form: Form, statistics: InputStatistics | None, context: LeafContext
    ) -> Rewritten:
        assert context.cross is not None
        told.append((form.dense(), context.cross.clone()))
        return rewrite(self, form, statistics, context)

    monkeypatch.setattr(Quantize, "rewrite", listening)
    done = lmpress.compress(tiny(family), recipe(0.5), tmp_path / "out", calibration=str(text_file))
    dense = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    windows = load_file(tmp_path / "out" / "calibration.safetensors")["input_ids"].long()
    wanted, found = inputs_of(dense, windows), inputs_of(done.load(dtype=torch.float32), windows)
    names = {name: module.weight for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    strayed = 0
    for weight, cross in told:
        (name,) = [n for n, w in names.items() if n in found and torch.equal(w, weight)]
        x, original = found[name], wanted[name]
        expected = (original - x).T @ x / len(x)
        scale = float((original.square().mean() * x.square().mean()).sqrt())
        torch.testing.assert_close(cross.double(), expected, rtol=1e-3, atol=1e-4 * scale)
        strayed += float(expected.abs().max()) > 0.01 * scale
    assert strayed >= len(told) - 3  # nothing has strayed in front of the first q, k and v


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_come_back_to_those_of_the_dense_model(
    family: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """On the text that it was fitted to: else luck would decide with so little of it."""
    dense = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    errors = {}
    for asymmetry in (0.0, 0.5, 1.0):
        out = tmp_path / str(asymmetry)
        done = lmpress.compress(tiny(family), recipe(asymmetry), out, calibration=str(text_file))
        windows = load_file(out / "calibration.safetensors")["input_ids"].long()
        model = done.load(dtype=torch.float32)
        with torch.no_grad():
            strayed = model(windows).logits - dense(windows).logits
        errors[asymmetry] = float(strayed.square().mean())
    assert max(errors[0.5], errors[1.0]) < 0.95 * errors[0.0]


def test_the_first_site_has_not_strayed(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crosses: list[float] = []
    rewrite = Quantize.rewrite

    def listening(self: Quantize, form: Form, statistics: Any, context: LeafContext) -> Rewritten:
        assert context.cross is not None
        crosses.append(float(context.cross.abs().max()))
        return rewrite(self, form, statistics, replace(context))

    monkeypatch.setattr(Quantize, "rewrite", listening)
    lmpress.compress(tiny("llama"), recipe(1.0), tmp_path / "out", calibration=str(text_file))
    assert max(crosses[:3]) < 1e-5 < min(crosses[3:])
