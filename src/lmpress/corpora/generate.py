"""The corpus `self`: calibration text that the model writes.

Source: LLM-QAT (arXiv 2305.17888, section 2.1) samples a model's own text, from a random first token, as
data for its quantization; sampling from the distribution beats taking the likeliest token. Nothing needs to
be downloaded, and the text is what the model was trained on as the model remembers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmpress.corpora.windows import adds_bos, check_context, check_ids
from lmpress.errors import LmpressError, RequestError
from lmpress.progress import track


def generate_text(
    model: Any,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> Tensor:
    """Sequences sampled token by token from the model's full distribution.

    A sequence starts from BOS if the tokenizer's own call adds it, else from a random token that is none of
    the special ones. After EOS it goes on with what the model writes next.

    Every place of every sequence has its own random number, drawn beforehand from `seed`: the batch size
    changes the text by rounding alone.

    Args:
        model: a causal language model of transformers; it is put into eval mode.
        batch_size: sequences written at once. On a CPU 32 write twice as fast as 8; each holds its keys and
            values for `seq_len` tokens (SmolLM2-135M: 24 MB for 512 tokens).
        temperature: logits are divided by it; above 0.

    Returns:
        int64 (samples, seq_len), on the CPU.

    Raises:
        RequestError: if `seq_len` is longer than the model's context, or the tokenizer is not the model's.
        LmpressError: if the model's logits are not finite.
    """
    check_context(model.config, seq_len, "texts", "lower `seq_len`")
    if samples < 1 or seq_len < 2 or batch_size < 1 or temperature <= 0:
        raise RequestError(
            "samples, batch_size and temperature are above 0 and seq_len is at least 2, not"
            f" {samples}, {batch_size}, {temperature} and {seq_len}"
        )
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(samples, seq_len, generator=generator, dtype=torch.float64)
    ids = torch.empty(samples, seq_len, dtype=torch.int64)
    known = min(len(tokenizer), model.config.vocab_size)  # rows beyond the tokenizer are padding
    ids[:, 0] = _first_tokens(tokenizer, known, chance[:, 0])
    check_ids([ids[:, 0]], model.config.vocab_size, "a text that it begins")
    model.eval()
    batches = list(zip(torch.split(ids, batch_size), torch.split(chance, batch_size), strict=True))
    steps = (step for batch in batches for step in _write(model, *batch, known, temperature))
    for _ in track(steps, "the model writes its calibration text", total=len(batches) * (seq_len - 1)):
        pass
    return ids


def _first_tokens(tokenizer: Any, known: int, chance: Tensor) -> Tensor:
    """BOS for all, or one ordinary token below `known` for each number in [0, 1).

    Raises:
        RequestError: all tokens are special: the tokenizer is an empty one, or another model's.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(known) if token not in special])
    if not ordinary.numel():
        raise RequestError(
            "the tokenizer has no tokens but special ones: put the model's own (tokenizer.json) beside it"
        )
    if adds_bos(tokenizer):
        return torch.full(chance.shape, tokenizer.bos_token_id, dtype=torch.int64)
    return ordinary[(chance * ordinary.numel()).long()]


def _write(model: Any, ids: Tensor, chance: Tensor, known: int, temperature: float) -> Iterator[None]:
    """Fill the columns of `ids` (batch, length) from the second on, one a step."""
    cache = None
    device = model.get_input_embeddings().weight.device
    for place in range(1, ids.shape[1]):
        with torch.no_grad():
            output = model(
                input_ids=ids[:, place - 1 : place].to(device), past_key_values=cache, use_cache=True
            )
        cache = output.past_key_values
        logits = output.logits[:, -1, :known].double() / temperature
        ids[:, place] = _pick(logits, chance[:, place])
        yield


def _pick(logits: Tensor, chance: Tensor) -> Tensor:
    """The token at which the cumulated probability passes `chance` in [0, 1), for each row."""
    cumulated = logits.softmax(dim=-1).cumsum(dim=-1)  # (batch, vocabulary)
    if not bool(torch.isfinite(cumulated[:, -1]).all()):
        raise LmpressError("the model's logits are not finite: a weight is broken, so it cannot write text")
    # Scaled by the last value, which rounding may leave below 1; `right` never picks a probability of 0.
    target = chance.to(cumulated.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_max(logits.shape[1] - 1).cpu()
