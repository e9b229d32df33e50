"""`Quantized`: what it stores, what it is called, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from lmpress.forms import Quantized


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("scale", "granularity", "group", "formula"),
    [
        (ones(1, 1), "tensor", 8, "int4/tensor"),
        (ones(3, 1), "channel", 8, "int4"),
        (ones(3, 2), "group:4", 4, "int4/group:4"),
    ],
)
def test_granularity_is_told_by_the_scales(
    scale: torch.Tensor, granularity: str, group: int, formula: str
) -> None:
    form = Quantized.from_codes(torch.zeros(3, 8, dtype=torch.int8), scale, None, 4)
    assert (form.granularity, form.group_size, form.formula) == (granularity, group, formula)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_zeros_come_back(bits: int, symmetric: bool) -> None:
    low = -(2 ** (bits - 1)) if symmetric else 0
    codes = (torch.arange(3 * 12).view(3, 12) % 2**bits) + low
    zero = None if symmetric else torch.arange(6).view(3, 2) % 2**bits
    form = Quantized.from_codes(codes, ones(3, 2), zero, bits)
    assert torch.equal(form.codes().long(), codes)
    assert form.symmetric is symmetric
    if zero is None:
        assert form.zero() is None
    else:
        stored = form.zero()
        assert stored is not None
        assert torch.equal(stored.long(), zero)


def test_bytes_of_the_usual_grids() -> None:
    codes = torch.zeros(64, 128, dtype=torch.int8)
    int8 = Quantized.from_codes(codes, ones(64, 1), None, 8)
    assert int8.num_bytes == 64 * 128 + 64 * 2
    assert int8.packed.dtype == torch.int8
    int4 = Quantized.from_codes(codes, ones(64, 2), None, 4)
    assert int4.num_bytes == 64 * 128 // 2 + 128 * 2
    uint4 = Quantized.from_codes(codes, ones(64, 2), torch.zeros(64, 2, dtype=torch.uint8), 4)
    assert uint4.num_bytes == int4.num_bytes + 128 // 2
    assert uint4.bits_per_weight == pytest.approx(4 + (16 + 4) / 64)


@pytest.mark.parametrize("scale", [(2, 1), (3, 3), (3, 0), (1, 2), (4, 2)])
def test_scales_that_do_not_fit_are_refused(scale: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Quantized.from_codes(torch.zeros(3, 8, dtype=torch.int8), ones(*scale), None, 4)


@pytest.mark.parametrize(("code", "bits"), [(8, 4), (-9, 4), (128, 8), (-129, 8)])
def test_codes_that_do_not_fit_are_refused(code: int, bits: int) -> None:
    with pytest.raises(ValueError, match="signed bits"):
        Quantized.from_codes(torch.tensor([[code]]), ones(1, 1), None, bits)


def test_zeros_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="zeros of shape"):
        Quantized.from_codes(torch.zeros(3, 8, dtype=torch.int8), ones(3, 2), torch.zeros(3, 1), 4)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        Quantized.from_codes(torch.zeros(3, 8, dtype=torch.int8), ones(3, 1), None, bits)


@pytest.mark.parametrize(
    ("scale", "storage"),
    [((1, 1), "row scales"), ((4, 1), "row scales"), ((4, 2), "group scales"), ((1, 2), "group scales")],
)
def test_kernels_are_told_how_scales_lie(scale: tuple[int, int], storage: str) -> None:
    codes = torch.zeros(4 if scale != (1, 2) else 1, 8, dtype=torch.int8)
    assert Quantized.from_codes(codes, torch.ones(scale), None, 4).storage == storage
