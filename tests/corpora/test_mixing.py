"""Several texts, each with its share of every prefix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpress.corpora import Corpus, calibration_windows, draw_windows
from lmpress.corpora.mixing import mixed, shares, turns
from lmpress.errors import RequestError
from tests.tiny import tiny_tokenizer

LETTERS = "abc"
CORPORA = [Corpus(letter, "all", (letter * 4000,)) for letter in LETTERS]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_every_prefix_has_its_share_to_within_one(counts):
    order, total = turns(counts), sum(counts)
    assert [order.count(i) for i in range(len(counts))] == counts
    for k in range(total + 1):
        for i, count in enumerate(counts):
            assert abs(order[:k].count(i) - k * count / total if total else 0) < 1


def test_shares_are_even():
    assert shares(8, 3) == [3, 3, 2]
    assert shares(6, 3) == [2, 2, 2]


def test_windows_are_taken_in_turn_and_none_is_lost():
    parts = [
        torch.arange(6).view(3, 2),
        100 + torch.arange(2).view(1, 2),
        torch.empty(0, 2, dtype=torch.int64),
    ]
    windows = mixed(parts)
    assert sorted(windows.tolist()) == [[0, 1], [2, 3], [4, 5], [100, 101]]
    assert windows[windows[:, 0] < 100].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert mixed(parts[2:]).shape == (0, 2)


def test_every_look_at_the_first_windows_sees_all_texts():
    windows, record = draw_windows(CORPORA, tiny_tokenizer(), 32, 64, seed=3)
    assert windows.shape == (32, 64)
    for k in (3, 8, 16, 31, 32):
        for letter, count in zip(LETTERS.encode(), (11, 11, 10), strict=True):
            assert abs((windows[:k] == letter).all(1).sum().item() - k * count / 32) < 1
    assert [each["windows"] for each in record["corpora"]] == [11, 11, 10]
    assert (record["name"], record["split"], record["bos"]) == ("a, b, c", "all, all, all", "none")
    assert record["sha256"].split(", ") == [corpus.sha256 for corpus in CORPORA]


def test_the_seed_decides():
    numbered = [Corpus(str(n), "all", ("".join(f"{i:04d}" for i in range(n, n + 900)),)) for n in (0, 5000)]
    first = draw_windows(numbered, tiny_tokenizer(bos=True), 8, 32, seed=3)
    again = draw_windows(numbered, tiny_tokenizer(bos=True), 8, 32, seed=3)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1]["bos"] == "window"
    assert not torch.equal(first[0], draw_windows(numbered, tiny_tokenizer(bos=True), 8, 32, seed=4)[0])
    single = draw_windows(numbered[:1], tiny_tokenizer(), 8, 32, seed=3)[0]
    assert torch.equal(single, calibration_windows(numbered[0], tiny_tokenizer(), 8, 32, seed=3))


def test_what_was_taken_of_rows_is_recorded():
    rows = {"rows": 5, "fields": {"text": 4}, "different": 4}
    _, record = draw_windows([Corpus("a", "all", ("abc" * 99,), rows)], tiny_tokenizer(), 2, 8, seed=0)
    assert record["corpora"][0].items() >= rows.items()


def test_a_text_without_a_window_is_refused():
    with pytest.raises(RequestError, match="3 texts cannot share 2 windows"):
        draw_windows(CORPORA, tiny_tokenizer(), 2, 8, seed=0)


def test_a_text_that_is_short_gives_what_it_has():
    short = Corpus("short", "all", ("b" * 40,))
    windows, record = draw_windows([CORPORA[0], short], tiny_tokenizer(), 20, 16, seed=0, fewer=True)
    assert [each["windows"] for each in record["corpora"]] == [10, 2]
    assert (windows[:6] == ord("b")).all(1).sum() == 1
    with pytest.raises(RequestError, match="short has 40 tokens"):
        draw_windows([CORPORA[0], short], tiny_tokenizer(), 20, 16, seed=0)
