"""Forms into a model, and out of it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter

from lmpress.checkpoint.fit import linears_in
from lmpress.errors import LmpressError
from lmpress.families import layout_of, skeleton
from lmpress.forms import CompressedEmbedding, CompressedLinear, EntropyCoded, Form, decode_all
from lmpress.forms.base import dense_leaf_names
from lmpress.forms.linear import FormHolder, Runner
from lmpress.kernels import SemiStructured, run, suits


def put_forms(
    model: Any,
    forms: Mapping[str, Form],
    biases: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Replace the named modules of `model`, in place, by modules that run the given forms.

    A tied head shares the tensors of the embedding's form; it needs no entry of its own.

    Args:
        model: a transformers causal language model, on any device (meta included).
        forms: by module name. An embedding becomes a `CompressedEmbedding`, a linear a `CompressedLinear`.
        biases: by module name, for linears whose bias changed its length; others keep the one they have.
        dtype: of the rows that embeddings give; the model's by default.

    Raises:
        ValueError: a name that the model has no linear or embedding for.
    """
    for name, form in forms.items():
        old = _module(model, name)
        new: nn.Module
        if isinstance(old, nn.Embedding):
            new = _embedding(old, form, dtype or model.dtype)
        elif isinstance(old, nn.Linear):
            new = CompressedLinear(form, _bias(old, form, (biases or {}).get(name)), run)
        else:
            raise ValueError(f"{name} is a {type(old).__name__}, not a linear or an embedding")
        new.train(old.training)
        model.set_submodule(name, new)
    tie_head(model)


def hold_resident(model: nn.Module, names: Iterable[str], coded: bool = False) -> None:
    """Keep the forms of a loaded model as they are best run, in place; `stored_form` is what they were.

    Args:
        names: of the modules that hold them. Of embeddings nothing is made resident but entropy-coded parts.
            Modules whose tensors are offloaded stay as stored: they come and go with every call.
        coded: leave modules with entropy-coded parts as they are: each call then decodes them anew.

    Raises:
        LmpressError: names the module whose weights are damaged.
    """
    every_holder = {name: cast(FormHolder, model.get_submodule(name)) for name in names}
    holders = {name: holder for name, holder in every_holder.items() if not holder.offloaded}
    forms = {name: holder.form for name, holder in holders.items()}
    leaves = {name: _entropy_coded(form) for name, form in forms.items()}
    every = [(leaf, name) for name, found in leaves.items() for leaf in found if not coded]
    try:
        decoded = decode_all([leaf for leaf, _ in every], [name for _, name in every])
    except ValueError as damage:
        raise LmpressError(f"{damage}; fetch the checkpoint again") from damage
    resident = {id(leaf): codes for (leaf, _), codes in zip(every, decoded, strict=True)}
    for name, holder in holders.items():
        form = forms[name]
        try:
            form.check()
        except ValueError as damage:
            raise LmpressError(f"{name}: {damage}; fetch the checkpoint again") from damage
        if leaves[name]:
            if coded:
                continue
            form = form.rewrite(lambda leaf: resident.get(id(leaf), leaf))
        holder.hold_resident(form.resident() if isinstance(holder, CompressedLinear) else form)


def use_sparse_cores(
    model: nn.Module,
    suited: Callable[[Form], bool] = suits,
    runner: Callable[[], Runner] = SemiStructured,
    device: str = "cuda",
) -> None:
    """Let 2:4 weights run on sparse tensor cores where the device that they lie on has some, in place.

    Such a module keeps its stored form, for what runs is packed beside it.

    Args:
        suited: which forms do.
        runner: gives the runner of one module.
        device: modules on devices of another type are left alone.
    """
    for module in model.modules():
        if not isinstance(module, CompressedLinear) or module.weight.device.type != device:
            continue
        form = module.stored_form
        if suited(form):
            module.hold(form)
            module.runner = runner()


def _entropy_coded(form: Form) -> list[EntropyCoded]:
    found: list[EntropyCoded] = []

    def visit(leaf: Form) -> Form:
        if isinstance(leaf, EntropyCoded):
            found.append(leaf)
        return leaf

    form.rewrite(visit)
    return found


def tie_head(model: Any) -> None:
    """Let a tied head share the tensors of a compressed embedding, and tell transformers which they are.

    Nothing happens where the model has no head, or its config ties none, or the embedding is plain.
    """
    names = _tied_names(model)
    if names is None or not isinstance(model.get_input_embeddings(), CompressedEmbedding):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, CompressedLinear):
        head = CompressedLinear(embedding.form, None, run)
        model.set_submodule(names[1], head)
    head.share(embedding)
    for name, buffer in list(head.named_buffers(recurse=False)):
        if buffer.is_meta and hasattr(embedding, "_hf_hook"):  # no hook brings what no state dict names
            setattr(head, name, load_offloaded_parameter(model, f"{names[0]}.{name}"))
    parameters = [name for name, _ in embedding.named_parameters(recurse=False)]
    tied = {f"{names[1]}.{name}": f"{names[0]}.{name}" for name in parameters}
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = {**getattr(model, "all_tied_weights_keys", {}), **tied}


def _tied_names(model: Any) -> tuple[str, str] | None:
    """The names of embedding and head of a model whose config ties them."""
    head = model.get_output_embeddings()
    if head is None or not layout_of(model.config).tied:
        return None
    named = {id(module): name for name, module in model.named_modules()}
    return named[id(model.get_input_embeddings())], named[id(head)]


def holders_of(model: Any) -> dict[str, FormHolder]:
    """The compressed modules of a model, by name; of tied ones the embedding only."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, FormHolder)}
    names = _tied_names(model)
    if names is not None and names[0] in found and names[1] in found:
        embedding, head = found[names[0]], found[names[1]]
        both_away = embedding.offloaded and head.offloaded  # each stands in for what is loaded when it runs
        if both_away or embedding.form_tensors()["weight"] is head.form_tensors()["weight"]:
            del found[names[1]]
    return found


def forms_of(model: Any) -> dict[str, Form]:
    """The forms that a model holds, by module name; of tied modules the first one only."""
    return {name: holder.form for name, holder in holders_of(model).items()}


def densify(model: Any, dtype: torch.dtype) -> None:
    """Replace every compressed module, in place, by the dense one of the config's shapes, all in one `dtype`.

    Removed neurons come back as zero rows and columns, which changes no output: the result is a stock
    model that loads anywhere.

    Raises:
        LmpressError: parts of the model are offloaded.
    """
    if any(isinstance(module, FormHolder) and module.offloaded for module in model.modules()):
        raise LmpressError(
            "parts of this model are offloaded to memory or disk, and cannot be made dense there: load it "
            "without offloading (no `disk` in the device_map) before dequantize()"
        )
    plain, linears = skeleton(model.config, build=type(model)._from_config), linears_in(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, FormHolder):
            continue
        stock = plain.get_submodule(name)
        parts = linears[name].parts if name in linears else 1
        weight = _padded(module.form.dense(dtype), cast(Tensor, stock.weight).shape, parts)
        replacement = stock  # its buffers are real, and its parameters come now
        replacement.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = _padded(bias.data.to(dtype), cast(Tensor, stock.bias).shape, parts)
            replacement.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, replacement)
    cast_floats(model, dtype)
    vars(model).pop("_tied_weights_keys", None)  # those of the forms; the class knows those of the weights
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if _tied_names(model) is not None:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring what is computed in floating point to `dtype`, in place; scales and codes stay as stored."""
    held = {id(p) for m in model.modules() if isinstance(m, FormHolder) for p in m.form_tensors().values()}
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, FormHolder):
            _cast_leaves(module, dtype, done)
            if isinstance(module, CompressedEmbedding):
                module.dtype = dtype
        for parameter in list(module._parameters.values()):
            if parameter is None or id(parameter) in held or not parameter.is_floating_point():
                continue
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def _cast_leaves(module: FormHolder, dtype: torch.dtype, done: dict[int, nn.Parameter]) -> None:
    leaves = dense_leaf_names(module.form)
    for name, key in zip(module.form.tensors(), module.form_tensors(), strict=True):
        old = module.form_tensors()[key]
        if old.is_floating_point():
            old.requires_grad_(False)
        if name in leaves and old.dtype != dtype:
            if id(old) not in done:  # tied modules stay tied
                done[id(old)] = nn.Parameter(old.data.to(dtype), requires_grad=False)
            module.register_parameter(key, done[id(old)])
    _ = module.form  # bound anew, so that nothing keeps the old tensors alive


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no module {name}") from None


def _embedding(old: nn.Embedding, form: Form, dtype: torch.dtype) -> CompressedEmbedding:
    if isinstance(old, CompressedEmbedding):
        return CompressedEmbedding(form, dtype, old.multiplier, old.padding_idx)
    stock = cast(Any, old)
    scale = getattr(stock, "scalar_embed_scale", None)  # Gemma scales the rows that come out
    return CompressedEmbedding(form, dtype, scale, old.padding_idx)


def _bias(old: nn.Linear, form: Form, given: Tensor | None) -> Tensor | None:
    if given is not None:
        return given
    if old.bias is None:
        return None
    if old.bias.shape[0] == form.shape[0]:
        return old.bias.data
    return torch.empty(form.shape[0], dtype=old.bias.dtype, device="meta")


def _padded(tensor: Tensor, shape: torch.Size, parts: int) -> Tensor:
    """`tensor` with zeros behind it, behind each of the equal `parts` of its rows, up to `shape`."""
    if tensor.shape == shape:
        return tensor
    full = tensor.new_zeros(shape)
    for into, part in zip(full.chunk(parts), tensor.chunk(parts), strict=True):
        into[tuple(slice(0, n) for n in part.shape)] = part
    return full
