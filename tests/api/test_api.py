"""What the public functions refuse, and what a refusal leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lmpress
from lmpress.corpora import corpus
from lmpress.errors import RequestError
from lmpress.pipeline import WORK, Run


def test_a_refused_resume_leaves_the_other_run_alone(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", killed)  # before its first block is done
    with pytest.raises(KeyboardInterrupt):
        lmpress.compress(tiny("llama"), "prune", tmp_path / "out", calibration=str(text_file))
    journal = tmp_path / "out" / WORK / "journal.jsonl"
    before = journal.read_bytes()
    with pytest.raises(RequestError, match="another model, recipe"):
        lmpress.compress(tiny("llama"), "int8", tmp_path / "out", resume=True)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("model", ["llama", "compressed"])
def test_a_type_that_does_not_exist(
    model: str, tiny: Callable[[str], Path], compressed: Callable[[str], Path]
) -> None:
    path = tiny("llama") if model == "llama" else compressed("llama")
    with pytest.raises(RequestError, match="'nn' is no floating-point type; known: float16"):
        lmpress.evaluate(path, text="python-docs", dtype="nn")


def test_c4_is_evaluated_on_its_validation_split(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Path], other_text: Path
) -> None:
    asked = []

    def rows(split: str) -> tuple[str, ...]:
        asked.append(split)
        return (other_text.read_text(),)

    monkeypatch.setitem(corpus.NAMED, "c4", rows)
    result = lmpress.evaluate(tiny("llama"), text="c4", window=64, max_tokens=128)
    assert asked == ["validation"]
    assert result.to_json()["texts"][0]["split"] == "validation"
