"""n-grams in common against a set of tuples."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpress.corpora import fingerprint, ngram_overlap


def _brute(a, b, n):
    grams = {tuple(a[i : i + n]) for i in range(len(a) - n + 1)}
    return sum(tuple(b[i : i + n]) in grams for i in range(len(b) - n + 1))


@settings(deadline=None)
@given(
    st.lists(st.integers(-2, 3), max_size=60), st.lists(st.integers(-2, 3), max_size=60), st.integers(1, 14)
)
def test_overlap_is_what_sets_of_tuples_say(a, b, n):
    assert ngram_overlap(a, b, n) == _brute(a, b, n)


def test_a_shared_passage_is_counted_at_its_places():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 2**40, (5000,), generator=generator)
    b = torch.randint(0, 2**40, (4000,), generator=generator)
    assert ngram_overlap(a, b) == 0
    b[100:130] = a[2000:2030]
    b[3988:] = a[:12]  # one short of a 13-gram
    assert ngram_overlap(a, b) == 18
    assert ngram_overlap(a.int() % 50000, b.int() % 50000) == 18


def test_ngrams_do_not_cross_rows():
    rows = torch.arange(40).view(2, 20)
    assert ngram_overlap(rows, torch.arange(40)) == 16  # 8 in each row, none across
    assert ngram_overlap(torch.arange(40), rows) == 16
    assert ngram_overlap(torch.arange(40), torch.arange(40)) == 28


def test_no_ngram_is_no_overlap():
    assert ngram_overlap([], [1, 2, 3], 2) == 0
    assert ngram_overlap([1] * 12, [1] * 100) == 0
    assert ngram_overlap(torch.empty(0, 20), torch.arange(40)) == 0
    with pytest.raises(ValueError, match="at least one token"):
        ngram_overlap([1], [1], 0)


def test_fingerprint():
    ids = torch.tensor([[1, 2], [3, 500]])
    content = b"(2, 2)" + b"".join(i.to_bytes(8, "little") for i in (1, 2, 3, 500))
    assert fingerprint(ids) == hashlib.sha256(content).hexdigest()
    assert fingerprint(ids.int()) == fingerprint(ids) == fingerprint(ids.T.contiguous().T)
    others = [ids.T, ids.view(1, 4), ids.view(4), ids + 1]
    assert len({fingerprint(ids), *map(fingerprint, others)}) == 5
