"""Evaluation of checkpoints: text of every kind, seen text refused, windows that the model can read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmpress
from lmpress.errors import RequestError
from tests.tiny import tiny_text

Tiny = Callable[[str], Path]
ROWS = [
    {"id": f"row_{i}", "question": tiny_text(60, seed=i), "answer": tiny_text(60, seed=99 + i)}
    for i in range(9)
]


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was calibrated on ROWS, as JSONL."""
    directory = tmp_path_factory.mktemp("made")
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    size = {"samples": 8, "seq_len": 128}
    recipe = {"name": "r", "calibration": size, "steps": [{"quantize": {"bits": 4, "solver": "gptq"}}]}
    lmpress.compress(tiny("llama"), recipe, directory / "out", calibration=str(directory / "rows.jsonl"))
    return directory / "out"


def test_rows_are_evaluated_as_their_text(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.txt").write_text("\n\n".join(f"{row['question']}\n\n{row['answer']}" for row in ROWS))
    rows, plain = (
        lmpress.evaluate(tiny("llama"), text=str(tmp_path / name), window=64).texts[0]
        for name in ("rows.json", "rows.txt")
    )
    assert rows.score == plain.score
    assert rows.protocol.corpus_sha256 == plain.protocol.corpus_sha256
    assert "rows.json: 9 rows, text taken from 'question + answer' (9)" in capsys.readouterr().err


def test_the_text_of_seen_rows_is_refused_in_any_file(made: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    with pytest.raises(RequestError, match=r"rows\.csv .* was used to make this checkpoint"):
        lmpress.evaluate(made, text=str(tmp_path / "rows.csv"), window=64)
    answers = [{"text": row["answer"]} for row in ROWS]
    (tmp_path / "answers.ndjson").write_text("\r\n".join(map(json.dumps, answers)))
    with pytest.raises(RequestError, match=r"13-grams of file:answers\.ndjson .* are in file:rows\.jsonl"):
        lmpress.evaluate(made, text=str(tmp_path / "answers.ndjson"), window=64)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [({"window": 257}, "lower `window`"), ({"paper_protocol": "spq"}, "the paper's protocol")],
)
def test_windows_beyond_the_context_are_refused(
    tiny: Tiny, other_text: Path, options: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(RequestError, match=f"longer than the model's context of 256: {remedy}"):
        lmpress.evaluate(tiny("llama"), text=str(other_text), **options)


def test_a_window_of_none_is_refused(tiny: Tiny, other_text: Path) -> None:
    with pytest.raises(RequestError, match="at least 2 tokens, not 0"):
        lmpress.evaluate(tiny("llama"), text=str(other_text), window=0)


def test_the_same_text_twice_is_refused(tiny: Tiny, other_text: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin.txt"
    twin.write_bytes(other_text.read_bytes())
    with pytest.raises(RequestError, match=r"file:evaluation\.txt and file:twin\.txt are the same text"):
        lmpress.evaluate(tiny("llama"), text=[str(other_text), str(twin)], window=64)
    step = {"calibration": {"samples": 2, "seq_len": 16}, "steps": [{"quantize": {"solver": "gptq"}}]}
    with pytest.raises(RequestError, match="are the same text"):
        lmpress.compress(tiny("llama"), step, tmp_path / "out", calibration=f"{twin},{other_text}")
