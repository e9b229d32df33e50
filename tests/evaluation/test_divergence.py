"""The tally of a chunk against the formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpress.evaluation.divergence import ReferenceChunk, Tally, add_chunk


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 9),
    vocabulary=st.integers(2, 40),
    scale=st.floats(0.01, 30),
    distance=st.floats(1e-3, 3),
    seed=st.integers(0, 2**16),
)
def test_against_the_formulas(
    positions: int, vocabulary: int, scale: float, distance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.randn(positions, vocabulary, generator=generator)
    b = a + distance * torch.randn(positions, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    tally = Tally()
    add_chunk(tally, b.clone(), targets, ReferenceChunk.of(a))

    loss = kl = 0.0
    for row in range(positions):
        p, q = a[row].double().softmax(0), b[row].double().log_softmax(0)
        loss -= float(q[targets[row]])
        kl += sum(float(p[v]) * (math.log(float(p[v])) - float(q[v])) for v in range(vocabulary) if p[v] > 0)
    assert tally.tokens == positions
    assert tally.loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert tally.divergence == pytest.approx(kl, rel=1e-3, abs=2e-6 * positions)
    assert tally.agreed == int((a.argmax(-1) == b.argmax(-1)).sum())


def test_tokens_that_are_ruled_out() -> None:
    ruled = torch.tensor([[1.0, 2.0, -math.inf]])
    tally = Tally()
    add_chunk(tally, ruled.clone(), torch.tensor([0]), ReferenceChunk.of(ruled))
    assert tally.divergence == 0.0
    impossible = Tally()
    add_chunk(
        impossible, ruled.clone(), torch.tensor([0]), ReferenceChunk.of(torch.tensor([[1.0, 2.0, 0.5]]))
    )
    assert impossible.divergence == math.inf  # the model rules out what the reference may say


NAN, INF = math.nan, math.inf
SOUND = [1.0, 2.0, 0.5]


@pytest.mark.parametrize("broken", [[NAN] * 3, [1.0, NAN, 0.5], [1.0, INF, 0.5], [INF] * 3, [-INF] * 3])
def test_what_is_not_finite_agrees_with_nothing(broken: list[float]) -> None:
    logits, sound = torch.tensor([broken, SOUND]), torch.tensor([SOUND, SOUND])
    for model, reference, own in ((logits, logits, 1), (logits, sound, 1), (sound, logits, 0)):
        tally = Tally()
        add_chunk(tally, model.clone(), torch.tensor([1, 1]), ReferenceChunk.of(reference))
        assert (tally.not_finite, tally.compared, tally.agreed) == (own, 1, 1)
        assert math.isnan(tally.kl)
        assert math.isnan(tally.agreement)


def test_a_token_that_both_rule_out_is_no_fault() -> None:
    ruled = torch.tensor([[1.0, 2.0, -INF]])
    tally = Tally()
    add_chunk(tally, ruled.clone(), torch.tensor([0]), ReferenceChunk.of(ruled))
    assert (tally.not_finite, tally.kl, tally.agreement) == (0, 0.0, 1.0)
