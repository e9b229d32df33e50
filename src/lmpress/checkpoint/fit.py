"""Whether the forms of a plan fit the model: only neurons may be fewer than the config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmpress.checkpoint.plan import names_in
from lmpress.errors import RequestError
from lmpress.families import layout_of
from lmpress.forms import Form


@dataclass(frozen=True)
class Place:
    """Where a linear stands, and what of it are neurons.

    Attributes:
        block: its index.
        parts: into how many equal parts its rows fall, each with one row a neuron; 1 where rows are none.
        side: which side of its shape neurons lie on: 0 for rows, 1 for columns, None for neither.
    """

    block: int
    parts: int = 1
    side: int | None = None


def linears_in(model: Any) -> dict[str, Place]:
    """The linears of the blocks of a model of any class, by their names in it."""
    layout, places = layout_of(model.config), {}
    for index in range(layout.num_blocks):
        block = layout.block(index)
        for name, linear in zip(layout.linears_of(index), block.linears, strict=True):
            parts = block.neurons.parts(linear)
            side = 0 if parts else 1 if linear == block.neurons.output else None
            places[name] = Place(index, parts or 1, side)
    return {own: places[name] for name, own in names_in(model, places).items()}


def check_fit(model: Any, forms: Mapping[str, Form], where: str) -> None:
    """Hold the shapes of forms against a model whose linears and embeddings have those of its config.

    Args:
        model: of any class that holds the blocks.
        forms: by the module's name in `model`.
        where: the plan stands, for messages.

    Raises:
        RequestError: names a module that the model lacks, or whose form has another shape; an MLP whose
            linears have different numbers of neurons.
    """
    places = linears_in(model)
    widths: dict[int, int] = {}
    for name, form in forms.items():
        full, place = _shape(model, name, where), places.get(name)
        fits = [found == wanted for found, wanted in zip(form.shape, full, strict=True)]
        if place is not None and place.side is not None:
            count = form.shape[place.side]
            width, rest = divmod(count, place.parts)
            fits[place.side] = 1 <= count <= full[place.side] and not rest
            expected = widths.setdefault(place.block, width)
            if expected != width:
                raise RequestError(f"{where}: in the plan {name} has {width} neurons, its block {expected}")
        if not all(fits):
            raise RequestError(
                f"{where}: the plan describes {name} as {form.shape}, and the config asks for {full}"
            )


def _shape(model: Any, name: str, where: str) -> tuple[int, int]:
    try:
        rows, columns = model.get_submodule(name).weight.shape
    except (AttributeError, ValueError):
        raise RequestError(f"{where}: the plan names {name!r}, and the model has no such matrix") from None
    return rows, columns
