"""A model read as an equal one: other weights, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmpress.errors import RequestError
from lmpress.methods.rotation import random_rotation
from lmpress.recipes import parse_recipe
from lmpress.source import ModelSource, as_recipe_reads, load_dense, open_source
from lmpress.source.equal import EqualSource

TIED = ("llama", "qwen2", "qwen3")
UNTIED = ("llama-untied", "llama-bias", "mistral", "phi3")
IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def rotated(path: Path, seed: int = 0) -> ModelSource:
    recipe = parse_recipe({"name": "turned", "seed": seed, "steps": [{"rotate": {}}]}, "r")
    return as_recipe_reads(open_source(path), recipe)


@pytest.mark.parametrize("name", [*TIED, *UNTIED])
def test_the_function_is_the_same_and_the_weights_are_others(name: str, tiny: Callable[[str], Path]) -> None:
    plain, turned = open_source(tiny(name)), rotated(tiny(name))
    assert isinstance(turned, EqualSource)
    dense, equal = load_dense(plain, torch.float32), load_dense(turned, torch.float32)
    with torch.no_grad():
        expected, logits = dense(IDS).logits, equal(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-4
    before, after = dense.state_dict(), equal.state_dict()
    layout = plain.layout
    for key in (*layout.linears, layout.embedding, layout.head):
        old, new = before[f"{key}.weight"], after[f"{key}.weight"]
        assert float((new - old).norm() / old.norm()) > 0.5, key
    for i in range(layout.num_blocks):
        for site in layout.block(i).sites:
            if site.feed is not None and site.feed.norm is not None:
                assert bool((after[f"{layout.block_name(i)}.{site.feed.norm.name}.weight"] == 1).all())
    assert bool((after["model.norm.weight"] == 1).all())


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_becomes_one_of_its_own(name: str, tiny: Callable[[str], Path]) -> None:
    plain, turned = open_source(tiny(name)), rotated(tiny(name))
    assert plain.config.tie_word_embeddings
    assert not turned.config.tie_word_embeddings
    assert not turned.layout.tied
    equal = load_dense(turned, torch.float32)
    table, head = equal.get_input_embeddings().weight, equal.get_output_embeddings().weight
    assert table.data_ptr() != head.data_ptr()
    gain = plain.read(["model.norm.weight"])["model.norm.weight"].float()
    weight = plain.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"].float()
    matrix = random_rotation(64, 0).float()
    torch.testing.assert_close(table.data, weight @ matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.data, (weight * gain) @ matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNTIED)
def test_the_config_stays_where_nothing_was_tied(name: str, tiny: Callable[[str], Path]) -> None:
    plain = open_source(tiny(name))
    assert rotated(tiny(name)).config.to_dict() == plain.config.to_dict()


def test_outlying_channels_are_spread_over_all(tiny: Callable[[str], Path]) -> None:
    """A column a hundred times the others, as one that reads the stream sees it."""
    source = open_source(tiny("llama-untied"))
    step = parse_recipe({"steps": [{"rotate": {}}]}, "r").steps[0]
    equality = step.equality(source.config, source.layout, 0)
    assert equality is not None
    key = "model.layers.0.mlp.gate_proj.weight"
    tensors = {name: tensor.clone() for name, tensor in source.read(equality.reads(key)).items()}
    tensors[key][:, 5] *= 100.0
    sizes = equality.tensor(key, tensors).norm(dim=0)
    assert float(sizes.max() / sizes.min()) < 1.5


def test_it_is_another_model_for_the_journal(tiny: Callable[[str], Path]) -> None:
    plain = open_source(tiny("llama"))
    prints = {plain.fingerprint, rotated(tiny("llama"), 0).fingerprint, rotated(tiny("llama"), 1).fingerprint}
    assert len(prints) == 3
    assert rotated(tiny("llama"), 1).fingerprint == rotated(tiny("llama"), 1).fingerprint


def test_all_else_is_that_of_the_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    plain, turned = open_source(tiny("llama")), rotated(tiny("llama"))
    assert turned.name == plain.name
    assert turned.dtype == plain.dtype
    assert turned.files == plain.files
    assert turned.location == plain.location
    assert turned.tensors == plain.tensors
    assert turned.tokenizer().get_vocab() == plain.tokenizer().get_vocab()
    turned.copy_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny("llama") / "tokenizer.json").read_bytes()


def test_a_recipe_without_such_a_step_reads_the_model_itself(tiny: Callable[[str], Path]) -> None:
    source = open_source(tiny("llama"))
    assert as_recipe_reads(source, parse_recipe({"steps": [{"quantize": {}}]}, "r")) is source


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "stands between a linear and the residual stream"),
        ("gemma3", "stands between a linear and the residual stream"),
        ("opt", "more than a norm"),
        ("opt-post-norm", "more than a norm"),
    ],
)
def test_models_that_have_no_such_equal_are_refused(
    name: str, reason: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(RequestError) as caught:
        rotated(tiny(name))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"recipe turned: step 1 (rotate) cannot be applied to {tiny(name)}: ")
    assert reason in message
    assert caught.value.exit_code == 2
