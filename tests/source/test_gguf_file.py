"""GGUF files that are damaged, or hold something else than a model."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from lmpress.errors import RequestError
from lmpress.source import open_source
from lmpress.source.gguf_file import GgufFile, computing_keys
from tests.tiny import tiny_model
from tests.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    keys = {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(256)]}
    return write_gguf(
        tiny_model("llama"), "llama", tmp_path_factory.mktemp("g") / "m.gguf", keys
    ).read_bytes()


def test_a_file_that_breaks_off_anywhere_says_so(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header = len(whole) - 4 * sum(p.numel() for p in tiny_model("llama").parameters())
    lengths = [1, 3, 4, 7, 8, 15, 24, 40, *range(64, header, header // 40), header, len(whole) // 2]
    for length in [*lengths, len(whole) - 33, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(RequestError, match="truncated") as refusal:
            open_source(path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"GGML\3\0\0\0", "no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no GGUF file"),
        (b"GGUF\1\0\0\0" + bytes(100), "version 1"),
        (b"GGUF\0\0\0\3" + bytes(100), "big-endian"),
    ],
)
def test_a_file_that_does_not_begin_as_one(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(RequestError, match=words):
        open_source(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"general.type": "adapter"}, "'adapter'.*merge"),
        ({"general.type": "mmproj"}, "no model by itself"),
        ({"split.count": 2}, "one of 2 parts.*--merge"),
    ],
)
def test_a_file_that_holds_no_whole_model(keys: dict[str, str | int], words: str, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), "llama", tmp_path / "m.gguf", keys)
    with pytest.raises(RequestError, match=words):
        open_source(path)


@pytest.mark.parametrize("name", ["M.GGUF", "m.bin"])
def test_the_name_of_the_file_plays_no_part(name: str, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(whole)
    assert open_source(tmp_path / name).config.model_type == "llama"


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(16))
    with pytest.raises(RequestError, match=r"no \.gguf"):
        open_source(tmp_path / "model.safetensors")


def test_it_knows_what_was_asked_for(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    file = GgufFile(tmp_path / "m.gguf")
    assert file.own("block_count") == 2
    assert "block_count" not in file.unread()
    assert file.unread()["embedding_length"] == 64
    with pytest.raises(RequestError, match=r"llama\.no_such_key"):
        file.own("no_such_key")


def test_the_keys_that_llama_cpp_computes_with_are_known() -> None:
    assert {"attention.scale", "logit_scale", "rope.scaling.factor", "expert_count"} <= computing_keys()
    assert not any("{arch}" in key for key in computing_keys())
    assert gguf.Keys.LLM.BLOCK_COUNT.removeprefix("{arch}.") in computing_keys()
