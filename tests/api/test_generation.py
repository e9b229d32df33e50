"""The likeliest token each time, whatever is written beside the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmpress
from lmpress.api import continuation, generate, load_any
from lmpress.api.generation import end_tokens
from lmpress.errors import LmpressError, RequestError
from tests.tiny import EOS, TINY, tiny_model, tiny_tokenizer

PROMPT = "the river"


def likeliest(model: Any, steps: int) -> list[int]:
    """Every token from the whole text anew, with no cache."""
    ids = torch.tensor([tiny_tokenizer()(PROMPT)["input_ids"]])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("name", TINY)
def test_every_family_goes_on_with_the_likeliest_token(name: str) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    expected = tokenizer.decode(likeliest(model, 8), skip_special_tokens=True)
    assert continuation((model, tokenizer, None), PROMPT, 8) == expected


GENERATION: dict[str, Any] = {
    "penalty": {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3},
    "lengths": {"max_length": 3, "min_new_tokens": 7, "max_new_tokens": 2},
    "tokens": {"suppress_tokens": list(range(128)), "forced_bos_token_id": 200, "bad_words_ids": [[7]]},
    "invalid": {"suppress_tokens": [5], "forced_eos_token_id": 5},
}


@pytest.mark.parametrize("kind", GENERATION)
def test_of_the_generation_config_nothing_counts_but_the_end(
    kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny("llama-untied"), tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps(GENERATION[kind] | {"eos_token_id": EOS}))
    lmpress.compress(model, "int8", tmp_path / "out")
    for path, loaded in (
        (model, tiny_model("llama-untied")),
        (tmp_path / "out", load_any(tmp_path / "out")[0]),
    ):
        expected = tiny_tokenizer().decode(likeliest(loaded, 8), skip_special_tokens=True)
        assert generate(path, PROMPT, max_new_tokens=8) == expected


def test_it_stops_at_any_end_token(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("llama-untied"), tmp_path / "model"))
    tokens = likeliest(tiny_model("llama-untied"), 8)
    stop = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, tokens[stop]]}))
    lmpress.compress(model, "int8", tmp_path / "out")
    expected = tiny_tokenizer().decode(tokens[: stop + 1], skip_special_tokens=True)
    assert generate(model, PROMPT, max_new_tokens=8) == expected
    for path in (model, tmp_path / "out"):
        assert end_tokens(tiny_model("llama"), tiny_tokenizer(), path) == {EOS, tokens[stop]}


def test_who_says_where_a_text_ends(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.config.eos_token_id = 7
    assert end_tokens(model, tokenizer, tmp_path) == {7}
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_tokens(model, tokenizer, tmp_path) == {7}
    model.config.eos_token_id = None
    assert end_tokens(model, tokenizer, None) == {EOS}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert end_tokens(model, tokenizer, tmp_path) == {0}


@pytest.mark.parametrize("ends", ['"</s>"', "[7, null]", '{"id": 7}', "true", "1.5", '["7"]'])
def test_what_ends_a_text_is_a_token(ends: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(RequestError, match=r"generation_config\.json: eos_token_id is .* no token"):
        end_tokens(tiny_model("llama"), tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize(
    ("prompt", "steps", "words"),
    [
        ("", 4, "the prompt is empty"),
        ("a" * 256, 4, "the prompt has 256 tokens, and the model's context is 256"),
        ("ab\udcff", 4, "no text in UTF-8, from character 3 on"),
        ("ab", 0, "max_new_tokens is at least 1, not 0"),
    ],
)
def test_what_cannot_be_gone_on_from(prompt: str, steps: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        continuation((tiny_model("opt"), tiny_tokenizer(), None), prompt, steps)


def test_a_full_context_ends_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("opt")
    model.config.eos_token_id = 256  # never
    text = continuation((model, tiny_tokenizer(), None), "a" * 253, 9)
    assert text
    assert "the model's context is full after 3 new tokens" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_give_no_text(value: float) -> None:
    model = tiny_model("llama-bias")
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(LmpressError, match="logits are not finite after 0 new tokens") as caught:
        continuation((model, tiny_tokenizer(), None), PROMPT, 4)
    assert caught.value.exit_code == 1


def test_a_tokenizer_of_another_model() -> None:
    class Larger:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3, 999]}

    with pytest.raises(
        RequestError, match="token 999 of the prompt is outside the model's vocabulary of 256"
    ):
        continuation((tiny_model("llama"), Larger(), None), PROMPT, 4)


def test_a_model_without_a_tokenizer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny("llama") / name, model)
    lmpress.compress(model, "int8", tmp_path / "out")
    for path in (model, tmp_path / "out"):
        with pytest.raises(RequestError, match=f"{path.name} has no tokenizer"):
            generate(path, PROMPT)
