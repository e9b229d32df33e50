"""A model's logits, a chunk of positions at a time.

With a vocabulary of 49k to 256k the logits of a window of 2048 tokens take 0.4 to 2 GB in float32. So the
decoder runs over the whole window, and the head over chunks of positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROBE = 8
"""Tokens that the chunked head is compared on with the model's own logits."""


class ChunkedLogits:
    """Gives a causal language model's logits for chunks of positions.

    The head is applied to the last hidden states, with Gemma's final soft cap where the config has one.
    A probe compares the outcome with the model's own logits; where they differ (a model that scales its
    logits in some other way) `states` are the model's own logits: slower and larger, never wrong.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        probe: some token ids to compare on, int64 (tokens,).
    """

    def __init__(self, model: PreTrainedModel, probe: Tensor) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model = inner
        self.device: torch.device = inner.get_input_embeddings().weight.device
        self.head = inner.get_output_embeddings()
        config = inner.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.chunked = self.head is not None
        ids = probe[:PROBE][None].to(self.device)
        own = inner(input_ids=ids, use_cache=False).logits[0].float()  # (probe, vocabulary)
        self.vocabulary = int(own.shape[-1])
        if self.chunked:
            tolerance = 1e-3 * float(own.abs().nan_to_num(0.0, posinf=0.0).max())
            chunked = self.logits(self.states(ids)[0])
            self.chunked = chunked.shape == own.shape and torch.allclose(
                chunked, own, rtol=1e-3, atol=tolerance, equal_nan=True
            )

    def states(self, ids: Tensor) -> Tensor:  # (batch, tokens) -> (batch, tokens, width)
        """What `logits` makes logits of, for all positions of `ids`."""
        ids = ids.to(self.device)
        if not self.chunked:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits
        states: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:  # (positions, width) -> (positions, vocabulary)
        """The logits in float32 for some positions of `states`, computed in the model's own dtype."""
        if not self.chunked:
            return states.float()
        logits: Tensor = self.head(states)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.float()


@contextmanager
def evaluating(models: Mapping[str, PreTrainedModel]) -> Iterator[None]:
    """The models in eval mode and without gradients, for as long as the context lasts."""
    training = {name: bool(model.training) for name, model in models.items()}
    try:
        with torch.no_grad():
            for model in models.values():
                model.eval()
            yield
    finally:
        for name, model in models.items():
            model.train(training[name])
