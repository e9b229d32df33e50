"""An error of output i counts by r_i^2: weighing rows is scaling them, and scaling the result back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmpress.forms import LowRank, Sparse, Sum
from lmpress.methods.alps import AlpsOptions, alps
from lmpress.methods.low_rank_correction import CorrectionOptions, quantized_factors
from lmpress.methods.result import Rewritten
from lmpress.methods.sparsegpt import SparseGptOptions, sparsegpt
from lmpress.methods.sslc import SslcOptions, sslc
from lmpress.methods.svd_llm import SvdLlmOptions, svd_llm
from lmpress.statistics import InputStatistics
from tests.methods.layers import layer, output_error

Method = Callable[[Tensor, InputStatistics, Tensor | None], Rewritten]

METHODS: dict[str, Method] = {
    "sparsegpt": lambda w, s, r: sparsegpt(w, s, SparseGptOptions(0.6, block=16), row_weights=r),
    "alps": lambda w, s, r: alps(w, s, AlpsOptions(0.6, iterations=30), row_weights=r),
    "sslc": lambda w, s, r: sslc(w, s, SslcOptions(0.6, iterations=20), row_weights=r),
    "sslc-searched": lambda w, s, r: sslc(w, s, SslcOptions(0.6, None, iterations=20), row_weights=r),
    "sslc-diagonal": lambda w, s, r: sslc(
        w, s, SslcOptions(0.6, metric="diagonal", protect=0.1, iterations=20), row_weights=r
    ),
    "sslc-low-rank": lambda w, s, r: sslc(w, s, SslcOptions(0.6, 1.0, iterations=20), row_weights=r),
    "svd_llm": lambda w, s, r: svd_llm(w, s, SvdLlmOptions(rank=5), row_weights=r),
}


def rows() -> Tensor:
    return torch.rand(24, generator=torch.Generator().manual_seed(8)) * 3 + 0.2


def supports(result: Rewritten) -> list[Tensor]:
    terms = result.form.terms if isinstance(result.form, Sum) else (result.form,)
    return [term.pattern.mask() for term in terms if isinstance(term, Sparse)]


@pytest.mark.parametrize("name", METHODS)
def test_weighing_rows_is_scaling_them(name: str) -> None:
    weight, _, statistics = layer(24, 32)
    scale = rows()[:, None]
    weighed = METHODS[name](weight, statistics, rows())
    scaled = METHODS[name](weight * scale, statistics, None)
    for one, other in zip(supports(weighed), supports(scaled), strict=True):
        assert float((one != other).float().mean()) < 0.01
    difference = weighed.form.dense() * scale - scaled.form.dense()
    assert float(difference.norm()) < 0.03 * float(scaled.form.dense().norm())
    even = METHODS[name](weight, statistics, None)
    assert float((weighed.form.dense() - even.form.dense()).norm()) > 0.1 * float(even.form.dense().norm())


def test_quantized_factors_see_weighed_rows() -> None:
    weight, x, statistics = layer(24, 32)
    weight[:12] *= 4  # loud rows that count little
    counts = torch.cat([torch.full((12,), 0.05), torch.ones(12)])
    options = CorrectionOptions(bits=6)
    weighed, _ = quantized_factors(weight, statistics, 4, options, counts)
    scaled, _ = quantized_factors(weight * counts[:, None], statistics, 4, options)
    even, _ = quantized_factors(weight, statistics, 4, options)
    assert isinstance(weighed, LowRank)
    torch.testing.assert_close(weighed.right.dense(), scaled.right.dense())
    errors = [
        output_error(weight * counts[:, None], form.dense() * counts[:, None], x) for form in (weighed, even)
    ]
    assert errors[0] < 0.8 * errors[1]
