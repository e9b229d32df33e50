"""Recovery: what it cannot follow."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes.steps.data import refused


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"sparsify": {"sparsity": 0.5}}, {"recover": {}}], ["keep: term"]),
        (
            [{"entropy_quantize": {}}, {"recover": {"keep": "merge"}}],
            ["merged into what entropy_quantize makes", "keep: term"],
        ),
        (
            [
                {"sparsify": {"sparsity": 0.5, "targets": "mlp"}},
                {"recover": {"targets": "linears"}},
            ],
            ["keep: term"],
        ),
    ],
)
def test_what_cannot_follow(steps: list[dict[str, Any]], words: list[str]) -> None:
    refused(steps, words)
