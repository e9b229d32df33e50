"""`Dense`: how it is stored and what it is called."""

from __future__ import annotations

import pytest
import torch

from lmpress.forms import Dense, in_storage


@pytest.mark.parametrize(
    ("largest", "dtype", "expected"),
    [
        (1.0, torch.float16, torch.float16),
        (-65504.0, torch.float16, torch.float16),
        (65536.0, torch.float16, torch.bfloat16),
        (-1e6, torch.float16, torch.bfloat16),
        (1e6, torch.bfloat16, torch.bfloat16),
        (1e6, torch.float32, torch.float32),
    ],
)
def test_what_overflows_float16_is_stored_in_bfloat16(
    largest: float, dtype: torch.dtype, expected: torch.dtype
) -> None:
    weight = torch.tensor([[0.5, largest], [1.0, -2.0]], dtype=torch.float64)
    stored = in_storage(weight, dtype)
    assert stored.dtype == expected
    assert torch.equal(stored, weight.to(expected))
    assert bool(stored.isfinite().all())


def test_nothing_is_stored_as_it_was_asked_for() -> None:
    assert in_storage(torch.zeros(0, 4), torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("dtype", "formula"),
    [
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.float32, "fp32"),
        (torch.float64, "float64"),
    ],
)
def test_its_name(dtype: torch.dtype, formula: str) -> None:
    form = Dense(torch.zeros(2, 3, dtype=dtype))
    assert form.formula == formula
    assert repr(form) == f"{formula}[2x3]"
    assert form.storage == "dense"
    assert form.plain is form.weight
