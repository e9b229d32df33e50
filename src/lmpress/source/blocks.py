"""Blocks (and what stands around them) from the source, into shards, and back from shards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmpress.checkpoint import put_forms, stored_names
from lmpress.families import skeleton
from lmpress.forms import CompressedLinear, Dense, Form, form_from_description, in_storage
from lmpress.source.model import ModelSource

Descriptions = dict[str, dict[str, Any]]
"""Descriptions of forms by the full name of their module."""


def dense_block(source: ModelSource, index: int, device: torch.device) -> nn.Module:
    """Block `index` of the dense model, real, in float32."""
    name = source.layout.block_name(index)
    tensors = source.read(source.block_names(index))
    block = copy.deepcopy(source.skeleton.get_submodule(name))
    _load(block, {key.removeprefix(name + "."): tensor for key, tensor in tensors.items()})
    return cast(nn.Module, block.to(device).eval())


def block_tensors(source: ModelSource, index: int, block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a rewritten block as they are stored, by full name.

    Linears that no step touched are stored in `dtype`; norms and biases in the type of the source.
    """
    name = source.layout.block_name(index)
    linears = {f"{linear}.weight" for linear in source.layout.block(index).linears}
    stored: dict[str, Tensor] = {}
    held: set[str] = set()
    for path, module in block.named_modules():
        if isinstance(module, CompressedLinear):
            held |= {f"{path}.{parameter}" for parameter in module.form_tensors()}
    for key, tensor in block.state_dict().items():
        if key in held:
            stored[f"{name}.{key}"] = tensor
        elif key in linears:
            stored[f"{name}.{key}"] = in_storage(tensor, dtype)
        else:
            stored[f"{name}.{key}"] = tensor.to(source.dtype)
    return stored


def current_form(module: nn.Module) -> Form:
    """The form that a linear holds: its own, or its dense weight."""
    if isinstance(module, CompressedLinear):
        return module.form
    return Dense(cast(Tensor, module.weight).data)


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear, (out,); None where it has none."""
    bias = cast("Tensor | None", module.bias)
    return None if bias is None else bias.data


def set_form(block: nn.Module, linear: str, form: Form, bias: Tensor | None = None) -> None:
    """Let `linear` run `form`; its bias stays unless another one is given."""
    old = block.get_submodule(linear)
    bias = bias_of(old) if bias is None else bias
    if isinstance(old, CompressedLinear) and bias is None:
        old.hold(form)
        old.runner = None
    else:
        block.set_submodule(linear, CompressedLinear(form, bias))


def run_as_restored(block: nn.Module, linear: str, form: Form) -> None:
    """Let the text run through what a reader of the shard would run, to the bit."""
    module, restored = block.get_submodule(linear), running(form)
    assert isinstance(module, CompressedLinear)
    module.runner = lambda _, x: restored.forward(x)


def store(form: Form, dtype: torch.dtype) -> Form:
    """The form with its dense leaves as they are stored."""

    def rewriter(leaf: Form) -> Form:
        return Dense(in_storage(leaf.dense(), dtype)) if leaf.kind == Dense.kind else leaf

    return form.rewrite(rewriter)


def restored_block(
    source: ModelSource, index: int, shard: Path, plan: Descriptions, device: torch.device
) -> nn.Module:
    """Block `index` as its shard tells, computing in float32."""
    name = source.layout.block_name(index) + "."
    stored = load_file(shard, device=str(device))
    tensors = {key.removeprefix(name): tensor for key, tensor in stored.items()}
    block = copy.deepcopy(source.skeleton.get_submodule(name[:-1]))
    for module, description in plan.items():
        linear = module.removeprefix(name)
        form = running(_filled(description, linear, tensors))
        bias = tensors.pop(f"{linear}.bias", None)
        block.set_submodule(linear, CompressedLinear(form, None if bias is None else bias.float()))
    _load(block, tensors)
    return cast(nn.Module, block.to(device).eval())


def restored_outer(source: ModelSource, shard: Path, plan: Descriptions, device: torch.device) -> Any:
    """The model with everything outside its blocks as the shard tells; the blocks stay on the meta device."""
    return _outer_model(source, load_file(shard), plan, device, str(shard))


def dense_outer(source: ModelSource, device: torch.device) -> Any:
    """The dense model with everything outside its blocks real; the blocks stay on the meta device."""
    return _outer_model(source, source.read(source.outer_names), {}, device, source.name)


def _outer_model(
    source: ModelSource, tensors: dict[str, Tensor], plan: Descriptions, device: torch.device, where: str
) -> Any:
    model = skeleton(source.config)
    put_forms(model, {name: _filled(d, name, tensors) for name, d in plan.items()}, dtype=torch.float32)
    parameters = {key: tensor.float() for key, tensor in tensors.items()}
    model.load_state_dict(parameters, strict=False, assign=True)
    if source.layout.tied and source.layout.embedding not in plan:
        model.tie_weights()
    for name in source.outer_names:
        module, _, parameter = name.rpartition(".")
        if module not in plan and getattr(model.get_submodule(module), parameter).is_meta:
            raise ValueError(f"{where} lacks {name}")
    outer = [child for path, child in model.named_modules() if _outside(path, source.layout.blocks, child)]
    for child in outer:
        child.to(device)
    return model.eval()


def outer_tensors(
    source: ModelSource, forms: Mapping[str, Form], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What stands outside the blocks, as it is stored: forms, and the rest in the types that fit it."""
    stored: dict[str, Tensor] = {}
    for name, form in forms.items():
        names = stored_names(form)
        stored |= {f"{name}.{names[key]}": tensor for key, tensor in form.tensors().items()}
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in forms:
            stored[name] = in_storage(tensor, dtype) if tensor.dim() > 1 else tensor
    return stored


def _filled(description: Mapping[str, Any], module: str, tensors: dict[str, Tensor]) -> Form:
    """The form of a description with its tensors, which are taken out of `tensors`."""
    empty = form_from_description(description)
    names = stored_names(empty)
    return empty.loaded({key: tensors.pop(f"{module}.{stored}") for key, stored in names.items()})


def running(form: Form) -> Form:
    """A stored form as the text runs through it: dense in float32, but for the factors of a product."""
    if form.is_product:
        return form.with_parts({part.name: running(part.form) for part in form.parts()})
    return Dense(form.dense())


def _load(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    block.load_state_dict({key: t.float() for key, t in tensors.items()}, strict=False, assign=True)
    empty = [key for key, tensor in block.state_dict().items() if tensor.is_meta]
    if empty:
        raise ValueError(f"the weight {empty[0]} is missing")
    for parameter in block.parameters():
        parameter.requires_grad_(False)


def _outside(path: str, blocks: str, module: nn.Module) -> bool:
    """Whether a module without children stands outside the blocks and has something to move."""
    if path == blocks or path.startswith(blocks + ".") or next(module.children(), None) is not None:
        return False
    return not any(t.is_meta for t in [*module.parameters(), *module.buffers()])
