"""The figures of a chunk against the formulas, in float64; means and their errors against the windows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpress.evaluation.divergence import ReferenceChunk
from lmpress.evaluation.metrics import METRICS, Estimate, Seen, Tally

NAN, INF = math.nan, math.inf
SOUND = [1.0, 2.0, 0.5]


def of_one_window(logits: Tensor, targets: Tensor, reference: Tensor) -> tuple[Tally, dict[str, Estimate]]:
    tally = Tally(1)
    seen = Seen(logits.clone(), targets, ReferenceChunk.of(reference))
    tally.add(seen, torch.zeros(len(targets), dtype=torch.int64))
    return tally, tally.estimates()


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
    tally, found = of_one_window(b, targets, a)

    loss = kl = excess = 0.0
    for row in range(positions):
        p, q = a[row].double().softmax(0), b[row].double().log_softmax(0)
        loss -= float(q[targets[row]])
        excess += float(a[row].double().log_softmax(0)[targets[row]] - q[targets[row]])
        kl += sum(float(p[v]) * (math.log(float(p[v])) - float(q[v])) for v in range(vocabulary) if p[v] > 0)
    assert tally.tokens == positions
    assert set(found) == {metric.key for metric in METRICS}
    assert found["loss"].mean == pytest.approx(loss / positions, rel=1e-5, abs=1e-5)
    assert found["excess_loss"].mean == pytest.approx(excess / positions, rel=1e-4, abs=2e-5)
    assert found["kl"].mean == pytest.approx(kl / positions, rel=1e-3, abs=2e-6)
    agreed = int((a.argmax(-1) == b.argmax(-1)).sum())
    assert found["top1_agreement"].mean == pytest.approx(agreed / positions)


def test_errors_are_those_of_the_windows() -> None:
    """Against the ratio estimator of clusters, written out; windows of different lengths, in two chunks."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 9, 2, 7]
    windows = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logits = torch.randn(sum(lengths), 11, generator=generator)
    other = logits + torch.randn(sum(lengths), 11, generator=generator)
    targets = torch.randint(11, (sum(lengths),), generator=generator)
    tally = Tally(4)
    for part in (slice(0, 8), slice(8, None)):
        tally.add(Seen(other[part], targets[part], ReferenceChunk.of(logits[part])), windows[part])
    found = tally.estimates()
    each = -other.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    paired = each + logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    for key, values in (("loss", each), ("excess_loss", paired)):
        mean = float(values.mean())
        strayed = [float((values[windows == w] - mean).sum()) ** 2 for w in range(4)]
        assert found[key].mean == pytest.approx(mean, rel=1e-5)
        assert found[key].error == pytest.approx(math.sqrt(4 / 3 * sum(strayed)) / 23, rel=1e-4)
    assert of_one_window(other, targets, logits)[1]["loss"].error is None


def test_without_a_reference_nothing_is_compared() -> None:
    tally = Tally(1)
    tally.add(Seen(torch.tensor([SOUND]), torch.tensor([0])), torch.tensor([0]))
    assert set(tally.estimates()) == {metric.key for metric in METRICS if not metric.compares}


def test_tokens_that_are_ruled_out() -> None:
    ruled, target = torch.tensor([[1.0, 2.0, -INF]]), torch.tensor([0])
    tally, found = of_one_window(ruled, target, ruled)
    assert (tally.not_finite, found["kl"].mean, found["top1_agreement"].mean) == (0, 0.0, 1.0)
    # the model rules out what the reference may say
    assert of_one_window(ruled, target, torch.tensor([SOUND]))[1]["kl"].mean == INF


@pytest.mark.parametrize("broken", [[NAN] * 3, [1.0, NAN, 0.5], [1.0, INF, 0.5], [INF] * 3, [-INF] * 3])
def test_what_is_not_finite_agrees_with_nothing(broken: list[float]) -> None:
    logits, sound = torch.tensor([broken, SOUND]), torch.tensor([SOUND, SOUND])
    for model, reference, own in ((logits, logits, 1), (logits, sound, 1), (sound, logits, 0)):
        tally, found = of_one_window(model, torch.tensor([1, 1]), reference)
        assert tally.not_finite == own
        assert math.isnan(found["kl"].mean)
        assert math.isnan(found["top1_agreement"].mean)
