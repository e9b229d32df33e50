"""Windows of tokens against what plain Python says about the bytes."""

from itertools import pairwise

import pytest
import torch

from lmpress.corpora import (
    Corpus,
    adds_bos,
    calibration_windows,
    check_context,
    check_ids,
    context_of,
    evaluation_windows,
)
from lmpress.errors import RequestError
from tests.tiny import BOS, EOS, TINY, tiny_text, tiny_tokenizer


def _corpus(*documents: str) -> Corpus:
    return Corpus("test", "all", documents)


def _numbered(count: int) -> Corpus:
    """A text whose every place is told by its bytes: 0000 0001 0002 ..."""
    return _corpus("".join(f"{i:04d}" for i in range(count)))


@pytest.mark.parametrize("bos", [False, True])
def test_bos_is_what_the_tokenizer_itself_adds(bos):
    assert adds_bos(tiny_tokenizer(bos)) is bos


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("samples", "seq_len"), [(7, 32), (1, 400), (25, 16)])
def test_calibration_windows_are_pieces_of_the_text_that_do_not_overlap(bos, samples, seq_len):
    corpus = _numbered(100)  # 400 tokens; the last two cases fill them to the brim without BOS
    text = corpus.text.encode()
    windows = calibration_windows(corpus, tiny_tokenizer(bos), samples, seq_len, seed=3)
    assert windows.shape == (samples, seq_len)
    assert windows.dtype == torch.int64
    starts = []
    for window in windows.tolist():
        if bos:
            assert window.pop(0) == BOS
        assert bytes(window) in text
        starts.append(text.find(bytes(window)))
    starts.sort()
    assert all(b - a >= seq_len - bos for a, b in pairwise(starts))


def test_the_seed_decides_and_reaches_the_whole_text():
    corpus, tokenizer = _numbered(1000), tiny_tokenizer()
    first = calibration_windows(corpus, tokenizer, 4, 64, seed=0)
    assert torch.equal(first, calibration_windows(corpus, tokenizer, 4, 64, seed=0))
    assert not torch.equal(first, calibration_windows(corpus, tokenizer, 4, 64, seed=1))
    text = corpus.text.encode()
    starts = torch.tensor(
        [
            text.find(bytes(window))
            for seed in range(60)
            for window in calibration_windows(corpus, tokenizer, 4, 64, seed).tolist()
        ]
    )
    share = torch.histc(starts.float(), bins=4, min=0, max=4000) / starts.numel()
    assert (share - 0.25).abs().max() < 0.1
    assert not torch.equal(starts.view(-1, 4).sort(1).values, starts.view(-1, 4))  # and the order is random


def test_documents_are_joined_by_eos():
    windows = calibration_windows(_corpus("abc", "de", "f"), tiny_tokenizer(), 1, 8, seed=0)
    assert windows[0].tolist() == [*b"abc", EOS, *b"de", EOS, *b"f"]
    without = tiny_tokenizer()
    without.eos_token = None
    assert calibration_windows(_corpus("abc", "de"), without, 1, 5, seed=0)[0].tolist() == [*b"abcde"]


def test_too_few_tokens_say_how_many_are_wanted():
    with pytest.raises(RequestError, match=r"400 tokens, and 26 windows of 16 take 416: .*samples.*seq_len"):
        calibration_windows(_numbered(100), tiny_tokenizer(), 26, 16, seed=0)
    with pytest.raises(RequestError, match="at least 1 window"):
        calibration_windows(_numbered(100), tiny_tokenizer(), 0, 16, seed=0)


@pytest.mark.parametrize("bos", [False, True])
def test_a_short_text_may_give_fewer(bos):
    for documents, expected in ((("0123456789",) * 40, (40 * 11 - 1) // (16 - bos)), (("short",), 0)):
        windows = calibration_windows(_corpus(*documents), tiny_tokenizer(bos), 99, 16, seed=0, fewer=True)
        assert windows.shape == (expected, 16)
    assert calibration_windows(_numbered(100), tiny_tokenizer(), 3, 16, 0, fewer=True).shape == (3, 16)


def test_windows_span_documents_that_are_shorter():
    windows = calibration_windows(_corpus(*["abc"] * 100), tiny_tokenizer(), 4, 64, seed=0)
    assert all(0 < (window == EOS).sum() <= 16 for window in windows)


@pytest.mark.parametrize(
    "draw", [lambda c, t: calibration_windows(c, t, 1, 4, 0), lambda c, t: evaluation_windows(c, t, 4)]
)
def test_a_tokenizer_that_does_not_know_the_text_is_refused(draw):
    tokenizer = tiny_tokenizer()
    for name, ids, made in (("none", [], "no tokens"), ("unknown", [7, 7, 65], "mostly unknown tokens")):

        class Other:
            bos_token_id, eos_token_id, unk_token_id = None, EOS, 7

            def __call__(self, texts, ids=ids, **options):
                return {"input_ids": [ids for _ in texts]}

        with pytest.raises(RequestError, match=f"makes {made} of {name}: .*tokenizer.json"):
            draw(Corpus(name, "all", ("some text",)), Other())
    assert len(draw(_corpus("some text"), tokenizer)) > 0


def test_tokens_without_an_embedding_are_refused():
    windows = [torch.tensor([3, 255]), torch.tensor([256, 4])]
    check_ids(windows, 257, "novel")
    with pytest.raises(RequestError, match="the token 256 of novel, and the model's embedding has 256 rows"):
        check_ids(windows, 256, "novel")


def test_windows_beyond_the_context_are_refused():
    config = TINY["llama"]()
    check_context(config, 256, "windows", "lower `seq_len`")
    with pytest.raises(RequestError, match=r"windows of 257 tokens .* context of 256: lower `seq_len`"):
        check_context(config, 257, "windows", "lower `seq_len`")
    config.max_position_embeddings = 0
    assert context_of(config) is None
    check_context(config, 257, "windows", "lower `seq_len`")


def test_a_megabyte_is_tokenized_once():
    calls = []
    tokenizer = tiny_tokenizer()

    class Counting:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, texts, **options):
            calls.append(sum(map(len, texts)) if isinstance(texts, list) else len(texts))
            return tokenizer(texts, **options)

    calibration_windows(_corpus(tiny_text(100_000)), Counting(), 64, 512, seed=0)
    assert sum(calls) < 100_100


@pytest.mark.parametrize("bos", [False, True])
def test_evaluation_windows_hold_every_token_once(bos):
    corpus = _corpus("Some text of", "two documents — and ünïcode.")
    windows = evaluation_windows(corpus, tiny_tokenizer(bos), window=8)
    assert [len(window) for window in windows[:-1]] == [8] * (len(windows) - 1)
    assert all(window.dtype == torch.int64 for window in windows)
    assert all((window[0] == BOS) == bos for window in windows)
    assert bytes(torch.cat([window[int(bos) :] for window in windows]).tolist()) == corpus.text.encode()


def test_a_last_window_of_one_token_predicts_nothing_and_goes():
    tokenizer = tiny_tokenizer()
    assert [w.tolist() for w in evaluation_windows(_corpus("abcdefghi"), tokenizer, 4)] == [
        [*b"abcd"],
        [*b"efgh"],
    ]
    assert [len(w) for w in evaluation_windows(_corpus("abcdefghij"), tokenizer, 4)] == [4, 4, 2]
    with_bos = evaluation_windows(_corpus("abcdefg"), tiny_tokenizer(bos=True), 4)  # BOS makes two of one
    assert [w.tolist() for w in with_bos] == [[BOS, *b"abc"], [BOS, *b"def"], [BOS, *b"g"]]


def test_evaluation_of_the_beginning_alone():
    windows = evaluation_windows(_corpus("abcdefghij"), tiny_tokenizer(), 4, max_tokens=6)
    assert [w.tolist() for w in windows] == [[*b"abcd"], [*b"ef"]]


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(RequestError, match="1 tokens, too few"):
        evaluation_windows(_corpus("a"), tiny_tokenizer(), 4)
    for window, max_tokens in ((1, None), (4, 1)):
        with pytest.raises(RequestError, match="at least 2 tokens"):
            evaluation_windows(_corpus("abc"), tiny_tokenizer(), window, max_tokens)


def test_a_text_longer_than_the_context_gives_no_warning(recwarn, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    evaluation_windows(_corpus(tiny_text(500)), tokenizer, 8)
    assert not caplog.records
    assert not recwarn.list
