"""PEFT on compressed models: what it does with a dense one, or one error that says what to do first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

import lmpress

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
EMBEDDINGS = {"quantize": {"targets": "embeddings", "bits": 8}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "int8": [{"quantize": {"bits": 8}}, EMBEDDINGS],
    "int4": [{"quantize": {"bits": 4, "granularity": "group:32"}}, EMBEDDINGS],
    "factors": [{"svd": {"targets": "linears", "ratio": 0.8}}, EMBEDDINGS],
    "coded factors": [{"svd": {"targets": "linears", "ratio": 0.8}}, {"quantize": {"bits": 8}}],
    "sum": [{"sparse_low_rank": {"sparsity": 0.5, "iterations": 5}}, EMBEDDINGS],
    "coded": [{"entropy_quantize": {"bits": 4}}, {"entropy_quantize": {"targets": "embeddings", "bits": 5}}],
    "sparse": [{"sparsify": {"sparsity": 0.5}}],
    "2:4": [{"sparsify": {"method": "wanda", "pattern": "2:4"}}],
    "pruned": [{"prune_neurons": {"allocation": "loss", "ratio": 0.2, "multiple_of": 8}}],
}
PACKED, MATRICES = list(RECIPES)[:6], list(RECIPES)[6:]
LINEARS = ["q_proj", "down_proj"]


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": LINEARS, "init_lora_weights": False} | options)


def trained(model: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "lora on embedding and head": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "adalora": lambda: AdaLoraConfig(
        init_r=6,
        target_r=4,
        tinit=1,
        tfinal=2,
        total_step=10,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def checkpoint(
    tiny: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("adapters")

    def directory(recipe: str, family: str = "llama-untied") -> Path:
        path = root / f"{family}-{recipe.replace(':', 'of')}"
        if not path.is_dir():
            steps = {"calibration": {"samples": 4, "seq_len": 32}, "steps": RECIPES[recipe]}
            lmpress.compress(tiny(family), steps, path, calibration=str(text_file))
        return path

    return directory


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_adapters_train_are_saved_and_come_back(
    recipe: str, adapter: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = trained(get_peft_model(loaded(checkpoint(recipe)), ADAPTERS[adapter]()))
    adapted = logits(model)
    assert not torch.allclose(adapted[:, -24:], logits(loaded(checkpoint(recipe))), atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(checkpoint(recipe)), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), adapted)


def test_embeddings_that_scale_their_rows_scale_what_an_adapter_adds(
    checkpoint: Callable[..., Path],
) -> None:
    config = lora(target_modules=["embed_tokens"])
    adapted = get_peft_model(loaded(checkpoint("int8", "gemma3")), config).eval()
    dense = get_peft_model(loaded(checkpoint("int8", "gemma3")).dequantize(), config).eval()
    dense.load_state_dict(
        {name: tensor for name, tensor in adapted.state_dict().items() if "lora" in name}, strict=False
    )
    torch.testing.assert_close(logits(adapted), logits(dense), rtol=1e-3, atol=2e-4)


def test_adapters_of_transformers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = loaded(checkpoint("int8"))
    model.add_adapter(lora())
    adapted = logits(trained(model))
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(checkpoint("int8"))
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), adapted)


def merge(model: Any) -> None:
    get_peft_model(model, lora()).merge_and_unload()


REFUSED: dict[str, Callable[[Any], Any]] = {
    "merge": merge,
    "safe merge": lambda model: get_peft_model(model, lora()).merge_and_unload(safe_merge=True),
    "merge for a while": lambda model: get_peft_model(model, lora()).merge_adapter(),
    "ia3 merge": lambda model: get_peft_model(model, ADAPTERS["ia3"]()).merge_and_unload(),
    "dora": lambda model: logits(get_peft_model(model, lora(use_dora=True))),
}
REFUSED_OF_CODES: dict[str, Callable[[Any], Any]] = {
    "modules to save": lambda m: get_peft_model(m, lora(modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": lambda m: trained(
        get_peft_model(m, TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens"]))
    ),
    "resize": lambda model: model.resize_token_embeddings(260),
    "train all": lambda model: model.requires_grad_(True),
}


@pytest.mark.parametrize(
    ("recipe", "what"),
    [(r, w) for r in PACKED for w in REFUSED] + [(r, w) for r in ("int8", "coded") for w in REFUSED_OF_CODES],
)
def test_what_needs_a_matrix_says_to_dequantize_first_and_then_works(
    recipe: str, what: str, checkpoint: Callable[..., Path]
) -> None:
    do = (REFUSED | REFUSED_OF_CODES)[what]
    with pytest.raises(ValueError, match=r"call model\.dequantize\(\) first"):
        do(loaded(checkpoint(recipe)))
    do(loaded(checkpoint(recipe)).dequantize())


@pytest.mark.parametrize("config", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("recipe", MATRICES)
def test_what_is_merged_into_a_matrix_is_what_is_saved(
    recipe: str, config: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = ADAPTERS["ia3"]() if config == "ia3" else lora(use_dora=config == "dora")
    model = trained(get_peft_model(loaded(checkpoint(recipe)), adapter))
    adapted = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = lmpress.load(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("recipe", MATRICES)
def test_what_was_merged_for_a_while_is_taken_out(
    recipe: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = get_peft_model(loaded(checkpoint(recipe)), lora()).eval()
    adapted, plain = logits(model), logits(loaded(checkpoint(recipe)))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model.unload()), plain, rtol=1e-3, atol=1e-3)
