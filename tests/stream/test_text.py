"""The text that a run looks at: where it was taken from, how it is mixed, whether the model can read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmpress
from lmpress.errors import RequestError
from lmpress.source import open_source
from lmpress.stream.text import CALIBRATION, borrowed_text, calibration_text
from tests.tiny import save_tiny, tiny_text

GPTQ = [{"quantize": {"bits": 4, "solver": "gptq"}}]
Tiny = Callable[[str], Path]


def compressed(model: Path, out: Path, text: str, steps: list[Any] = GPTQ, samples: int = 8) -> Path:
    recipe = {"name": "r", "calibration": {"samples": samples, "seq_len": 32}, "steps": steps}
    lmpress.compress(model, recipe, out, calibration=text)
    return out


@pytest.fixture
def two_texts(tmp_path: Path) -> str:
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * 4000)
    return f"{tmp_path}/a.txt,file:{tmp_path}/b.txt"


@pytest.mark.parametrize("length", [2, 3, 8, 16])
def test_every_prefix_holds_both_texts(tiny: Tiny, two_texts: str, length: int) -> None:
    source = open_source(tiny("llama"))
    text = calibration_text(two_texts, source, 16, 32, seed=0)
    part = text.windows[:length]
    assert abs(int((part == ord("a")).all(1).sum()) - length / 2) <= 0.5
    assert abs(int((part == ord("b")).all(1).sum()) - length / 2) <= 0.5
    again = calibration_text(two_texts, source, 16, 32, seed=0)
    assert torch.equal(again.windows, text.windows)
    assert again.record == text.record


def test_surveys_see_the_second_text(tiny: Tiny, two_texts: str, tmp_path: Path) -> None:
    """The survey of 16 of 64 windows finds other activations once the second of two texts is another."""
    prune = [{"prune_neurons": {"allocation": "activation", "max_ratio": 0.3, "importance": "activation"}}]
    found = []
    for letter in "bc":
        (tmp_path / "b.txt").write_text(letter * 4000)
        out = compressed(tiny("llama"), tmp_path / letter, two_texts, prune, samples=64)
        found.append(json.loads((out / "lmpress.json").read_text())["survey"]["mean_activation"])
    assert found[0] != found[1]


def test_the_record_names_what_each_text_gave(
    tiny: Tiny, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": tiny_text(90)}, {"from": "gpt", "value": tiny_text(90, seed=2)}]
    rows = [{"id": f"conv_{i}", "conversations": turns} for i in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"conversations": []}])))
    out = compressed(tiny("llama"), tmp_path / "out", f"{tmp_path}/chat.jsonl,{text_file}", samples=9)
    (record,) = json.loads((out / "lmpress.json").read_text())["calibration"]
    chat, plain = record["corpora"]
    assert (chat["name"], chat["windows"]) == ("file:chat.jsonl", 5)
    assert chat["fields"] == {"conversations": 20}
    assert chat["rows"] == 21
    assert (plain["name"], plain["windows"]) == (f"file:{text_file.name}", 4)
    assert record["bos"] == "none"
    told = [line for line in capsys.readouterr().err.splitlines() if "rows" in line]
    assert told == [
        "file:chat.jsonl: 21 rows, text taken from 'conversations' (20); passed over, without text: 1;"
        " different texts: 1 alone"
    ]
    windows = load_file(out / "calibration.safetensors")["input_ids"]
    assert not any("conv_" in bytes(window.tolist()).decode("latin-1") for window in windows)


def test_recovery_holds_out_both_texts(tiny: Tiny, two_texts: str, tmp_path: Path) -> None:
    recover = [{"recover": {"steps": 18, "batch_size": 1, "seq_len": 16, "rank": 2, "held_out": 0.1}}]
    out = compressed(tiny("llama"), tmp_path / "out", two_texts, [{"quantize": {"bits": 8}}, *recover])
    windows = load_file(out / "calibration.safetensors")["recovery_ids"].long()
    held = windows[: json.loads((out / "lmpress.json").read_text())["recovery"]["held_out_windows"]]
    assert len(held) == 2
    assert set(held.unique().tolist()) == {ord("a"), ord("b")}


def test_recovery_of_many_short_rows_takes_what_they_have(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "m", bos=True)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"row {i}"}) for i in range(60)))
    recover = [{"recover": {"steps": 90, "seq_len": 16, "rank": 2}}]
    out = compressed(model, tmp_path / "out", f"{tmp_path}/rows.jsonl", recover)
    tokens = sum(len(f"row {i}") + 1 for i in range(60)) - 1
    assert load_file(out / "calibration.safetensors")["recovery_ids"].shape == (tokens // 15, 16)


@pytest.mark.parametrize("steps", [GPTQ, [{"recover": {"steps": 2, "seq_len": 16, "rank": 2}}]])
def test_tokens_without_an_embedding(tiny: Tiny, tmp_path: Path, steps: list[Any]) -> None:
    from transformers import AutoTokenizer

    model = save_tiny("llama", tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["water"])
    tokenizer.save_pretrained(model)
    (tmp_path / "t.txt").write_text("the water of the river " * 100)
    with pytest.raises(RequestError, match=r"the token 256 of file:t\.txt, and .* embedding has 256 rows"):
        compressed(model, tmp_path / "out", f"{tmp_path}/t.txt", steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["self", "file"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gemma2"])
def test_a_model_without_a_tokenizer(family: str, text: str, text_file: Path, tmp_path: Path) -> None:
    """Of some families transformers makes an empty tokenizer where there are no files."""
    model = save_tiny(family, tmp_path / "m")
    for path in model.glob("token*"):
        path.unlink()
    with pytest.raises(RequestError, match=r"tokenizer\.json") as refused:
        compressed(model, tmp_path / "out", text if text == "self" else str(text_file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("manifest", ["{", "[]", "{}"])
def test_a_damaged_checkpoint_lends_nothing(
    manifest: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "lmpress.json").write_text(manifest)
    (tmp_path / CALIBRATION).write_bytes(b"torn")
    assert borrowed_text([tmp_path], open_source(tiny("llama")), 4, 32, 0) is None


def test_a_damaged_text_is_not_lent(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(tiny("llama"))
    record = {"name": "self", "samples": 4, "seq_len": 32, "seed": 0, "ids_sha256": "0"}
    manifest = {"source": {"fingerprint": source.fingerprint}, "calibration": [record]}
    (tmp_path / "lmpress.json").write_text(json.dumps(manifest))
    (tmp_path / CALIBRATION).write_bytes(b"torn")
    assert borrowed_text([tmp_path], source, 4, 32, 0) is None
