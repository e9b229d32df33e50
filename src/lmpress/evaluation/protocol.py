"""What a perplexity was measured on: everything named, and nothing that the checkpoint has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lmpress.corpora import Corpus, check_context, context_of, ngram_overlap
from lmpress.errors import RequestError

DEFAULT_WINDOW = 2048
OVERLAP_TOKENS = 13
OVERLAP_ALLOWED = 0.01
"""Share of the evaluation text's 13-grams that may be in the calibration text: phrases, not the text."""

SPQ_ROWS = 100
SPQ_TOKENS = 512

Bos = Literal["none", "text", "window"]


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer here."""

    def __call__(self, text: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class TextProtocol:
    """Everything that a perplexity depends on beside the model.

    Attributes:
        corpus: the corpus's name.
        split: its split, such as "test".
        corpus_sha256: of the whole text.
        text_tokens: token ids in the windows, BOS included; each window's first is not predicted.
        window: tokens a window; the last one may be shorter.
        stride: tokens of the text from one window's start to the next's: windows do not overlap, so it is
            `window`, or one less where each window spends a token on BOS.
        bos: where a beginning-of-sequence token stands: nowhere ("none"), at the start of the "text", or at
            the start of each "window".
        label: "lmpress" for this project's protocol, "spq" for the paper's one window.
    """

    corpus: str
    split: str
    corpus_sha256: str
    text_tokens: int
    window: int
    stride: int
    bos: Bos
    label: str = "lmpress"

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        windows: Sequence[Tensor],
        window: int,
        bos_token_id: int | None,
        label: str = "lmpress",
    ) -> TextProtocol:
        """The protocol of `windows` of `corpus`, cut at `window` tokens without overlap."""
        bos = bos_of(windows, bos_token_id)
        return cls(
            corpus=corpus.name,
            split=corpus.split,
            corpus_sha256=corpus.sha256,
            text_tokens=sum(w.numel() for w in windows),
            window=window,
            stride=window - (bos == "window"),
            bos=bos,
            label=label,
        )

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


@dataclass(frozen=True)
class EvaluationText:
    """A text that is ready to be measured on."""

    protocol: TextProtocol
    windows: Sequence[Tensor]  # each int64 (tokens,)


def default_window(config: Any) -> int:
    """min(2048, the context of the model); 2048 where the config names none."""
    return min(DEFAULT_WINDOW, context_of(config) or DEFAULT_WINDOW)


def check_windows(text: EvaluationText, config: Any) -> None:
    """RequestError where a model of this config does not read as many tokens at once as the windows have."""
    longest = max(window.numel() for window in text.windows)
    spq = text.protocol.label == "spq"
    remedy = "the paper's protocol is for other models" if spq else "lower `window`"
    check_context(config, longest, f"windows of {text.protocol.corpus}", remedy)


def bos_of(windows: Sequence[Tensor], bos_token_id: int | None) -> Bos:
    """Where the windows have a beginning-of-sequence token; a single window counts as the text."""
    starts = [bos_token_id is not None and int(w[0]) == bos_token_id for w in windows if w.numel()]
    if not starts or not starts[0]:
        return "none"
    return "window" if len(starts) > 1 and all(starts) else "text"


def spq_text(corpus: Corpus, tokenizer: Tokenizer, bos_token_id: int | None = None) -> EvaluationText:
    """The one window that SPQ's published code measures (arXiv 2602.18420): not a comparable perplexity.

    The first 100 rows of the text, joined by newlines, tokenised with the tokenizer's own special tokens,
    and cut at 512 tokens; one forward.

    Raises:
        RequestError: if that gives fewer than two tokens.
    """
    rows = corpus.text.split("\n")[:SPQ_ROWS]
    ids = torch.tensor(tokenizer("\n".join(rows))["input_ids"][:SPQ_TOKENS], dtype=torch.int64)
    if ids.numel() < 2:
        raise RequestError(
            f"the first {SPQ_ROWS} rows of {corpus.name} have {ids.numel()} tokens: too few for a perplexity"
        )
    return EvaluationText(TextProtocol.of(corpus, [ids], SPQ_TOKENS, bos_token_id, label="spq"), [ids])


def refuse_seen_text(
    record: Sequence[Mapping[str, Any]],
    corpus: Corpus,
    windows: Sequence[Tensor],
    seen_ids: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Refuse to evaluate on text that calibration or recovery has seen.

    Args:
        record: the checkpoint's record of the texts it was made with; each has "name" and "sha256", and "ids"
            where the tokens themselves are kept, (samples, tokens) or (tokens,).
        corpus: the evaluation text.
        windows: its token ids.
        seen_ids: tokens that are at hand though the record does not hold them, by the record's "name".

    Returns:
        For each text whose tokens are at hand: at how many places of the evaluation text a 13-gram begins
        that is in it.

    Raises:
        RequestError: if a text of the record is the evaluation text by its hash, or holds more than 1 % of
            the evaluation text's 13-grams.
    """
    ids = (
        torch.cat([window.flatten() for window in windows]) if windows else torch.empty(0, dtype=torch.int64)
    )
    overlaps: dict[str, int] = {}
    for entry in record:
        name = str(entry.get("name", "a text"))
        if entry.get("sha256") == corpus.sha256:
            raise RequestError(
                f"{corpus.name} ({corpus.split}) was used to make this checkpoint, as {name}:"
                " evaluate on another text"
            )
        seen = (seen_ids or {}).get(name, entry.get("ids"))
        if seen is None:
            continue
        overlaps[name] = shared = ngram_overlap(torch.as_tensor(seen), ids, OVERLAP_TOKENS)
        positions = max(1, ids.numel() - OVERLAP_TOKENS + 1)
        if shared > OVERLAP_ALLOWED * positions:
            raise RequestError(
                f"{shared} of the {positions} {OVERLAP_TOKENS}-grams of {corpus.name} ({corpus.split}) are in"
                f" {name}, which was used to make this checkpoint: evaluate on another text"
            )
    return overlaps
