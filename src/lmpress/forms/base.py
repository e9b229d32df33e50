"""The contract of every form: shape, dense(), forward(), tensors(), describe()."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, ClassVar

import torch
from torch import Tensor

FORMS: dict[str, type[Form]] = {}
"""Every form by the name that its description carries."""

MOST_NESTED = 32
"""Levels of objects and lists in a description."""

MOST_ENTRIES = 1 << 48
"""Of a matrix; a side has at most 2^31 - 1."""


Run = Callable[["Form", Tensor], Tensor]
"""How a form runs: (form, x of shape (..., in)) -> (..., out)."""

Refit = Callable[["Form", Tensor], "Form"]
"""A leaf of the same kind for another matrix: (leaf, matrix (out, in)) -> leaf."""


@dataclass(frozen=True)
class Part:
    """A form that another one is made of, and what stands between its outputs and those of the whole.

    Attributes:
        name: among the parts.
        form: the part.
        after: the part whose outputs are its inputs; None where it reads the input of the whole.
        through: gives the matrix (out, r) by which its outputs reach those of the whole; None where they
            are outputs of the whole themselves.
        rows: which outputs of the whole its own are, a mask (out,); None for all of them, in their order.
    """

    name: str
    form: Form
    after: str | None = None
    through: Callable[[], Tensor] | None = None
    rows: Tensor | None = None


class Form(ABC):
    """A matrix of shape (out_features, in_features), written as a small expression over tensors.

    A form is immutable: a method that rewrites a weight makes a new form. `dense()` *defines* the
    matrix; `forward`, `tensors` and `describe` have to agree with it.
    """

    kind: ClassVar[str]
    """The name of the form in a description."""

    is_product: ClassVar[bool] = False
    """Whether its parts run one after the other, narrower than the whole."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            FORMS[cls.kind] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the matrix that this form stands for."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix itself, (out, in), computed in float32 or better and then cast to `dtype`."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """`x @ dense().T`, differentiable in x and in the floating-point tensors of the form."""
        return torch.nn.functional.linear(x, self.dense(x.dtype))

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by name and in a fixed order; the first one is stored as `weight`."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Form:
        """The same expression over other tensors (moved, loaded or trained), by the names of `tensors()`."""

    def loaded(self, tensors: Mapping[str, Tensor]) -> Form:
        """`with_tensors` for tensors that come from a file.

        Raises:
            ValueError: one is missing, has another shape or dtype than this form's, or see `check`.
        """
        for name, expected in self.tensors().items():
            found = tensors.get(name)
            if found is None:
                raise ValueError(f"the tensor {name!r} of {self!r} is missing")
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise ValueError(
                    f"the tensor {name!r} of {self!r} is {dtype_name(found.dtype)} {tuple(found.shape)} "
                    f"instead of {dtype_name(expected.dtype)} {tuple(expected.shape)}"
                )
        form = self.with_tensors(tensors)
        form.check()
        return form

    def check(self) -> None:
        """Look at the values of the tensors once, so that nothing that reads them later has to.

        Raises:
            ValueError: they contradict each other, as a bitmap with more entries than there are values.
        """
        for part in self.parts():
            part.form.check()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """A JSON description: `form`, `shape`, and what is needed to rebuild an empty form."""

    @classmethod
    @abstractmethod
    def from_description(cls, description: Mapping[str, Any]) -> Form:
        """An empty form on the meta device. Raises KeyError or ValueError on a description that is broken."""

    def parts(self) -> tuple[Part, ...]:
        """The forms that it is made of, in the order in which they run; none of a leaf."""
        return ()

    def with_parts(self, parts: Mapping[str, Form]) -> Form:
        """The same expression over other parts, by their names; a leaf is itself."""
        return self

    def run_by(self, run: Run, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """`forward`, with `run` for the parts."""
        return self.forward(x)

    def rewrite(self, rewriter: Callable[[Form], Form]) -> Form:
        """The same expression with every leaf replaced by `rewriter(leaf)`."""
        parts = self.parts()
        if not parts:
            return rewriter(self)
        return self.with_parts({part.name: part.form.rewrite(rewriter) for part in parts})

    def merged(self, update: Tensor, refit: Refit) -> Form:
        """`dense() + update` in the structure of this form, with no byte more.

        Args:
            update: (out, in).
            refit: gives a leaf another matrix.
        """
        return refit(self, self.dense() + update)

    def rows(self, index: Tensor) -> Tensor:
        """The rows `index` (any shape) of the matrix, (*index.shape, in): an embedding lookup."""
        return self.dense()[index]

    def resident(self) -> Form:
        """The same matrix as it is best kept in memory to be run again and again; often the form itself."""
        parts = self.parts()
        kept = {part.name: part.form.resident() for part in parts}
        return self if all(kept[part.name] is part.form for part in parts) else self.with_parts(kept)

    def stored(self, resident: Form) -> Form:
        """`resident()` undone: this form with the values of `resident`, which may have been moved or cast.

        Of this form itself nothing is looked at that `resident` tells: see `without_values`.
        """
        pairs = zip(self.parts(), resident.parts(), strict=True)
        return resident.with_parts({own.name: own.form.stored(other.form) for own, other in pairs})

    def without_values(self) -> Form:
        """The same expression with what is large in its leaves, weights and codes, on the meta device."""

        return self.rewrite(lambda leaf: leaf.emptied())

    def emptied(self) -> Form:
        """Of a leaf: `without_values`."""
        first, *others = self.tensors().items()
        return self.with_tensors({first[0]: torch.empty_like(first[1], device="meta"), **dict(others)})

    @property
    def plain(self) -> Tensor | None:
        """The floating-point matrix that is stored as it is; None where it is anything else."""
        return None

    @property
    def addends(self) -> tuple[Form, ...]:
        """What is added up to the matrix."""
        return (self,)

    @property
    def mask(self) -> Tensor:
        """Which entries are kept, bool (out, in): where nothing keeps account of it, those that are not 0."""
        return self.dense() != 0

    @property
    def density(self) -> float:
        """Kept entries over all entries."""
        return float(self.mask.float().mean()) if 0 not in self.shape else 0.0

    @property
    def nominal_bits(self) -> float:
        """Bits of a value of a leaf, without what stands beside the values."""
        return 16.0

    @property
    def storage(self) -> str:
        """How the weight of a leaf is stored, as kernels name it; empty where none of them knows it."""
        return ""

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensors take in a safetensors file, header aside."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """All that is stored (codes, scales, masks, indices, factors) over the weights it stands for."""
        return 8 * self.num_bytes / max(1, self.shape[0] * self.shape[1])

    @property
    def formula(self) -> str:
        """A short name for tables, such as `LowRank(int8, int8)`."""
        return self.kind

    def __repr__(self) -> str:
        return f"{self.formula}[{self.shape[0]}x{self.shape[1]}]"


def dense_leaf_names(form: Form) -> set[str]:
    """The names in `form.tensors()` that are floating-point weights, rather than codes, scales or indices."""
    weights: set[int] = set()

    def visit(leaf: Form) -> Form:
        if leaf.kind == "dense":
            weights.add(id(leaf.tensors()["weight"]))
        return leaf

    form.rewrite(visit)
    return {name for name, tensor in form.tensors().items() if id(tensor) in weights}


def form_from_description(description: Mapping[str, Any]) -> Form:
    """The empty form (meta device) that `description` tells of; ValueError where it tells of none.

    Whatever JSON it is: nothing that a description says of sizes is allocated.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"a description of a form is an object, not {short(description)}")
    _check_nesting(description)
    kind = description.get("form")
    if not isinstance(kind, str) or kind not in FORMS:
        raise ValueError(f"unknown form {short(kind)}; known forms: {', '.join(sorted(FORMS))}")
    try:
        form, shape = FORMS[kind].from_description(description), shape_of(description)
    except KeyError as missing:
        raise ValueError(f"the description of a {kind} form lacks {missing}") from missing
    except TypeError as wrong:
        raise ValueError(f"the description of a {kind} form is broken: {wrong}") from wrong
    if form.shape != shape:
        raise ValueError(f"a {kind} form of shape {form.shape} is described as one of {shape}")
    return form


def _check_nesting(description: Mapping[str, Any]) -> None:
    level: list[Any] = [description]
    for _ in range(MOST_NESTED):
        inside = [v.values() if isinstance(v, Mapping) else v for v in level if isinstance(v, Mapping | list)]
        level = [part for parts in inside for part in parts]
    if level:
        raise ValueError(f"a description has at most {MOST_NESTED} levels")


def shape_of(description: Mapping[str, Any], key: str = "shape") -> tuple[int, int]:
    """The two sizes under a key of a description. ValueError where no matrix has them."""
    shape = description[key]
    if not isinstance(shape, list | tuple) or len(shape) != 2 or not all(_is_size(size) for size in shape):
        raise ValueError(f"a {key} is two whole numbers, not {short(shape)}")
    if math.prod(shape) > MOST_ENTRIES:
        raise ValueError(f"no matrix has {shape[0]} x {shape[1]} entries")
    return shape[0], shape[1]


def whole(description: Mapping[str, Any], key: str, most: int = MOST_ENTRIES) -> int:
    """The whole number under a key of a description, 0 to `most`."""
    value = description[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{key} is a whole number up to {most}, not {short(value)}")
    return value


def flag(description: Mapping[str, Any], key: str) -> bool:
    """What is true or false under a key of a description."""
    value = description[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} is true or false, not {short(value)}")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> `float16`."""
    return str(dtype).removeprefix("torch.")


FLOAT_DTYPES = {dtype_name(d): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def float_dtype(name: str) -> torch.dtype:
    """`float16` -> `torch.float16`; ValueError for what is no floating-point type."""
    if not isinstance(name, str) or name not in FLOAT_DTYPES:
        raise ValueError(f"{short(name)} is no floating-point type; known: {', '.join(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def prefixed(prefix: str, form: Form) -> dict[str, Tensor]:
    """The tensors of a part, under `prefix_`."""
    return {f"{prefix}_{name}": tensor for name, tensor in form.tensors().items()}


def unprefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `prefixed`: the tensors of one part, by the part's own names."""
    start = prefix + "_"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
