"""The dense model in memory: the right one, and never twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmpress.source import load_dense, open_source
from tests.tiny import TINY, save_tiny, tiny_model


@pytest.mark.parametrize("name", list(TINY))
def test_it_is_the_model(name: str, tiny: Callable[[str], Path]) -> None:
    ids = torch.arange(20)[None]
    loaded = load_dense(open_source(tiny(name)), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, tiny_model(name)(ids).logits)
    assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())


def test_one_tensor_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 16-bit weights there is one at a time beside those that are computed with."""
    path = save_tiny("llama-untied", tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    source = open_source(path)
    asked: list[int] = []
    read = source.read

    def counted(names: Iterable[str]) -> dict[str, torch.Tensor]:
        asked.append(len(tuple(names)))
        return read(names)

    monkeypatch.setattr(source, "read", counted)
    model = load_dense(source, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert asked == [1] * len(source.names)
