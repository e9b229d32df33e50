"""Every step x every family: compress, save, load, and the loaded model is the one in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.checkpoint import forms_of, put_forms
from tests.tiny import TINY

STEPS: dict[str, list[dict[str, Any]]] = {
    "svd": [{"svd": {"targets": "linears", "ratio": 0.7}}],
    "prune": [{"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 8}}],
    "prune-paper": [
        {"prune_neurons": {"max_ratio": 0.3, "importance": "activation", "compensate": False}},
    ],
    "int8": [{"quantize": {"bits": 8}}, {"quantize": {"targets": "embeddings"}}],
    "gptq4": [{"quantize": {"bits": 4, "granularity": "group:32", "solver": "gptq"}}],
    "svd-gptq8": [{"svd": {"targets": "attention", "ratio": 0.7}}, {"quantize": {"solver": "gptq"}}],
    "uint3": [{"quantize": {"bits": 3, "symmetric": False, "granularity": "group:32"}}],
    "asvd-pivot-8": [
        {"svd": {"targets": "linears", "method": "asvd", "ratio": 0.7}},
        {"pivot": {}},
        {"quantize": {"solver": "gptq"}},
    ],
    "svd-llm": [{"svd": {"targets": "linears", "method": "svd_llm", "ratio": 0.8}}],
    "sparsegpt-joint": [{"sparsify": {"sparsity": 0.5, "bits": 4, "granularity": "group:32"}}],
    "wanda-2of4": [{"sparsify": {"method": "wanda", "pattern": "2:4"}}, {"quantize": {"solver": "gptq"}}],
    "alps-correct": [
        {"sparsify": {"method": "alps", "sparsity": 0.6, "targets": "mlp"}},
        {"quantize": {"bits": 3, "targets": "attention"}},
        {"correct": {"rank": 4, "bits": 8}},
    ],
    "sslc": [{"sparse_low_rank": {"sparsity": 0.5, "bits": 4, "factor_bits": 8, "iterations": 20}}],
    "ec": [{"entropy_quantize": {"bits": 4}}, {"entropy_quantize": {"targets": "embeddings", "bits": 6}}],
    "svd-pivot-ec": [
        {"svd": {"targets": "linears", "ratio": 0.7}},
        {"pivot": {"targets": "mlp"}},
        {"entropy_quantize": {"bits": 5}},
    ],
    "prune-ec": [
        {"prune_neurons": {"allocation": "uniform", "ratio": 0.25, "multiple_of": 8}},
        {"entropy_quantize": {"bits": 4}},
    ],
    "mixed": [
        {"quantize": {"bits": 4.5, "allocation": "mixed", "granularity": "group:32", "solver": "gptq"}},
    ],
}

CASES = [(family, step) for family in TINY for step in STEPS]


@pytest.mark.parametrize(("family", "step"), CASES)
def test_what_is_loaded_is_what_was_compressed(
    family: str, step: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = {"name": step, "calibration": {"samples": 4, "seq_len": 32}, "steps": STEPS[step]}
    result = lmpress.compress(tiny(family), recipe, tmp_path / "out", calibration=str(text_file))
    loaded = result.load(dtype=torch.float32)
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded(ids).logits
    assert torch.isfinite(logits).all()

    # an independent rebuild: the dense model with dense copies of the forms in the place of its weights
    dense = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    dense.load_state_dict(_rebuilt(loaded, dense), strict=True)
    dense.tie_weights()
    with torch.no_grad():
        expected = dense(ids).logits
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)


def _rebuilt(loaded: Any, dense: Any) -> dict[str, torch.Tensor]:
    """The state of the stock model that the checkpoint stands for: removed neurons are zeros."""
    forms = forms_of(loaded)
    own, state = loaded.state_dict(), dense.state_dict()
    for name, stock in state.items():
        module = name.removesuffix(".weight")
        if dense.config.tie_word_embeddings and module == "lm_head":
            continue  # `tie_weights` brings it
        value = forms[module].dense() if module in forms else own[name]
        full = torch.zeros_like(stock)
        fused = 2 if "gate_up_proj" in name else 1  # a neuron has a row in each half
        for into, part in zip(full.chunk(fused), value.chunk(fused), strict=True):
            into[tuple(slice(0, n) for n in part.shape)] = part
        state[name] = full
    return state


@pytest.mark.parametrize("family", ["llama", "llama-untied", "opt", "gemma3"])
def test_reloaded_logits_equal_those_in_memory(
    family: str, tiny: Callable[[str], Path], compressed: Callable[[str], Path]
) -> None:
    loaded = lmpress.load(compressed(family))
    memory = AutoModelForCausalLM.from_pretrained(compressed(family))
    fresh = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    biases = {
        name: loaded.get_submodule(name).bias.data
        for name, form in forms_of(loaded).items()
        if getattr(loaded.get_submodule(name), "bias", None) is not None
    }
    put_forms(fresh, forms_of(loaded), biases)
    own = fresh.state_dict()
    for name, value in loaded.state_dict().items():
        own[name].copy_(value)
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(ids).logits
        assert torch.equal(memory(ids).logits, expected)
        assert torch.equal(fresh(ids).logits, expected)
