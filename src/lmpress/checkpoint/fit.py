"""Whether the forms of a plan fit the model: only neurons may be fewer than the config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmpress.families import layout_of
from lmpress.forms import Form


def check_fit(model: Any, forms: Mapping[str, Form]) -> None:
    """Hold the shapes of forms against a model whose linears and embeddings have those of its config.

    Raises:
        ValueError: names a module that the model lacks, or whose form has another shape; an MLP whose linears
            have different numbers of neurons.
    """
    layout = layout_of(model.config)
    neurons: dict[int, int] = {}
    for name, form in forms.items():
        full = _shape(model, name)
        index, local = _place(name, layout.blocks)
        found = layout.block(index).neurons if index is not None else None
        rows = found.parts(local) if found is not None else 0
        sides = [form.shape[0], form.shape[1]]
        side = 0 if rows else 1 if found is not None and local == found.output else None
        if side is not None and index is not None and 1 <= sides[side] <= full[side]:
            count, rest = divmod(sides[side], max(1, rows))
            if rest or neurons.setdefault(index, count) != count:
                raise ValueError(f"{name} has {count} neurons, and its block {neurons.get(index)}")
            sides[side] = full[side]
        if tuple(sides) != full:
            raise ValueError(f"{name} is described as {form.shape}, and the config asks for {full}")


def _place(name: str, blocks: str) -> tuple[int | None, str]:
    """The block that a module of the model is in, None for none, and its name there."""
    number, _, local = name.removeprefix(f"{blocks}.").partition(".")
    inside = name.startswith(f"{blocks}.") and number.isdecimal()
    return (int(number), local) if inside else (None, name)


def _shape(model: Any, name: str) -> tuple[int, int]:
    try:
        rows, columns = model.get_submodule(name).weight.shape
    except (AttributeError, ValueError):
        raise ValueError(f"the model has no matrix {name!r}") from None
    return rows, columns
