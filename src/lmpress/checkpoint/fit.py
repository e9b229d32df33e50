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
    places = {
        f"{layout.block_name(i)}.{linear}": (i, linear)
        for i in range(layout.num_blocks)
        for linear in layout.block(i).linears
    }
    widths: dict[int, int] = {}
    for name, form in forms.items():
        full = _shape(model, name)
        fits = [found == wanted for found, wanted in zip(form.shape, full, strict=True)]
        if name in places:
            index, linear = places[name]
            neurons = layout.block(index).neurons
            parts, reads = neurons.parts(linear), linear == neurons.output
            if parts or reads:
                side = 1 if reads else 0
                width, rest = divmod(form.shape[side], parts or 1)
                fits[side] = 1 <= form.shape[side] <= full[side] and not rest
                if widths.setdefault(index, width) != width:
                    raise ValueError(f"{name} has {width} neurons, its block {widths[index]}")
        if not all(fits):
            raise ValueError(f"{name} is described as {form.shape}, and the config asks for {full}")


def _shape(model: Any, name: str) -> tuple[int, int]:
    try:
        rows, columns = model.get_submodule(name).weight.shape
    except (AttributeError, ValueError):
        raise ValueError(f"the model has no matrix {name!r}") from None
    return rows, columns
