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
    blocks = [f"{layout.block_name(i)}." for i in range(layout.num_blocks)]
    neurons: dict[str, int] = {}
    for name, form in forms.items():
        full = _shape(model, name)
        block = next((start for start in blocks if name.startswith(start)), "")
        local = name.removeprefix(block)
        side = 0 if local in layout.neurons.inputs else 1 if local == layout.neurons.output else None
        fits = [found == wanted for found, wanted in zip(form.shape, full, strict=True)]
        if side is not None and block:
            fits[side] = 1 <= form.shape[side] <= full[side]
            if neurons.setdefault(block, form.shape[side]) != form.shape[side]:
                raise ValueError(f"{name} has {form.shape[side]} neurons, its block {neurons[block]}")
        if not all(fits):
            raise ValueError(f"{name} is described as {form.shape}, and the config asks for {full}")


def _shape(model: Any, name: str) -> tuple[int, int]:
    try:
        rows, columns = model.get_submodule(name).weight.shape
    except (AttributeError, ValueError):
        raise ValueError(f"the model has no matrix {name!r}") from None
    return rows, columns
