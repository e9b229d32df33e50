"""Codes of 2 to 8 bits in exactly that many bits: three bits take three bits.

The fewest codes of b bits that fill whole bytes are r = 8 / gcd(b, 8), in k = b / gcd(b, 8) bytes: two codes
of four bits in one byte, eight codes of three bits in three. A row of n codes is cut into r runs of
w = ceil(n / r) codes. The codes at one place of the r runs form a word of k bytes, the code of the first run
in its lowest bits, and byte j of that word stands in byte run j: the packed row is (k, w) bytes. Packing and
unpacking then read and write runs that are as long as can be, with no interleaving, which is what makes them
fast in plain tensor operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def word(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest word that holds whole codes in whole bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes of `bits` bits takes."""
    runs, planes = word(bits)
    return planes * -(-columns // runs)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: (rows, columns), whole numbers in [0, 2^bits), any integer dtype.
        bits: 2 to 8.

    Returns:
        uint8 (rows, packed_width(columns, bits)).

    Raises:
        ValueError: if `bits` is out of range or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes do not fit into {bits} bits: {int(codes.min())}..{int(codes.max())}")
    if bits == 8:
        return codes.to(torch.uint8)
    rows, columns = codes.shape
    runs, planes = word(bits)
    width = -(-columns // runs)
    padded = torch.zeros(rows, runs * width, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, runs, width)
    words = torch.zeros(rows, width, dtype=torch.int64, device=codes.device)
    for i in range(runs):
        words |= padded[:, i] << (bits * i)
    packed = torch.stack([(words >> (8 * j)) & 0xFF for j in range(planes)], dim=1)  # (rows, planes, width)
    return packed.to(torch.uint8).reshape(rows, planes * width)


def unpack_codes(packed: Tensor, bits: int, columns: int, out: Tensor | None = None) -> Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: uint8 (rows, packed_width(columns, bits)).
        out: where to write, (rows, columns), any dtype; a new uint8 tensor by default.

    Returns:
        `out`, the codes in [0, 2^bits).
    """
    _check_bits(bits)
    rows = packed.shape[0]
    if packed.shape[1] != packed_width(columns, bits):
        raise ValueError(f"{columns} codes of {bits} bits do not take {packed.shape[1]} bytes a row")
    if out is None:
        out = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    if bits == 8:
        return out.copy_(packed)
    runs, planes = word(bits)
    width = -(-columns // runs)
    packed = packed.view(rows, planes, width)
    if columns % runs or out.dtype != torch.uint8 or not out.is_contiguous():
        whole = torch.empty(rows, runs * width, dtype=torch.uint8, device=packed.device)
        _unpack_runs(packed, bits, whole.view(rows, runs, width))
        return out.copy_(whole[:, :columns])
    _unpack_runs(packed, bits, out.view(rows, runs, width))
    return out


def _unpack_runs(packed: Tensor, bits: int, out: Tensor) -> None:
    """Write the codes of `packed`, uint8 (rows, planes, width), to `out`, uint8 (rows, runs, width)."""
    mask = (1 << bits) - 1
    for i in range(out.shape[1]):
        byte, shift = divmod(bits * i, 8)
        source, code = packed[:, byte], out[:, i]
        if shift == 0:
            torch.bitwise_and(source, mask, out=code)
            continue
        torch.bitwise_right_shift(source, shift, out=code)
        if shift + bits > 8:  # the code straddles two bytes
            code.bitwise_or_(packed[:, byte + 1] << (8 - shift))
        if shift + bits != 8:  # otherwise the shift has left nothing but the code
            code.bitwise_and_(mask)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
