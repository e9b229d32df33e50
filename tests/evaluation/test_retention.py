"""TCr of the published table, Sr, and the project's SrCr."""

from __future__ import annotations

import math

import pytest

from lmpress.evaluation import gain, sr, sr_from_perplexity, srcr, tcr


@pytest.mark.parametrize(
    ("percent", "bits", "expected"),
    [
        (0, 4, 75.0),
        (0, 3, 81.25),
        (25, 4, 81.25),
        (0, 2, 87.5),
        (50, 8, 75.0),
        (50, 4, 87.5),
        (25, 3, 85.94),
        (50, 3, 90.6),
    ],
)
def test_tcr_of_the_table(percent: float, bits: float, expected: float) -> None:
    assert 100 * tcr(percent / 100, bits) == pytest.approx(expected, abs=0.03)


def test_gain_and_srcr() -> None:
    assert gain(0, 16) == 0.0
    assert gain(0, 4) == 0.5  # log2(16/4)/4
    assert gain(0.25, 16) == 0.5  # sqrt(1/4)
    assert gain(0.25, 4) == 0.75
    assert gain(1, 16) == gain(0, 1) == 1.0
    assert srcr(0.8, 0.25, 4) == pytest.approx(0.6)


def test_retention_of_scores_and_of_perplexities() -> None:
    assert sr(30, 40) == 0.75
    assert sr_from_perplexity(20, 10) == 0.5
    assert sr_from_perplexity(math.inf, 10) == 0.0


def test_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, not 25"):
        tcr(25, 4)
    with pytest.raises(ValueError, match="at most 16, not 32"):
        gain(0.5, 32)
    with pytest.raises(ValueError, match="score is 0"):
        sr(1, 0)
    with pytest.raises(ValueError, match="above 0"):
        sr_from_perplexity(0, 10)
