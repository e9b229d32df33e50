"""What a text was, and the refusal of texts that were seen."""

from __future__ import annotations

import pytest
import torch

from lmpress.corpora import Corpus, calibration_windows, evaluation_windows
from lmpress.errors import RequestError
from lmpress.evaluation import TextProtocol, default_window, refuse_seen_text, spq_text
from tests.tiny import BOS, TINY, tiny_text, tiny_tokenizer

TEXT = Corpus("novel", "test", (tiny_text(2000, seed=1),))


@pytest.mark.parametrize(
    ("adds_bos", "max_tokens", "bos", "stride"),
    [(False, None, "none", 100), (True, None, "window", 99), (True, 50, "text", 100)],
)
def test_everything_is_named(adds_bos: bool, max_tokens: int | None, bos: str, stride: int) -> None:
    tokenizer = tiny_tokenizer(adds_bos)
    windows = evaluation_windows(TEXT, tokenizer, 100, max_tokens)
    protocol = TextProtocol.of(TEXT, windows, 100, tokenizer.bos_token_id)
    assert protocol.to_json() == {
        "corpus": "novel",
        "split": "test",
        "corpus_sha256": TEXT.sha256,
        "text_tokens": sum(len(w) for w in windows),
        "window": 100,
        "stride": stride,
        "bos": bos,
        "label": "lmpress",
    }
    text = [w[adds_bos:] for w in windows]  # what is left without BOS is the text, `stride` tokens a window
    assert (
        torch.cat(text).tolist() == tokenizer(TEXT.text, add_special_tokens=False)["input_ids"][:max_tokens]
    )
    assert all(len(w) == stride for w in text[:-1])


def test_the_default_window_is_the_context_up_to_2048() -> None:
    config = TINY["llama"]()
    assert default_window(config) == 256
    config.max_position_embeddings = 131072
    assert default_window(config) == 2048


def test_the_papers_one_window() -> None:
    lines = [f"row {i}" if i % 3 else "" for i in range(150)]
    corpus = Corpus("rows", "test", ("\n".join(lines),))
    text = spq_text(corpus, tiny_tokenizer(bos=True), BOS)
    assert len(text.windows) == 1
    assert text.windows[0].tolist() == [BOS, *"\n".join(lines[:100]).encode()][:512]
    assert (text.protocol.label, text.protocol.window, text.protocol.bos) == ("spq", 512, "text")
    short = Corpus("short", "test", ("\n".join(["ab"] * 150),))
    assert len(spq_text(short, tiny_tokenizer()).windows[0]) == 100 * 3 - 1  # a hundred rows, and no more
    with pytest.raises(RequestError, match="the first 100 rows of blank"):
        spq_text(Corpus("blank", "test", ("a",)), tiny_tokenizer())


def test_the_same_text_is_refused_by_its_hash() -> None:
    windows = evaluation_windows(TEXT, tiny_tokenizer(), 128)
    record = [{"name": "other", "sha256": "0" * 64}, {"name": "calibration", "sha256": TEXT.sha256}]
    with pytest.raises(RequestError, match=r"novel \(test\) was used .* as calibration"):
        refuse_seen_text(record, TEXT, windows)
    assert refuse_seen_text(record[:1], TEXT, windows) == {}
    assert refuse_seen_text([], TEXT, windows) == {}


def test_shared_passages_are_counted_and_many_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    windows = evaluation_windows(TEXT, tokenizer, 128)
    ids = torch.cat(windows)
    apart = torch.full((4, 64), 7)  # nothing of the text
    record = [{"name": "calibration", "sha256": "0" * 64, "ids": apart.tolist()}]
    assert refuse_seen_text(record, TEXT, windows) == {"calibration": 0}

    passage = apart.clone()
    passage[2, 10:40] = ids[500:530]  # 30 tokens have 18 13-grams, just below 1 % of 1988
    places = {tuple(ids[500 + i : 513 + i].tolist()) for i in range(18)}
    shared = sum(tuple(ids[i : i + 13].tolist()) in places for i in range(len(ids) - 12))
    assert shared <= 19
    assert refuse_seen_text(record, TEXT, windows, {"calibration": passage}) == {"calibration": shared}

    drawn = calibration_windows(TEXT, tokenizer, 4, 64, seed=0)  # an eighth of it, under another hash
    with pytest.raises(RequestError, match=r"of the 1988 13-grams of novel \(test\) are in calibration"):
        refuse_seen_text(record, TEXT, windows, {"calibration": drawn})
