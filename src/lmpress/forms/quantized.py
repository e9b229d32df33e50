"""`Quantized(codes, scale, zero)`: scale * (codes - zero), on a grid per tensor, channel or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import Form, dtype_name, flag, float_dtype, shape_of, whole
from lmpress.forms.packing import pack_codes, packed_width, unpack_codes


@dataclass(frozen=True, repr=False)
class Quantized(Form):
    """A matrix on a uniform grid: `scale * (codes - zero)`.

    Attributes:
        packed: the codes as stored: int8 (out, in) for 8 symmetric bits, else uint8
            (out, packed_width(in, bits)) of unsigned codes.
        scale: floating point, (1, 1) per tensor, (out, 1) per channel, (out, groups) per group.
        packed_zero: uint8 (1, packed_width(scale.numel(), bits)): the zero points, one a scale, packed as the
            codes are; None for a symmetric grid, whose zero is 2^(bits-1) in unsigned codes.
        bits: 2 to 8.
        columns: in_features.
    """

    packed: Tensor
    scale: Tensor
    packed_zero: Tensor | None
    bits: int
    columns: int
    kind = "quantized"

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Quantized:
        """From plain codes.

        Args:
            codes: integers (out, in): in [-2^(bits-1), 2^(bits-1)) if `zero` is None, else in [0, 2^bits).
            scale: (1, 1), (out, 1) or (out, groups), with groups a divisor of in.
            zero: integers of scale's shape in [0, 2^bits), or None for a symmetric grid.
            bits: 2 to 8.
        """
        rows, columns = codes.shape
        _check_scale(tuple(scale.shape), (rows, columns))
        if zero is None:
            low, high = -(1 << bits - 1), 1 << bits - 1
            if codes.numel() and (int(codes.min()) < low or int(codes.max()) >= high):
                raise ValueError(f"codes do not fit into {bits} signed bits")
            packed = codes.to(torch.int8) if bits == 8 else pack_codes(codes.to(torch.int64) - low, bits)
            return cls(packed.contiguous(), scale.contiguous(), None, bits, columns)
        if zero.shape != scale.shape:
            raise ValueError(f"zeros of shape {tuple(zero.shape)} for scales of {tuple(scale.shape)}")
        packed_zero = pack_codes(zero.reshape(1, -1), bits)
        return cls(pack_codes(codes, bits), scale.contiguous(), packed_zero, bits, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.columns

    @property
    def symmetric(self) -> bool:
        """Whether the grid is centred on zero, with no stored zero points."""
        return self.packed_zero is None

    @property
    def group_size(self) -> int:
        """Columns that share a scale; `columns` where the grid is per channel or per tensor."""
        return self.columns // self.scale.shape[1] if self.scale.shape[1] else self.columns

    @property
    def granularity(self) -> str:
        """`tensor`, `channel` or `group:SIZE`."""
        if self.scale.shape[1] > 1:
            return f"group:{self.group_size}"
        return "tensor" if self.scale.shape[0] == 1 and self.shape[0] != 1 else "channel"

    def zero(self) -> Tensor | None:
        """The zero points, uint8 of scale's shape; None for a symmetric grid."""
        if self.packed_zero is None:
            return None
        return unpack_codes(self.packed_zero, self.bits, self.scale.numel()).view(self.scale.shape)

    def codes(self) -> Tensor:
        """Plain codes (out, in): int8 around zero if symmetric, else uint8."""
        if self.packed_zero is not None:
            return unpack_codes(self.packed, self.bits, self.columns)
        if self.bits == 8:
            return self.packed
        unsigned = unpack_codes(self.packed, self.bits, self.columns)
        return unsigned.to(torch.int8) - (1 << self.bits - 1)

    def centered(self, dtype: torch.dtype) -> Tensor:
        """`codes - zero` (out, in), exact in any floating-point type (at most 9 signed bits)."""
        codes = self.codes().to(dtype)
        zero = self.zero()
        if zero is None:
            return codes
        rows, columns = self.shape
        if zero.shape[1] == 1:
            return codes - zero.to(dtype)
        groups = codes.view(rows, zero.shape[1], self.group_size) - zero.to(dtype)[:, :, None]
        return groups.view(rows, columns)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        codes, scale = self.centered(wide), self.scale.to(wide)
        if scale.shape[1] == 1:
            return (codes * scale).to(dtype)
        rows, columns = self.shape
        groups = codes.view(rows, scale.shape[1], self.group_size)
        return (groups * scale[:, :, None]).view(rows, columns).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale.shape[1] == 1:  # scaling the few outputs is cheaper than scaling the many weights
            return torch.nn.functional.linear(x, self.centered(x.dtype)) * self.scale[:, 0].to(x.dtype)
        return torch.nn.functional.linear(x, self.dense(x.dtype))

    def rows(self, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        scale = self.scale if self.scale.shape[0] == 1 else self.scale[flat]
        zero = self.zero()
        picked = replace(self, packed=self.packed[flat], scale=scale, packed_zero=None)
        if zero is not None:
            zero = zero if zero.shape[0] == 1 else zero[flat]
            picked = replace(picked, packed_zero=pack_codes(zero.reshape(1, -1), self.bits))
        return picked.dense().view(*index.shape, self.columns)

    def tensors(self) -> dict[str, Tensor]:
        # Eight-bit codes have the shape of the dense weight; stored with one more axis, they cannot be
        # taken for it by a loader that does not know this form.
        codes = self.packed.unsqueeze(-1) if self.bits == 8 else self.packed
        named = {"codes": codes, "scale": self.scale}
        return named if self.packed_zero is None else named | {"zero": self.packed_zero}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Quantized:
        zero = tensors["zero"] if self.packed_zero is not None else None
        codes = tensors["codes"].squeeze(-1) if self.bits == 8 else tensors["codes"]
        return replace(self, packed=codes, scale=tensors["scale"], packed_zero=zero)

    def describe(self) -> dict[str, Any]:
        return {
            "form": self.kind,
            "shape": list(self.shape),
            "bits": self.bits,
            "symmetric": self.symmetric,
            "scale_shape": list(self.scale.shape),
            "scale_dtype": dtype_name(self.scale.dtype),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Quantized:
        rows, columns = shape_of(description)
        bits, symmetric = whole(description, "bits"), flag(description, "symmetric")
        scale_shape = shape_of(description, "scale_shape")
        if not 2 <= bits <= 8:
            raise ValueError(f"codes have 2 to 8 bits, not {bits}")
        _check_scale(scale_shape, (rows, columns))
        scale = torch.empty(scale_shape, dtype=float_dtype(description["scale_dtype"]), device="meta")
        dtype = torch.int8 if symmetric and bits == 8 else torch.uint8
        packed = torch.empty(rows, packed_width(columns, bits), dtype=dtype, device="meta")
        width = packed_width(scale.numel(), bits)
        zero = None if symmetric else torch.empty(1, width, dtype=torch.uint8, device="meta")
        return cls(packed, scale, zero, bits, columns)

    @property
    def nominal_bits(self) -> float:
        return float(self.bits)

    @property
    def storage(self) -> str:
        return "row scales" if self.scale.shape[1] == 1 else "group scales"

    @property
    def formula(self) -> str:
        sign = "int" if self.symmetric else "uint"
        kind = self.granularity
        return f"{sign}{self.bits}" if kind == "channel" else f"{sign}{self.bits}/{kind}"


def _check_scale(scale: tuple[int, ...], codes: tuple[int, int]) -> None:
    rows, columns = codes
    if scale in {(1, 1), (rows, 1)}:
        return
    if len(scale) != 2 or scale[0] != rows or scale[1] < 1 or columns % scale[1]:
        raise ValueError(f"scales of shape {scale} do not fit codes of {codes}")
