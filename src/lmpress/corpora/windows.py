"""Windows of tokens: at random places for calibration, one after the other for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lmpress.corpora.corpus import Corpus
from lmpress.errors import RequestError


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer's plain call puts BOS in front: the model was then trained with it there."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def context_of(config: Any) -> int | None:
    """How many tokens a model reads at once, by its transformers config; None where that tells nothing."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(context) if context else None


def check_context(config: Any, length: int, what: str, remedy: str) -> None:
    """Refuse windows of more tokens than the model reads at once.

    Args:
        what: the windows are, and
        remedy: what makes them shorter, for the message.

    Raises:
        RequestError: `length` is above the context.
    """
    context = context_of(config)
    if context is not None and length > context:
        raise RequestError(
            f"{what} of {length} tokens are longer than the model's context of {context}: {remedy}"
        )


def check_ids(windows: Iterable[Tensor], vocabulary: int, name: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        windows: token ids.
        vocabulary: rows of the embedding.
        name: of the text, for the message.

    Raises:
        RequestError: a token beyond the last row.
    """
    largest = max((int(window.max()) for window in windows if window.numel()), default=0)
    if largest >= vocabulary:
        raise RequestError(
            f"the tokenizer makes the token {largest} of {name}, and the model's embedding has {vocabulary}"
            " rows: put the model's own tokenizer beside it, or resize its embedding"
        )


def calibration_windows(
    corpus: Corpus, tokenizer: Any, samples: int, seq_len: int, seed: int, *, fewer: bool = False
) -> Tensor:
    """Windows at random, non-overlapping places of the documents, in random order.

    Documents are joined by EOS where the tokenizer has one, so a window may hold several short ones. A window
    starts with BOS, which counts among its `seq_len` tokens, only if the tokenizer's own call adds it.

    Args:
        fewer: where the text is too short, take as many windows as it has.

    Returns:
        int64 (samples, seq_len); the same seed gives the same windows.

    Raises:
        RequestError: if the text has too few tokens, or the tokenizer makes none of it.
    """
    if samples < 1 or seq_len < 2:
        raise RequestError(f"calibration takes at least 1 window of 2 tokens, not {samples} of {seq_len}")
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    length = seq_len - len(prefix)
    ids = _joined(corpus, tokenizer)
    if fewer:
        samples = min(samples, ids.numel() // length)
    slack = ids.numel() - samples * length
    if slack < 0:
        raise RequestError(
            f"{corpus.name} has {ids.numel()} tokens, and {samples} windows of {seq_len} take"
            f" {samples * length}: give a longer text, or lower `samples` or `seq_len`"
        )
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randint(slack + 1, (samples,), generator=generator).sort().values
    starts = gaps + length * torch.arange(samples)  # ascending, at least `length` apart
    starts = starts[torch.randperm(samples, generator=generator)]
    windows = ids[starts[:, None] + torch.arange(length)]  # (samples, length)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(samples, -1), windows], dim=1)


def evaluation_windows(
    corpus: Corpus, tokenizer: Any, window: int, max_tokens: int | None = None
) -> list[Tensor]:
    """The whole text in windows that follow one another, each token in one of them.

    Every window starts with BOS, which counts among its tokens, only if the tokenizer's own call adds it.
    The last window is shorter, and left out if it has a single token, which predicts nothing.

    Args:
        window: tokens in a window, at least 2.
        max_tokens: only so many tokens from the beginning of the text, BOS not counted.

    Returns:
        int64 (<= window,) each.

    Raises:
        RequestError: if the text has too few tokens for a single prediction, or the tokenizer makes none.
    """
    if window < 2 or (max_tokens is not None and max_tokens < 2):
        raise RequestError(f"a window has at least 2 tokens, not {window} of {max_tokens or 'all'}")
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids = torch.tensor(_encode(tokenizer, corpus.name, [corpus.text])[0][:max_tokens], dtype=torch.int64)
    start = torch.tensor(prefix, dtype=torch.int64)
    windows = [torch.cat([start, piece]) for piece in torch.split(ids, window - len(prefix))]
    windows = [piece for piece in windows if piece.numel() >= 2]
    if not windows:
        raise RequestError(f"{corpus.name} has {ids.numel()} tokens, too few to predict one: give more text")
    return windows


def _joined(corpus: Corpus, tokenizer: Any) -> Tensor:
    """The tokens of all documents, with EOS between them where there is one."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for place, document in enumerate(_encode(tokenizer, corpus.name, list(corpus.documents))):
        ids += eos * (place > 0) + document
    return torch.tensor(ids, dtype=torch.int64)


def _encode(tokenizer: Any, name: str, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, none added, and no warning that a text is longer than the model's context.

    Raises:
        RequestError: there are none, or most stand for what the tokenizer does not know.
    """
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    unknown: Any = getattr(tokenizer, "unk_token_id", None)
    count = sum(len(ids) for ids in encoded)
    if 2 * sum(ids.count(unknown) for ids in encoded) >= count:
        made = "mostly unknown tokens" if count else "no tokens"
        raise RequestError(
            f"the tokenizer makes {made} of {name}: put the model's own tokenizer (tokenizer.json) beside it"
        )
    return encoded
