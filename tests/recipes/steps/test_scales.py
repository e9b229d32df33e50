"""AWQ's scales as a step: for what is rounded next, and the model stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lmpress
from lmpress.errors import RequestError
from lmpress.families import Feed, Norm, layout_of
from lmpress.methods.awq import AwqOptions, Reader, awq_scales
from lmpress.methods.rtn import RoundOptions
from lmpress.recipes import parse_recipe
from lmpress.recipes.steps import Awq, Quantize, Sparsify, Step
from lmpress.recipes.steps.base import Junction
from lmpress.statistics import Channels
from tests.recipes.steps.data import GENERATOR, INPUTS, WEIGHT, refused, statistics
from tests.tiny import TINY

FEED = Feed(norm=Norm("input_layernorm"))
OTHER = torch.randn(16, 32, generator=GENERATOR)
ROUNDING = Quantize(bits=4, granularity="group:8")


def junction(later: Mapping[str, list[Step]], **others: Any) -> Junction:
    given: dict[str, Any] = {"feed": FEED, "statistics": statistics()} | others
    return Junction({"q": WEIGHT, "k": OTHER}, later=later, **given)


def test_what_is_not_rounded_is_left_alone() -> None:
    assert Awq().rewrite_site(junction({"q": [], "k": []})) is None
    assert Awq().rewrite_site(junction({"q": [Sparsify(sparsity=0.5)], "k": []})) is None


def test_readers_and_their_input_go_opposite_ways() -> None:
    made = Awq().rewrite_site(junction({"q": [ROUNDING], "k": [ROUNDING]}))
    assert made is not None
    assert made.report["alpha"] > 0
    assert made.bias is None
    assert made.channels.kept is None
    grid = RoundOptions(bits=4, granularity="group:8")
    scale, report = awq_scales([Reader(WEIGHT, grid), Reader(OTHER, grid)], statistics(), AwqOptions())
    assert made.channels.scale is not None
    torch.testing.assert_close(made.channels.scale, 1 / scale)
    assert made.report == report
    for name, weight in (("q", WEIGHT), ("k", OTHER)):
        torch.testing.assert_close(made.readers[name], weight * scale)
        outputs = made.channels.apply(INPUTS) @ made.readers[name].T
        torch.testing.assert_close(outputs, INPUTS @ weight.T, rtol=1e-4, atol=1e-4)


def test_those_that_are_rounded_decide_and_all_are_scaled() -> None:
    """By the first grid that a reader comes to."""
    made = Awq(points=7).rewrite_site(junction({"q": [], "k": [Sparsify(sparsity=0.5), ROUNDING]}))
    assert made is not None
    grid = RoundOptions(bits=4, granularity="group:8")
    scale, report = awq_scales([Reader(OTHER, grid)], statistics(), AwqOptions(points=7))
    assert made.report == report
    torch.testing.assert_close(made.readers["q"], WEIGHT * scale)
    torch.testing.assert_close(made.readers["k"], OTHER * scale)


def test_channels_that_share_a_row_are_scaled_alike() -> None:
    made = Awq().rewrite_site(junction({"q": [ROUNDING], "k": []}, feed=Feed(norm=FEED.norm, heads=(2, 4))))
    assert made is not None
    assert made.channels.scale is not None
    parts = made.channels.scale.view(2, 4, 4)
    assert torch.equal(parts, parts[:, :1].expand(-1, 4, -1))


def test_where_nothing_is_gained_nothing_changes() -> None:
    codes = torch.randint(-7, 8, (8, 32), generator=GENERATOR).float()
    codes[:, 0] = 7.0
    given = Junction({"q": codes}, FEED, statistics(), later={"q": [Quantize(bits=4)]})
    made = Awq().rewrite_site(given)
    assert made is not None
    assert made.readers["q"] is codes
    assert made.channels == Channels()
    assert made.report["alpha"] == 0.0


def test_text_and_a_feed_are_needed() -> None:
    for missing in ({"statistics": None}, {"feed": None}):
        with pytest.raises(ValueError, match="needs calibration text, and something that feeds"):
            Awq().rewrite_site(junction({"q": [ROUNDING], "k": []}, **missing))


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama", "linears", ["qkv", "o", "gate_up", "down"]),
        ("llama", "attention", ["qkv", "o"]),
        ("phi3", "mlp", ["gate_up", "down"]),
        ("opt", "linears", ["qkv", "o", "gate_up", "down"]),
        ("opt-post-norm", "linears", ["o", "down"]),  # a norm behind a sum feeds the stream as well
    ],
)
def test_sites(name: str, targets: Any, expected: list[str]) -> None:
    block = layout_of(TINY[name]()).block(0)
    assert [site.name for site in Awq(targets=targets).sites(block)] == expected


@pytest.mark.parametrize("kind", ["quantize", "entropy_quantize"])
def test_what_it_cannot_follow(kind: str) -> None:
    refused([{kind: {}}, {"awq": {}}], [f"awq comes before {kind}"])


@pytest.mark.parametrize("name", list(TINY))
def test_the_model_stays_what_it_was(
    name: str, tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """8 bits behind it are nearly the dense model, whose norms and rows have taken the inverse."""
    recipe = {
        "name": "awq",
        "calibration": {"samples": 4, "seq_len": 32},
        "dtype": "float32",
        "steps": [{"awq": {}}, {"quantize": {"bits": 8}}],
    }
    result = lmpress.compress(tiny(name), recipe, tmp_path / "out", calibration=str(text_file))
    loaded = result.load(dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense(ids).logits
        assert float((loaded(ids).logits - expected).norm() / expected.norm()) < 0.03
    layout, alphas = layout_of(dense.config), _alphas(result.manifest)
    assert any(alphas.values())
    before, after = dense.state_dict(), loaded.state_dict()
    for i in range(layout.num_blocks):
        for site in Awq().sites(layout.block(i)):
            assert site.feed is not None
            start = f"{layout.block_name(i)}."
            scaled = alphas[f"{start}{site.name}"] > 0
            if site.feed.norm is not None:
                key = f"{start}{site.feed.norm.name}.weight"
                assert torch.equal(before[key], after[key]) != scaled
            for linear in site.linears if scaled else ():
                weight = loaded.get_submodule(f"{start}{linear}").form.dense()
                assert (
                    _strayed(weight, before[f"{start}{linear}.weight"]) > 0.01
                )  # rounding alone: half of it


def _alphas(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The power that every site was given, by its full name."""
    return {
        name.removesuffix(".awq"): told["alpha"]
        for name, told in manifest["modules"].items()
        if name.endswith(".awq")
    }


def _strayed(weight: Tensor, dense: Tensor) -> float:
    return float((weight - dense).norm() / dense.norm())


def test_inputs_are_scaled_once() -> None:
    quantize = {"quantize": {"bits": 4}}
    parse_recipe({"steps": [{"awq": {"targets": "attention"}}, {"awq": {"targets": "mlp"}}, quantize]}, "two")
    with pytest.raises(RequestError, match="scaled once"):
        parse_recipe({"steps": ["awq", {"awq": {"targets": "mlp"}}, quantize]}, "twice")
