"""The head over chunks of positions against the model's own logits."""

from __future__ import annotations

import pytest
import torch

from lmpress.evaluation.logits import ChunkedLogits
from tests.tiny import TINY, tiny_model


@pytest.mark.parametrize("name", TINY)
def test_chunks_are_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    if name.startswith("gemma"):
        model.config.final_logit_softcapping = 3.0  # low enough to bend these logits
    ids = torch.randint(250, (2, 33), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        own = model(input_ids=ids).logits
        runner = ChunkedLogits(model, ids[0])
        assert runner.chunked  # the probe found nothing odd: no fall-back
        states = runner.states(ids).flatten(0, 1)
        chunks = [runner.logits(states[i : i + 10]) for i in range(0, len(states), 10)]
    assert runner.vocabulary == 256
    torch.testing.assert_close(torch.cat(chunks), own.flatten(0, 1), rtol=1e-5, atol=1e-5)
    if name.startswith("gemma"):
        assert 2.5 < own.abs().max() <= 3.0


def test_logits_are_float32_whatever_the_model_computes_in() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    ids = torch.arange(20)
    with torch.no_grad():
        runner = ChunkedLogits(model, ids)
        states = runner.states(ids[None])[0]
        assert states.dtype == torch.bfloat16
        logits = runner.logits(states)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, model(input_ids=ids[None]).logits[0].float(), rtol=0, atol=0)
