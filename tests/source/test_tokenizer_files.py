"""Tokenizers that do not fit the model, or that transformers cannot read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import lmpress
from lmpress.errors import RequestError
from lmpress.source import open_source

RECIPE = {"calibration": {"samples": 4, "seq_len": 16}, "steps": [{"svd": {"ratio": 0.5}}]}


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def test_a_tokenizer_of_another_model(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = model / "config.json"
    text = config.read_text().replace('"vocab_size": 256', '"vocab_size": 200').replace("253", "199")
    config.write_text(text)
    with pytest.raises(RequestError, match=r"256 tokens.*200 rows"):
        open_source(model).tokenizer()


def test_words_that_were_added_and_never_given_a_row(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["walrus"])
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("the walrus and the carpenter " * 400)
    with pytest.raises(RequestError, match=r"token 256.*256 rows"):
        lmpress.compress(model, RECIPE, tmp_path / "out", calibration=str(text))
    assert "no row for 1 of the tokens" in capsys.readouterr().err


def test_a_byte_order_mark_is_told_of(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(RequestError, match=r"tokenizer\.json begins with a byte order mark"):
        open_source(model).tokenizer()


def test_no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        RequestError, match=r"no tokenizer that transformers reads: .* files \(tokenizer\.json\)"
    ):
        open_source(model).tokenizer()
