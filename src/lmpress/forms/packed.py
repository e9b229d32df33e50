"""What other libraries see of a weight that is no plain matrix: its metadata, and one error for the rest."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _refusal(formula: str, what: str) -> ValueError:
    return ValueError(
        f"this weight is held as {formula} and not as a matrix, so {what}: call model.dequantize() first"
    )


class PackedCodes(nn.Parameter):
    """A parameter of whole numbers: a loader and an optimizer find it, and it can never be trained."""

    def requires_grad_(self, requires_grad: bool = True) -> PackedCodes:
        if requires_grad:
            raise _refusal("packed codes", "it cannot be trained")
        return self

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)


class PackedWeight(nn.Parameter):
    """What `module.weight` is where the first tensor of a form is not the matrix itself.

    It stands for the parameter that the module registers. Shape, type, device and the like are the
    parameter's, and `ndim`, by which others tell a linear from a convolution, is the matrix's. To compute
    with it, as with a matrix, would give wrong numbers or an error about shapes, and is refused in words
    that say what to do. `PackedWeight.of` gives one object for one parameter, so that tied weights are
    identical.
    """

    parameter: nn.Parameter
    formula: str

    @classmethod
    def of(cls, parameter: nn.Parameter, formula: str) -> PackedWeight:
        """The view of `parameter`, the first tensor of a form that is called `formula`."""
        known = _VIEWS.get(id(parameter))  # a view keeps its parameter alive, so the id is still its own
        if known is None:
            known = Tensor._make_subclass(cls, torch.empty(0), False)  # no storage of its own
            known.parameter, known.formula = parameter, formula
            _VIEWS[id(parameter)] = known
        return known

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        views = [value for value in (*args, *kwargs.values()) if isinstance(value, PackedWeight)]
        name, accessor = _named(func)
        if len(views) != 1 or not args or views[0] is not args[0]:  # one operand among others
            raise _refusal(views[0].formula if views else "packed codes", f"{name} cannot work on it")
        view, rest = views[0], args[1:]
        if (name, accessor) == ("ndim", "__get__"):
            return MATRIX
        if (name, accessor) in _SAME:
            return view
        if name in ("requires_grad", "requires_grad_") and accessor != "__get__":
            view.parameter.requires_grad_(*rest, **kwargs)
            return view
        if _computes(name, accessor, view.parameter, rest, kwargs):
            raise _refusal(view.formula, f"{name} cannot work on it")
        told = func(view.parameter, *rest, **kwargs)
        return view if told is view.parameter else told

    def __getattr__(self, name: str) -> Any:
        if name in ("parameter", "formula"):  # not yet set
            raise AttributeError(name)
        return getattr(self.parameter, name)  # such as a mark that a loader left


_VIEWS: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()
"""The views that somebody holds, by the id of their parameter."""

MATRIX = 2
"""Dimensions of what every weight stands for."""

_SAME = frozenset((("data", "__get__"), ("detach", "")))
"""What gives the same weight again, and is to be guarded as it was."""

_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "real", "imag"))
"""Attributes that are matrices of their own; all others tell of the tensor."""

_METHODS = frozenset(
    """
    __deepcopy__ __format__ __hash__ __reduce_ex__ __repr__ cpu cuda data_ptr dim element_size empty_like
    get_device is_complex is_contiguous is_floating_point is_inference is_pinned is_shared is_signed nelement
    numel pin_memory register_hook storage_offset stride to untyped_storage
    """.split()  # noqa: SIM905
)
"""Methods that tell of the tensor, move it or copy it whole, and compute nothing with its values."""


def real(tensor: Any) -> Any:
    """The parameter behind a view, and whatever is no view itself."""
    return tensor.parameter if isinstance(tensor, PackedWeight) else tensor


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """`tensor` as a parameter that is not trained; `PackedCodes` where it never can be."""
    kind = nn.Parameter if tensor.is_floating_point() else PackedCodes
    return kind(tensor.detach(), requires_grad=False)


def _named(func: Callable[..., Any]) -> tuple[str, str]:
    """(`add_`, "") of a method, (`shape`, "__get__") of a getter, (`data`, "__set__") of a setter."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", name), name
    return name, ""


def _computes(
    name: str, accessor: str, parameter: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a call reads or writes the values of `parameter` as numbers."""
    if accessor == "__get__":
        return name in _ATTRIBUTES
    if name == "copy_" or (name == "data" and accessor == "__set__"):  # by who loads or moves it whole
        return (args[0].shape, args[0].dtype) != (parameter.shape, parameter.dtype)
    if accessor == "__set__":
        return False
    if name == "to":  # another device, but no other type
        wanted = [value.dtype if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        return any(isinstance(value, torch.dtype) and value != parameter.dtype for value in wanted)
    return name not in _METHODS
