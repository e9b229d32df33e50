"""Several texts in one order of windows, so that every prefix of it is a fair mix of them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmpress.corpora.corpus import Corpus
from lmpress.corpora.windows import adds_bos, calibration_windows
from lmpress.errors import RequestError


def draw_windows(
    corpora: Sequence[Corpus],
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    *,
    fewer: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Windows of several texts, each of which gives its share, evenly mixed: whoever looks at the first k
    windows sees all the texts.

    Args:
        fewer: a text that is too short gives what it has.

    Returns:
        int64 (samples, seq_len), the same for the same seed; and the record of the texts: `name`, `split` and
        `sha256` of all of them, `bos` (whether windows begin with it), and by text `corpora`.

    Raises:
        RequestError: a text has too few tokens, or there are more texts than windows.
    """
    if samples < len(corpora):
        raise RequestError(
            f"{len(corpora)} texts cannot share {samples} windows: raise `samples`, or name fewer"
        )
    parts = [
        calibration_windows(corpus, tokenizer, share, seq_len, seed + i, fewer=fewer)
        for i, (corpus, share) in enumerate(zip(corpora, shares(samples, len(corpora)), strict=True))
    ]
    named = [
        {"name": corpus.name, "split": corpus.split, "sha256": corpus.sha256, "windows": part.shape[0]}
        | dict(corpus.rows)
        for corpus, part in zip(corpora, parts, strict=True)
    ]
    joined = {key: ", ".join(str(each[key]) for each in named) for key in ("name", "split", "sha256")}
    bos = "window" if adds_bos(tokenizer) else "none"
    return mixed(parts), joined | {"bos": bos, "corpora": named}


def shares(total: int, parts: int) -> list[int]:
    """`total` shared out as evenly as can be; the first get one more."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def turns(counts: Sequence[int]) -> list[int]:
    """Whose turn it is at each of `sum(counts)` places, text i having `counts[i]` of them.

    Among the first k places text i has its share k counts[i] / sum(counts), rounded down or up: turn j of it
    comes no sooner than place floor(j / rate), and no later than before place ceil((j + 1) / rate). Taking
    the turn that has to come soonest keeps all of these (proportionate progress; Baruah, Cohen, Plaxton and
    Varvel, 1996).
    """
    total, taken, order = sum(counts), [0] * len(counts), []
    for place in range(total):
        open_to = [
            (-(-(taken[i] + 1) * total // count), i)
            for i, count in enumerate(counts)
            if taken[i] < count and taken[i] * total // count <= place
        ]
        _, turn = min(open_to)
        taken[turn] += 1
        order.append(turn)
    return order


def mixed(parts: Sequence[Tensor]) -> Tensor:
    """The windows of several texts, (samples, seq_len) each, in the order of their `turns`."""
    rows = [iter(part) for part in parts]
    order = turns([part.shape[0] for part in parts])
    return torch.stack([next(rows[i]) for i in order]) if order else torch.cat(list(parts))
