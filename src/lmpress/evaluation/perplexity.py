"""Perplexity, divergence and agreement of any number of models, in one pass over a text's windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmpress.errors import RequestError
from lmpress.evaluation.divergence import ReferenceChunk
from lmpress.evaluation.logits import ChunkedLogits, evaluating
from lmpress.evaluation.metrics import METRICS, Estimate, Seen, Tally
from lmpress.progress import note, track

BATCH_TOKENS = 4096
CHUNK_LOGITS = 1 << 24
"""Logits that a chunk may have: 64 MB in float32."""


@dataclass(frozen=True)
class TextScore:
    """How a model does on a text.

    Attributes:
        tokens: predicted tokens: every token but the first of its window.
        not_finite: predicted tokens at whose position the logits are not finite; with one of them the loss is
            NaN.
        estimates: means over the predicted tokens with their standard errors, by the keys of `METRICS`; those
            that compare are there with a reference only, and NaN where the logits of either are not finite at
            any position.
        dtype: the dtype of the hidden states, which is the dtype that the model computes in.
    """

    tokens: int
    not_finite: int
    estimates: Mapping[str, Estimate]
    dtype: str

    def mean(self, key: str) -> float | None:
        """The mean of a metric; None where it was not measured."""
        return self.estimates[key].mean if key in self.estimates else None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return self.estimates["loss"].mean

    @property
    def kl(self) -> float | None:
        """Mean KL(reference || model), nats a token."""
        return self.mean("kl")

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions where model and reference have the same most likely token."""
        return self.mean("top1_agreement")

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return _exp(self.loss)

    @property
    def change(self) -> Estimate | None:
        """Of the perplexity, relative to the reference's on the same tokens; None without one."""
        excess = self.estimates.get("excess_loss")
        if excess is None:
            return None
        ratio = _exp(excess.mean)
        return Estimate(ratio - 1, None if excess.error is None else ratio * excess.error)

    def to_json(self) -> dict[str, Any]:
        """All figures in one object, `errors` their standard errors."""
        told = {metric.key: self.mean(metric.key) for metric in METRICS}
        errors = {key: estimate.error for key, estimate in self.estimates.items()}
        sizes = {"tokens": self.tokens, "not_finite": self.not_finite, "dtype": self.dtype}
        return {"perplexity": self.perplexity, **told, **sizes, "errors": errors}


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700 else math.inf


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
    tallies = {name: Tally(len(windows)) for name in models}
    batches = list(_batches(windows, batch_tokens))
    with evaluating(models):
        _check_tokens(models, windows)
        runners = {name: ChunkedLogits(model, windows[0]) for name, model in models.items()}
        _check_vocabularies(runners, reference)
        if chunk is None:
            chunk = max(1, CHUNK_LOGITS // max(runner.vocabulary for runner in runners.values()))
        dtypes: dict[str, str] = {}
        done = 0
        for ids in track(batches, description):
            _add_batch(tallies, runners, ids, reference, chunk, dtypes, done)
            done += len(ids)
    return {name: _score(name, tally, dtypes[name]) for name, tally in tallies.items()}


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
    first: int,
) -> None:
    """Add a batch of windows, of which the first is the `first` of the text."""
    states: dict[str, Tensor] = {}
    for name, runner in runners.items():
        hidden = runner.states(ids)
        dtypes[name] = str(hidden.dtype).removeprefix("torch.")
        states[name] = hidden[:, :-1].flatten(0, 1)  # (windows * (tokens - 1), width)
    targets = ids[:, 1:].flatten()
    windows = (first + torch.arange(len(ids))).repeat_interleave(ids.shape[1] - 1)
    order = [name for name in runners if name != reference]
    for start in range(0, targets.numel(), chunk):
        part = slice(start, start + chunk)
        shared = None
        if reference is not None:
            logits = runners[reference].logits(states[reference][part])
            shared = ReferenceChunk.of(logits)
            tallies[reference].add(Seen(logits, targets[part].to(logits.device), shared), windows[part])
        for name in order:
            logits = runners[name].logits(states[name][part])
            there = None if shared is None else shared.to(logits.device)
            tallies[name].add(Seen(logits, targets[part].to(logits.device), there), windows[part])


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


def _score(name: str, tally: Tally, dtype: str) -> TextScore:
    score = TextScore(tally.tokens, tally.not_finite, tally.estimates(), dtype)
    if not math.isfinite(score.loss):
        note(
            f"{name}: its loss is {score.loss}; the model gives logits that are not finite at "
            f"{tally.not_finite} of {tally.tokens} positions"
        )
    return score
