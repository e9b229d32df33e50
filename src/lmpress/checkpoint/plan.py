"""The plan of a checkpoint: which module is held as which form, and which module of a model that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any

import torch

from lmpress.errors import LmpressError, RequestError
from lmpress.families import layout_of, skeleton
from lmpress.forms import Form, form_from_description

FORMAT_VERSION = 1
"""Of the checkpoints that this lmpress writes, and the latest that it reads."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int16: "I16",
}
"""What safetensors calls the types that forms store."""


def check_version(version: Any, where: str) -> None:
    """Refuse a format that is not known.

    Raises:
        RequestError: no number.
        LmpressError: a later format.
    """
    if not isinstance(version, int) or isinstance(version, bool):
        raise RequestError(f"{where}: a format version is a number, not {version!r}")
    if version > FORMAT_VERSION:
        raise LmpressError(
            f"{where}: this checkpoint has format {version}, and this lmpress reads {FORMAT_VERSION}: "
            "upgrade lmpress"
        )


def empty_forms(plan: Any, where: str) -> dict[str, Form]:
    """The empty forms (meta device) of a plan, by module.

    Raises:
        RequestError: says where the plan stands, which module it is, and what is broken.
    """
    if not isinstance(plan, Mapping):
        raise RequestError(f"{where}: a plan is an object, not {short(plan)}")
    forms: dict[str, Form] = {}
    for name, description in plan.items():
        try:
            forms[name] = form_from_description(description)
        except ValueError as error:
            raise RequestError(f"{where}: the plan is broken at {name[:200]!r}: {error}") from None
    return forms


def stored_names(form: Form) -> dict[str, str]:
    """How the tensors of a form are called under their module: the first one is `weight`."""
    names = list(form.tensors())
    return {name: "weight" if i == 0 else name for i, name in enumerate(names)}


def check_stored(forms: Mapping[str, Form], tensors: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Whether the files hold what a plan names.

    Args:
        forms: by the module's name in the plan.
        tensors: the headers of all safetensors files.
        where: the directory, for the message.

    Raises:
        RequestError: a tensor is missing, or of another type or shape.
    """
    for module, form in forms.items():
        expected = form.tensors()
        for name, stored in stored_names(form).items():
            entry = tensors.get(f"{module}.{stored}")
            if entry is None:
                raise RequestError(f"{where} lacks the tensor {module}.{stored}, which its plan names")
            found = entry["dtype"], tuple(entry["shape"])
            asked = DTYPES[expected[name].dtype], tuple(expected[name].shape)
            if found != asked:
                raise RequestError(
                    f"{where}: {module}.{stored} is {found[0]} of shape {found[1]}, and its plan says "
                    f"{asked[0]} of shape {asked[1]}"
                )


def names_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The modules of `model` that a plan names: name in the plan -> name in the model.

    As transformers does for weights, the prefix of the base model is taken off where a bare model is built
    from the checkpoint of a causal one, and put on in the opposite case. What the model has no place for,
    such as the head, or blocks past those that the config asks for, is left out.
    """
    modules = {name for name, _ in model.named_modules()}
    found: dict[str, str] = {}
    for name in names:
        places = [place for place in spellings(model, name) if place in modules]
        if places:
            found[name] = places[0]
    return found


def spellings(model: Any, name: str) -> tuple[str, str, str]:
    """A name without the prefix of the base model, with it, and as it is."""
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix), prefix + name, name


def check_absent(config: Any, names: Iterable[str]) -> None:
    """Whether what a model has no place for has one in the causal model, or past the last block.

    Raises:
        RequestError: a name that no model of this config has.
    """
    layout, whole = layout_of(config), {name for name, _ in skeleton(config).named_modules()}
    for name in names:
        block = name.removeprefix(f"{layout.blocks}.").partition(".")[0]
        beyond = block.isdecimal() and int(block) >= layout.num_blocks
        if name not in whole and not beyond:
            raise RequestError(
                f"the plan in config.json names the module {name}, which a {config.model_type} of this "
                "config does not have: the file was changed; fetch it again"
            )
