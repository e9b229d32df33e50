"""The dense model beside the compressed one: who asks for it, what is done with it, and after a crash."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmpress
from lmpress.pipeline import Run
from lmpress.plan import make_plan
from lmpress.recipes import parse_recipe
from lmpress.source import open_source

PRUNE = {"prune_neurons": {"allocation": "loss", "ratio": 0.2, "multiple_of": 8}}
FACTOR = {"targets": "linears", "method": "svd_llm", "ratio": 0.6, "update": 1.0}


def recipe(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"name": "original", "calibration": {"samples": 8, "seq_len": 32}, "steps": list(steps)}


def gptq(asymmetry: float, targets: str = "linears") -> dict[str, Any]:
    return {"quantize": {"targets": targets, "bits": 3, "solver": "gptq", "asymmetry": asymmetry}}


def shards(directory: Path) -> dict[str, str]:
    files = directory.glob("model-*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_who_asks_for_the_original(tiny: Callable[[str], Path]) -> None:
    source = open_source(tiny("llama"))
    asked = {
        targets: make_plan(parse_recipe(recipe(gptq(0.5, targets)), "test"), source).needs_original
        for targets in ("linears", "embeddings", "*")
    }
    assert asked == {"linears": True, "embeddings": False, "*": True}


def test_what_strays_is_made_up_for_once(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    def made(name: str, *steps: dict[str, Any]) -> dict[str, str]:
        lmpress.compress(tiny("llama"), recipe(*steps), tmp_path / name, calibration=str(text_file))
        return shards(tmp_path / name)

    assert made("plain", gptq(0.0)) != made("moved", gptq(1.0))
    assert made("both", {"svd": FACTOR}, gptq(1.0)) == made("first", {"svd": FACTOR}, gptq(0.0))


@pytest.mark.parametrize(
    "steps",
    [
        [PRUNE, gptq(0.5)],
        [{"svd": FACTOR | {"allocation": "error"}}],
        [
            {
                "sparse_low_rank": {
                    "sparsity": 0.5,
                    "allocation": "sensitivity",
                    "asymmetry": 0.5,
                    "iterations": 9,
                }
            }
        ],
        [
            PRUNE,
            {"svd": FACTOR | {"allocation": "sensitivity"}},
            {"entropy_quantize": {"targets": "*", "bits": 4, "asymmetry": 0.5}},
        ],
    ],
    ids=["gptq", "error", "sslc", "sensitivity"],
)
def test_a_broken_run_goes_on_to_the_same_bytes(
    steps: list[dict[str, Any]],
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breaks_and_goes_on(tiny("llama-untied"), recipe(*steps), text_file, tmp_path, monkeypatch)


@pytest.mark.parametrize(("family", "dtype"), [("opt", torch.float16), ("llama", torch.bfloat16)])
def test_so_it_does_where_norms_and_biases_are_rounded(
    family: str,
    dtype: torch.dtype,
    tiny: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs on the way is what is stored: biases that pruning moved, norms in float32."""
    model = shutil.copytree(tiny(family), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "norm" in name:  # stays float32, and is no number of 16 bits
            tensors[name] = tensor + 0.1 * torch.rand(tensor.shape, generator=generator)
        else:
            tensors[name] = tensor.to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    breaks_and_goes_on(model, recipe(PRUNE, gptq(0.5, "mlp")), text_file, tmp_path, monkeypatch)


def breaks_and_goes_on(
    model: Path, recipe: dict[str, Any], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unbroken run, and one that is interrupted behind its first block and resumed: equal bytes."""
    text = str(text_file)
    lmpress.compress(model, recipe, tmp_path / "whole", calibration=text)
    finish = Run._finish

    def breaks(self: Run, number: int, *rest: Any) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return finish(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", breaks)
        with pytest.raises(KeyboardInterrupt):
            lmpress.compress(model, recipe, tmp_path / "broken", calibration=text)
    lmpress.compress(model, recipe, tmp_path / "broken", calibration=text, resume=True)
    assert shards(tmp_path / "broken") == shards(tmp_path / "whole")


def test_shared_ranks_never_take_more_than_the_weight_that_pruning_left(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    steps = [
        {"prune_neurons": {"allocation": "uniform", "ratio": 0.33, "multiple_of": 32}},
        {"svd": {"targets": "mlp", "method": "svd_llm", "ratio": 0.98, "allocation": "sensitivity"}},
    ]
    recipe = {"name": "both", "calibration": {"samples": 8, "seq_len": 64}, "steps": steps}
    done = lmpress.compress(tiny("llama"), recipe, tmp_path / "out", calibration=str(text_file))
    for name, told in done.manifest["modules"].items():
        if "mlp" in name and "bytes" in told:
            assert told["bytes"] <= 2 * told["shape"][0] * told["shape"][1], name
