"""What a form will take, by its outline, against the forms that methods make of such weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.forms import Dense, Form, LowRank
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.methods.wanda import WandaOptions, wanda
from lmpress.recipes import Leaf, LeafContext, Outline, Quantize, Sparsify
from lmpress.recipes.outline import factors
from tests.recipes.steps.data import WEIGHT, statistics

ROWS, COLUMNS = WEIGHT.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_floating_point(dtype: torch.dtype) -> None:
    assert Leaf(ROWS, COLUMNS).bytes(dtype.itemsize) == Dense(WEIGHT.to(dtype)).num_bytes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_codes(bits: int, granularity: str, symmetric: bool) -> None:
    for weight in (WEIGHT, WEIGHT * 1e-7):  # the second needs scales of four bytes
        options = RoundOptions(bits, granularity, symmetric)
        form: Any = round_to_nearest(weight, None, options).form
        size = form.scale.dtype.itemsize
        leaf = Leaf(ROWS, COLUMNS, bits=bits, granularity=granularity, symmetric=symmetric, scale_bytes=size)
        assert leaf.bytes(itemsize=2) == form.num_bytes


def half(form: Form) -> Form:
    return form.rewrite(lambda leaf: Dense(leaf.dense(torch.float16)) if isinstance(leaf, Dense) else leaf)


@pytest.mark.parametrize("per_row", [True, False])
def test_what_is_left_beside_a_bitmap(per_row: bool) -> None:
    options = WandaOptions(sparsity=0.25, per_row=per_row)
    form = half(wanda(WEIGHT, statistics(), options).form)
    leaf = Leaf(ROWS, COLUMNS, kept=ROWS * COLUMNS * 3 // 4, even=per_row)
    assert leaf.bytes(itemsize=2) == form.num_bytes


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_what_is_left_of_a_pattern(n: int, m: int) -> None:
    form = half(wanda(WEIGHT, statistics(), WandaOptions(pattern=f"{n}:{m}")).form)
    leaf = Leaf(ROWS, COLUMNS, kept=ROWS * COLUMNS * n // m, even=True, pattern=(n, m))
    assert leaf.bytes(itemsize=2) == form.num_bytes


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize(
    "how", [{"sparsity": 0.25}, {"pattern": "2:4"}, {"pattern": "2:4", "symmetric": False}]
)
def test_codes_of_what_is_left(how: dict[str, Any], granularity: str) -> None:
    if granularity == "tensor" and not how.get("symmetric", True):
        return
    step = Sparsify(bits=4, granularity=granularity, **how)
    outline = step.after(Outline((ROWS, COLUMNS), (Leaf(ROWS, COLUMNS),)))
    assert outline.exact
    form = step.rewrite(Dense(WEIGHT), statistics(), LeafContext(weight=WEIGHT)).form
    assert outline.bytes == form.num_bytes


def test_coded_bits_are_all_that_a_weight_takes() -> None:
    assert Leaf(8, 16, bits=4.25, coded=True).bytes(itemsize=2) == 8 * 16 * 4.25 / 8


def test_factors_are_no_wider_than_the_matrix() -> None:
    for rank in (3, 24, 99):
        inner = min(rank, 24)
        left, right = torch.ones(ROWS, inner).half(), torch.ones(inner, COLUMNS).half()
        product = LowRank(Dense(left), Dense(right))
        leaves = tuple(factors((ROWS, COLUMNS), rank))
        assert [(leaf.rows, leaf.columns) for leaf in leaves] == [product.left.shape, product.right.shape]
        assert Outline((ROWS, COLUMNS), leaves).bytes == product.num_bytes


def test_steps_follow_one_another() -> None:
    """Factors, and their codes: what a plan adds up step by step."""
    outline = Outline((ROWS, COLUMNS), tuple(factors((ROWS, COLUMNS), 8)))
    coded = Quantize(bits=4, granularity="group:8").after(outline)
    torch.manual_seed(0)
    product = LowRank(Dense(torch.randn(ROWS, 8)), Dense(torch.randn(8, COLUMNS)))
    form = Quantize(bits=4, granularity="group:8").rewrite(product, None, LeafContext()).form
    assert coded.bytes == form.num_bytes
    assert (
        Quantize(bits=8, granularity="name")
        .after(Outline((ROWS, COLUMNS), (Leaf(ROWS, COLUMNS),), granularity="tensor"))
        .bytes
        == round_to_nearest(WEIGHT, None, RoundOptions(8, "tensor")).form.num_bytes
    )
