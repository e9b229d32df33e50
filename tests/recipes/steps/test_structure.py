"""Pruning of neurons: what it cannot follow."""

from __future__ import annotations

from typing import Any

import pytest

from lmpress.recipes import parse_recipe
from tests.recipes.steps.data import refused


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"quantize": {}}, {"prune_neurons": {"max_ratio": 0.1}}], ["prune_neurons comes before"]),
        ([{"sparsify": {"sparsity": 0.5}}, {"prune_neurons": {}}], ["prune_neurons comes before sparsify"]),
        ([{"entropy_quantize": {}}, {"prune_neurons": {}}], ["prune_neurons comes before"]),
        ([{"awq": {}}, {"prune_neurons": {}}], ["prune_neurons comes before awq"]),
    ],
)
def test_what_cannot_follow(steps: list[dict[str, Any]], words: list[str]) -> None:
    refused(steps, words)


def test_scales_of_attention_alone_are_no_obstacle() -> None:
    steps = [
        {"awq": {"targets": "attention"}},
        {"prune_neurons": {}},
        {"awq": {"targets": "mlp"}},
        {"quantize": {}},
    ]
    assert len(parse_recipe({"steps": steps}, "r").steps) == 4
