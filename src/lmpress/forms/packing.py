"""Codes of 2 to 8 bits in exactly that many bits: three bits take three bits.

A row of n codes is cut into eight runs of w = ceil(n / 8) codes. The codes at one place of the eight
runs form a word of 8 b bits, and byte k of that word stands in byte run k: the packed row is
(b, w) bytes. Packing and unpacking then read and write long contiguous runs only, with no
interleaving, which is what makes them fast in plain tensor operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RUNS = 8
"""Codes that share a word: eight codes of b bits are b whole bytes, for every b."""


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes of `bits` bits takes."""
    return columns if bits == 8 else bits * -(-columns // RUNS)


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
    width = -(-columns // RUNS)
    runs = torch.zeros(rows, RUNS * width, dtype=torch.int64, device=codes.device)
    runs[:, :columns] = codes
    runs = runs.view(rows, RUNS, width)
    word = torch.zeros(rows, width, dtype=torch.int64, device=codes.device)
    for i in range(RUNS):
        word |= runs[:, i] << (bits * i)
    packed = torch.stack([(word >> (8 * k)) & 0xFF for k in range(bits)], dim=1)  # (rows, bits, width)
    return packed.to(torch.uint8).reshape(rows, bits * width)


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
    width = -(-columns // RUNS)
    planes = packed.view(rows, bits, width)
    if columns % RUNS or out.dtype != torch.uint8 or not out.is_contiguous():
        whole = torch.empty(rows, RUNS * width, dtype=torch.uint8, device=packed.device)
        _unpack_runs(planes, bits, whole.view(rows, RUNS, width))
        return out.copy_(whole[:, :columns])
    _unpack_runs(planes, bits, out.view(rows, RUNS, width))
    return out


def _unpack_runs(planes: Tensor, bits: int, runs: Tensor) -> None:
    """Write the codes of `planes`, uint8 (rows, bits, width), to `runs`, uint8 (rows, RUNS, width)."""
    rows, _, width = planes.shape
    mask = (1 << bits) - 1
    repeats = math.gcd(RUNS, bits)  # the pattern of shifts repeats: do its repetitions in one step
    planes = planes.view(rows, repeats, bits // repeats, width)
    runs = runs.view(rows, repeats, RUNS // repeats, width)
    for i in range(RUNS // repeats):
        byte, shift = divmod(bits * i, 8)
        source, code = planes[:, :, byte], runs[:, :, i]
        if shift == 0:
            torch.bitwise_and(source, mask, out=code)
            continue
        torch.bitwise_right_shift(source, shift, out=code)
        if shift + bits > 8:  # the code straddles two bytes
            code.bitwise_or_(planes[:, :, byte + 1] << (8 - shift))
        if shift + bits != 8:  # otherwise the shift has left nothing but the code
            code.bitwise_and_(mask)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
