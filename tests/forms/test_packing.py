"""Packing against a brute-force reference that moves single bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpress.forms import pack_codes, packed_width, unpack_codes


def pack_by_bits(row: list[int], bits: int) -> list[int]:
    """The layout of the module's docstring, one bit at a time."""
    if bits == 8:
        return row
    runs = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8}[bits]
    width = -(-len(row) // runs)
    out = [0] * (bits * runs // 8 * width)
    for place in range(width):
        for run in range(runs):
            at = run * width + place
            code = row[at] if at < len(row) else 0
            for bit in range(bits):
                byte, shift = divmod(bits * run + bit, 8)
                out[byte * width + place] |= (code >> bit & 1) << shift
    return out


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(2, 8), st.integers(0, 4), st.integers(0, 40))
def test_pack_and_unpack(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    code = st.integers(0, 2**bits - 1)
    codes = [data.draw(st.lists(code, min_size=columns, max_size=columns)) for _ in range(rows)]
    plain = torch.tensor(codes, dtype=torch.int32).reshape(rows, columns)
    packed = pack_codes(plain, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [pack_by_bits(row, bits) for row in codes]
    assert torch.equal(unpack_codes(packed, bits, columns), plain.to(torch.uint8))
    out = torch.full((rows, columns), -1.0)
    assert unpack_codes(packed, bits, columns, out) is out
    assert torch.equal(out, plain.float())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [8, 64, 4096])
def test_b_bits_take_b_bits(bits: int, columns: int) -> None:
    packed = pack_codes(torch.zeros(3, columns, dtype=torch.int8), bits)
    assert packed.numel() * 8 == 3 * columns * bits
    assert packed.shape[1] == packed_width(columns, bits)


@pytest.mark.parametrize(("bits", "word"), [(2, 1), (3, 3), (4, 1), (5, 5), (6, 3), (7, 7), (8, 1)])
@pytest.mark.parametrize("columns", range(1, 25))
def test_padding_is_below_a_word(columns: int, bits: int, word: int) -> None:
    assert 0 <= packed_width(columns, bits) * 8 - bits * columns < 8 * word


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [([[4]], 2, "2 bits"), ([[-1]], 4, "4 bits"), ([[0]], 1, "2 to 8"), ([[0]], 9, "2 to 8")],
)
def test_what_does_not_fit_is_refused(codes: list[list[int]], bits: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_codes(torch.tensor(codes), bits)


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes a row"):
        unpack_codes(torch.zeros(2, 5, dtype=torch.uint8), 3, 9)
