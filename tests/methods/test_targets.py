"""The target that a method hands on: what later steps have to fit to, so that they do not undo a move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmpress.methods.alps import AlpsOptions, alps
from lmpress.methods.entropy_quantization import EntropyOptions, entropy_quantize
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.low_rank_correction import CorrectionOptions, low_rank_correction
from lmpress.methods.result import Rewritten
from lmpress.methods.sparsegpt import SparseGptOptions, sparsegpt
from lmpress.methods.sslc import SslcOptions, sslc
from lmpress.methods.svd_llm import SvdLlmOptions, svd_llm
from lmpress.statistics import InputStatistics
from tests.methods.layers import correlated_inputs, layer, statistics_of

Method = Callable[[Tensor, InputStatistics, Tensor | None], Rewritten]
AMOUNT = 0.7

METHODS: dict[str, Method] = {
    "gptq": lambda w, s, c: gptq(w, s, GptqOptions(3, "channel", damping=1e-6, asymmetry=AMOUNT), c),
    "entropy": lambda w, s, c: entropy_quantize(
        w, s, 0.2, EntropyOptions(damping=1e-6, asymmetry=AMOUNT), cross=c
    ),
    "sparsegpt": lambda w, s, c: sparsegpt(w, s, SparseGptOptions(damping=1e-6, asymmetry=AMOUNT), c),
    "joint": lambda w, s, c: sparsegpt(
        w, s, SparseGptOptions(sparsity=0.25, bits=4, damping=1e-6, asymmetry=AMOUNT), c
    ),
    "alps": lambda w, s, c: alps(w, s, AlpsOptions(damping=1e-6, iterations=30, asymmetry=AMOUNT), c),
    "sslc": lambda w, s, c: sslc(w, s, SslcOptions(damping=1e-6, iterations=20, asymmetry=AMOUNT), c),
    "sslc-diagonal": lambda w, s, c: sslc(
        w, s, SslcOptions(metric="diagonal", damping=1e-6, iterations=20, asymmetry=AMOUNT), c
    ),
    "svd_llm": lambda w, s, c: svd_llm(w, s, SvdLlmOptions(rank=8, damping=1e-6, update=AMOUNT), c),
}


def strayed() -> tuple[Tensor, Tensor, Tensor, InputStatistics, Tensor]:
    """A weight (24, 32), inputs x, what x should have been, the statistics of x, and C."""
    weight, x, _ = layer(24, 32, tokens=800)
    original = x + 0.4 * correlated_inputs(800, 32, seed=9) + 0.3 * x.roll(1, 1)
    return weight, x, original, statistics_of(x), (original - x).T @ x / len(x)


@pytest.mark.parametrize("name", METHODS)
def test_the_target_is_the_moved_weight(name: str) -> None:
    weight, x, original, statistics, cross = strayed()
    assert METHODS[name](weight, statistics, None).target is None
    target = METHODS[name](weight, statistics, cross).target
    assert target is not None
    wanted = (x + AMOUNT * (original - x)).double() @ weight.double().T  # linear in the amount
    expected = torch.linalg.lstsq(x.double(), wanted).solution.T
    moved = expected - weight
    assert float((target - expected).norm()) < 1e-2 * float(moved.norm())


@pytest.mark.parametrize("name", METHODS)
def test_a_correction_towards_the_target_keeps_the_move(name: str) -> None:
    weight, x, original, statistics, cross = strayed()
    result = METHODS[name](weight, statistics, cross)
    assert result.target is not None

    def error(towards: Tensor) -> float:
        form = low_rank_correction(towards, result.form, statistics, CorrectionOptions(rank=12)).form
        return float((original @ weight.T - x @ form.dense().T).square().mean())

    assert error(result.target) < 0.8 * error(weight)
