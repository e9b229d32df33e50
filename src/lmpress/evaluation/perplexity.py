"""Perplexity, divergence and agreement of any number of models, in one pass over a text's windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmpress.errors import RequestError
from lmpress.evaluation.divergence import ReferenceChunk, Tally, add_chunk
from lmpress.evaluation.logits import ChunkedLogits, evaluating
from lmpress.progress import note, track

BATCH_TOKENS = 4096
CHUNK_LOGITS = 1 << 24
"""Logits that a chunk may have: 64 MB in float32."""


@dataclass(frozen=True)
class TextScore:
    """How a model does on a text.

    Attributes:
        tokens: predicted tokens: every token but the first of its window.
        loss: mean negative log-likelihood, nats a token.
        not_finite: predicted tokens at whose position the logits are not finite; with one of them the loss is
            NaN.
        kl: mean KL(reference || model), nats a token; None without a reference; NaN where the logits of
            either are not finite at any position.
        top1_agreement: share of positions where model and reference have the same most likely token; None and
            NaN as for `kl`.
        dtype: the dtype of the hidden states, which is the dtype that the model computes in.
    """

    tokens: int
    loss: float
    not_finite: int
    kl: float | None
    top1_agreement: float | None
    dtype: str

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf


def measure(
    models: Mapping[str, PreTrainedModel],
    windows: Sequence[Tensor],
    reference: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    chunk: int | None = None,
    description: str = "measuring",
) -> dict[str, TextScore]:
    """Score models on windows of a text, all in the same pass; the reference's logits are computed once.

    Args:
        models: loaded models by name. They may be on different devices.
        windows: token ids, each int64 (tokens,); a window's first token is context, the others are predicted.
        reference: the name of the model that the others are compared with, or None.
        batch_tokens: windows of equal length that follow each other run as one batch of up to so many tokens.
        chunk: positions whose logits are in memory at once; None for as many as make 64 MB a model.
        description: what the progress bar says.

    Returns:
        A score a model. A loss that is not a number stays one, and is told on standard error.

    Raises:
        RequestError: if there is nothing to predict, or a vocabulary does not fit the reference or the text.
    """
    if reference is not None and reference not in models:
        raise RequestError(f"the reference {reference!r} is none of the models: {', '.join(models)}")
    windows = [window for window in windows if window.numel() > 1]
    if not windows:
        raise RequestError("the evaluation text has no token to predict: it needs two tokens at least")
    tallies = {name: Tally() for name in models}
    batches = list(_batches(windows, batch_tokens))
    with evaluating(models):
        _check_tokens(models, windows)
        runners = {name: ChunkedLogits(model, windows[0]) for name, model in models.items()}
        _check_vocabularies(runners, reference)
        if chunk is None:
            chunk = max(1, CHUNK_LOGITS // max(runner.vocabulary for runner in runners.values()))
        dtypes: dict[str, str] = {}
        for ids in track(batches, description):
            _add_batch(tallies, runners, ids, reference, chunk, dtypes)
    return {name: _score(name, tally, reference is not None, dtypes[name]) for name, tally in tallies.items()}


def _batches(windows: Sequence[Tensor], batch_tokens: int) -> Iterator[Tensor]:
    """Windows of equal length that follow each other, stacked: (windows, tokens)."""
    batch: list[Tensor] = []
    for window in windows:
        full = batch and (len(batch) + 1) * window.numel() > batch_tokens
        if full or (batch and batch[0].numel() != window.numel()):
            yield torch.stack(batch)
            batch = []
        batch.append(window)
    yield torch.stack(batch)


def _add_batch(
    tallies: dict[str, Tally],
    runners: Mapping[str, ChunkedLogits],
    ids: Tensor,  # (windows, tokens)
    reference: str | None,
    chunk: int,
    dtypes: dict[str, str],
) -> None:
    states: dict[str, Tensor] = {}
    for name, runner in runners.items():
        hidden = runner.states(ids)
        dtypes[name] = str(hidden.dtype).removeprefix("torch.")
        states[name] = hidden[:, :-1].flatten(0, 1)  # (windows * (tokens - 1), width)
    targets = ids[:, 1:].flatten()
    order = [name for name in runners if name != reference]
    for start in range(0, targets.numel(), chunk):
        part = slice(start, start + chunk)
        shared = None
        if reference is not None:
            logits = runners[reference].logits(states[reference][part])
            shared = ReferenceChunk.of(logits)
            add_chunk(tallies[reference], logits, targets[part].to(logits.device), shared)
        for name in order:
            logits = runners[name].logits(states[name][part])
            there = None if shared is None else shared.to(logits.device)
            add_chunk(tallies[name], logits, targets[part].to(logits.device), there)


def _check_tokens(models: Mapping[str, PreTrainedModel], windows: Sequence[Tensor]) -> None:
    largest = max(int(window.max()) for window in windows)
    for name, model in models.items():
        vocabulary = model.get_input_embeddings().num_embeddings
        if largest >= vocabulary:
            raise RequestError(
                f"{name}: token {largest} of the text is outside its vocabulary of {vocabulary};"
                " the text was tokenised for another model"
            )


def _check_vocabularies(runners: Mapping[str, ChunkedLogits], reference: str | None) -> None:
    for name, runner in runners.items():
        if reference is not None and runner.vocabulary != runners[reference].vocabulary:
            raise RequestError(
                f"{name} has a vocabulary of {runner.vocabulary} tokens, the reference {reference} one of"
                f" {runners[reference].vocabulary}; compare models that share a tokenizer"
            )


def _score(name: str, tally: Tally, compared: bool, dtype: str) -> TextScore:
    loss = tally.loss / tally.tokens
    if not math.isfinite(loss):
        note(
            f"{name}: its loss is {loss}; the model gives logits that are not finite at "
            f"{tally.not_finite} of {tally.tokens} positions"
        )
    return TextScore(
        tokens=tally.tokens,
        loss=loss,
        not_finite=tally.not_finite,
        kl=tally.kl if compared else None,
        top1_agreement=tally.agreement if compared else None,
        dtype=dtype,
    )
