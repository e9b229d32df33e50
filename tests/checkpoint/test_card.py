"""The model card says what was measured, and what is no number."""

from __future__ import annotations

from typing import Any

from lmpress.checkpoint import model_card

MANIFEST: dict[str, Any] = {
    "sizes": {"weight_bytes": 10, "bytes_16bit": 20, "linear_bpw": 8.0},
    "source": {"name": "a/b"},
    "recipe": {"name": "int8"},
}
TEXT = {
    "corpus": "c",
    "split": "test",
    "corpus_sha256": "0" * 64,
    "tokens": 3,
    "window": 4,
    "dtype": "float32",
}


def test_what_is_not_finite_is_said() -> None:
    dense = {"perplexity": 12.5, "kl": 0.0, "top1_agreement": 1.0}
    broken = {"perplexity": None, "kl": None, "top1_agreement": None}
    card = model_card(MANIFEST, TEXT | broken | {"reference": dense})
    assert "| perplexity | 12.500 | not finite |" in card
    assert "| same first choice as dense | 1.0000 | not finite |" in card


def test_without_a_reference_nothing_is_compared() -> None:
    card = model_card(MANIFEST, TEXT | {"perplexity": 12.5, "kl": None, "top1_agreement": None})
    assert "| perplexity |  | 12.500 |" in card
    assert "not finite" not in card
    assert "KL" not in card
