"""Which entries of a matrix are kept: a bitmap, or n of every m, stored at its true cost.

A bitmap takes one bit an entry. An n:m pattern (n kept of every m in a row) takes ceil(log2 C(m, n)) bits a
group of m: the rank of its subset among all subsets of that size. 2:4 takes 3 bits instead of 4, 4:8 takes 7
instead of 8, 6:8 takes 5, 1:4 takes 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from lmpress.forms.base import whole

MAX_GROUP = 16
"""The largest m of an n:m pattern: the table of subsets stays below 13000 rows."""


@dataclass(frozen=True)
class Pattern(ABC):
    """The kept entries of a matrix (out, in), in row-major order.

    Attributes:
        packed: uint8 (out, bytes of a row).
        columns: in_features.
    """

    packed: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.packed.shape[0], self.columns

    @property
    @abstractmethod
    def kept(self) -> int:
        """Entries that are kept."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for tables: `2:4`, or the share kept."""

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m) where n of every m neighbours are kept; None where nothing is regular."""
        return None

    @abstractmethod
    def mask(self) -> Tensor:
        """bool (out, in), true where an entry is kept."""

    def spread(self, values: Tensor) -> Tensor:
        """Kept values in row-major order, any shape, -> (out, in) with zeros elsewhere; differentiable."""
        zeros = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter(self.mask(), values)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What rebuilds the pattern on the meta device."""

    @abstractmethod
    def check(self) -> None:
        """ValueError where the bytes tell of other entries than `kept` many, or of none that there are."""

    def with_packed(self, packed: Tensor) -> Pattern:
        """The same pattern over another tensor (moved or loaded)."""
        return replace(self, packed=packed)

    @staticmethod
    def from_description(description: Mapping[str, Any], shape: tuple[int, int]) -> Pattern:
        """An empty pattern (meta device) of a matrix of shape `shape`."""
        if description["kind"] == "bitmap":
            width = -(-shape[1] // 8)
            packed = torch.empty(shape[0], width, dtype=torch.uint8, device="meta")
            return Bitmap(packed, shape[1], whole(description, "kept", shape[0] * shape[1]))
        if description["kind"] == "n:m":
            n, m = whole(description, "n", MAX_GROUP), whole(description, "m", MAX_GROUP)
            _check_group(n, m, shape[1])
            width = index_bits(n, m) * -(-(shape[1] // m) // 8)
            packed = torch.empty(shape[0], width, dtype=torch.uint8, device="meta")
            return NofM(packed, shape[1], n, m)
        raise ValueError(f"unknown pattern {description['kind']!r}; known: bitmap, n:m")


@dataclass(frozen=True)
class Bitmap(Pattern):
    """One bit an entry: column j of a row is bit j % 8 of byte j // 8."""

    nonzeros: int

    @classmethod
    def from_mask(cls, mask: Tensor) -> Bitmap:
        """From a bool mask (out, in)."""
        return cls(pack_bits(mask), mask.shape[1], int(mask.sum()))

    @property
    def kept(self) -> int:
        return self.nonzeros

    @property
    def name(self) -> str:
        return f"{self.nonzeros / max(1, self.shape[0] * self.columns):.0%}"

    def mask(self) -> Tensor:
        return unpack_bits(self.packed, self.columns)

    def check(self) -> None:
        kept = int(self.mask().sum())
        if kept != self.nonzeros:
            raise ValueError(f"a bitmap keeps {kept} entries instead of {self.nonzeros}: it is damaged")

    def describe(self) -> dict[str, Any]:
        return {"kind": "bitmap", "kept": self.nonzeros}


@dataclass(frozen=True)
class NofM(Pattern):
    """n kept of every m neighbours in a row, as the ranks of the subsets, bit plane by bit plane.

    The in / m ranks of a row have b = `index_bits(n, m)` bits each: a row is b bitmaps of in / m bits.
    """

    n: int
    m: int

    @classmethod
    def from_mask(cls, mask: Tensor, n: int, m: int) -> NofM:
        """From a bool mask (out, in) that keeps n of every m. ValueError where it does not."""
        rows, columns = mask.shape
        _check_group(n, m, columns)
        groups = mask.view(rows, columns // m, m)
        if not bool((groups.sum(2) == n).all()):
            raise ValueError(f"the mask does not keep {n} of every {m} entries")
        places = 1 << torch.arange(m, device=mask.device)
        rank = _ranks(n, m).to(mask.device)[(groups * places).sum(2)]  # (out, groups)
        planes = [pack_bits((rank >> b & 1).bool()) for b in range(index_bits(n, m))]
        packed = torch.cat(planes, 1) if planes else mask.new_empty(rows, 0, dtype=torch.uint8)
        return cls(packed, columns, n, m)

    @property
    def kept(self) -> int:
        return self.shape[0] * self.columns // self.m * self.n

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def group(self) -> tuple[int, int] | None:
        return self.n, self.m

    def ranks(self) -> Tensor:
        """The rank of the subset of every group, int64 (out, in / m)."""
        groups = self.columns // self.m
        rank = torch.zeros(self.shape[0], groups, dtype=torch.int64, device=self.packed.device)
        bits = index_bits(self.n, self.m)
        for b, plane in enumerate(self.packed.chunk(bits, 1) if bits else ()):
            rank += unpack_bits(plane, groups).long() << b
        return rank

    def mask(self) -> Tensor:
        subsets = _subsets(self.n, self.m).to(self.packed.device)
        return subsets.index_select(0, self.ranks().view(-1)).view(self.shape[0], self.columns)

    def check(self) -> None:
        ranks = self.ranks()
        if ranks.numel() and int(ranks.max()) >= comb(self.m, self.n):
            raise ValueError(f"an index names no {self.n} of {self.m} entries: it is damaged")

    def spread(self, values: Tensor) -> Tensor:
        subsets = _subsets(self.n, self.m)
        places = subsets.nonzero()[:, 1].view(-1, self.n).to(self.packed.device)  # (C(m, n), n)
        index = places.index_select(0, self.ranks().view(-1))  # (groups of all rows, n)
        zeros = torch.zeros(index.shape[0], self.m, dtype=values.dtype, device=values.device)
        return zeros.scatter(1, index, values.reshape(-1, self.n)).view(self.shape)

    def describe(self) -> dict[str, Any]:
        return {"kind": "n:m", "n": self.n, "m": self.m}


def index_bits(n: int, m: int) -> int:
    """Bits that tell which n of m are kept: ceil(log2 C(m, n)).

    >>> index_bits(2, 4), index_bits(4, 8), index_bits(6, 8), index_bits(1, 4)
    (3, 7, 5, 2)
    """
    return (comb(m, n) - 1).bit_length()


def pack_bits(bits: Tensor) -> Tensor:
    """bool (rows, columns) -> uint8 (rows, ceil(columns / 8)); bit j % 8 of byte j // 8."""
    rows, columns = bits.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8, device=bits.device)
    padded[:, :columns] = bits
    places = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.view(rows, padded.shape[1] // 8, 8) * places).sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: bool (rows, columns)."""
    places = 1 << torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] & places).bool()  # (rows, bytes, 8)
    return bits.flatten(1)[:, :columns]


def _check_group(n: int, m: int, columns: int) -> None:
    if not 1 <= n <= m <= MAX_GROUP:
        raise ValueError(f"an n:m pattern keeps n of m with 1 <= n <= m <= {MAX_GROUP}, not {n}:{m}")
    if columns % m:
        raise ValueError(f"an n:m pattern needs whole groups: {columns} columns are no multiple of {m}")


@lru_cache(maxsize=64)
def _subsets(n: int, m: int) -> Tensor:
    """Every subset of n out of m in lexicographic order: bool (C(m, n), m)."""
    table = torch.zeros(comb(m, n), m, dtype=torch.bool)
    table.scatter_(1, torch.tensor(list(combinations(range(m), n))), True)
    return table


@lru_cache(maxsize=64)
def _ranks(n: int, m: int) -> Tensor:
    """The rank of a subset by its bits: int64 (2^m,); only entries with n bits set mean anything."""
    ranks = torch.zeros(1 << m, dtype=torch.int64)
    ranks[(_subsets(n, m) * (1 << torch.arange(m))).sum(1)] = torch.arange(comb(m, n))
    return ranks
