"""What a form will take, from shapes alone: the outlines of its matrices, before there are any."""

from __future__ import annotations

from dataclasses import dataclass

from lmpress.forms import packed_width
from lmpress.forms.pattern import index_bits
from lmpress.methods.rtn import parse_granularity


@dataclass(frozen=True)
class Leaf:
    """One matrix (out, in) of a form, as it is stored.

    Attributes:
        kept: values that are stored; None for all of them.
        even: whether every row keeps as many.
        pattern: (n, m), or None for a bitmap, where `kept` is given.
        bits: of a code; None for floating point. A share of a bit is a mean, scales and all included.
        granularity: of the grid.
        symmetric: no zero points.
        coded: `bits` is what all together takes a weight.
        scale_bytes: of a scale.
    """

    rows: int
    columns: int
    kept: int | None = None
    even: bool = False
    pattern: tuple[int, int] | None = None
    bits: int | float | None = None
    granularity: str = "channel"
    symmetric: bool = True
    coded: bool = False
    scale_bytes: int = 2

    def bytes(self, itemsize: int) -> int:
        """What it takes, with `itemsize` bytes a floating-point weight."""
        rows, columns = self.rows, self.columns
        mask = 0
        if self.kept is not None:
            planes, cells = (1, columns) if self.pattern is None else _planes(self.pattern, columns)
            mask = rows * planes * -(-cells // 8)
            rows, columns = (rows, self.kept // max(1, rows)) if self.even else (1, self.kept)
        if self.bits is None:
            return mask + rows * columns * itemsize
        if self.coded:
            return mask + round(rows * columns * self.bits / 8)
        kind, size = parse_granularity(self.granularity)
        scales = 1 if kind == "tensor" else self.rows * (self.columns // size if size else 1)
        bits = int(self.bits)
        zeros = 0 if self.symmetric else packed_width(scales, bits)
        beside = 2 if self.kept is not None and kind != "tensor" and not self._plain(size) else 0
        return mask + rows * packed_width(columns, bits) + self.scale_bytes * scales + zeros + beside

    def _plain(self, size: int | None) -> bool:
        """Whether the scales of a sparse matrix are those of its values, with no scale of one beside them."""
        return self.even and (size is None or self.pattern is not None)


def _planes(pattern: tuple[int, int], columns: int) -> tuple[int, int]:
    n, m = pattern
    return index_bits(n, m), columns // m


def factors(
    shape: tuple[int, int], rank: int, bits: int | None = None, granularity: str = "channel"
) -> list[Leaf]:
    """The two factors of a product of this rank, which is cut to what the shape allows."""
    (m, n), rank = shape, min(rank, *shape)
    return [Leaf(a, b, bits=bits, granularity=granularity) for a, b in ((m, rank), (rank, n))]


@dataclass(frozen=True)
class Outline:
    """What is known of a module's form before it is made.

    Attributes:
        shape: (out, in) of its matrix.
        leaves: the matrices that are stored.
        exact: whether it is sure that they take so much; else data decide.
        itemsize: bytes of a floating-point weight.
        granularity: of the grid that a hybrid chose for this module.
    """

    shape: tuple[int, int]
    leaves: tuple[Leaf, ...]
    exact: bool = True
    itemsize: int = 2
    granularity: str | None = None

    @property
    def bytes(self) -> int:
        """What the leaves take."""
        return sum(leaf.bytes(self.itemsize) for leaf in self.leaves)
