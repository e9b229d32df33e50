"""A merged update keeps everything of the grid that it is merged into."""

from __future__ import annotations

import pytest
import torch

from lmpress.forms import Dense, LowRank, Quantized, Sum
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.recovery import merged

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 32, generator=GENERATOR)
UPDATE = 0.1 * torch.randn(24, 2, generator=GENERATOR), torch.randn(2, 32, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_merging_keeps_bits_granularity_zeros_and_the_dtype_of_scales(
    dtype: torch.dtype, granularity: str, symmetric: bool
) -> None:
    options = RoundOptions(4, granularity, symmetric, scale_dtype=dtype)
    before = round_to_nearest(WEIGHT, None, options).form
    for form, whole in ((before, WEIGHT), (Sum((before, Dense(WEIGHT))), 2 * WEIGHT)):
        after = merged(form, *UPDATE)
        assert after.describe() == form.describe()
        assert after.num_bytes == form.num_bytes
        wanted = whole + UPDATE[0] @ UPDATE[1]
        assert float((after.dense() - wanted).norm()) < 0.2 * float(wanted.norm())
        first = after.terms[0] if isinstance(after, Sum) else after
        assert isinstance(first, Quantized)
        assert first.scale.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_keep_their_types(dtype: torch.dtype) -> None:
    left = round_to_nearest(WEIGHT[:, :6], None, RoundOptions(8, scale_dtype=torch.float32)).form
    form = LowRank(left, Dense(WEIGHT[:6].to(dtype)))
    after = merged(form, *UPDATE)
    assert after.describe() == form.describe()
