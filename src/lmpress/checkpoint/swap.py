"""Forms into a model, and out of it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmpress.errors import LmpressError
from lmpress.families import layout_of
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
    layout = layout_of(model.config)
    for name, form in forms.items():
        old = _module(model, name)
        new: nn.Module
        if isinstance(old, nn.Embedding | CompressedEmbedding):
            new = _embedding(old, form, dtype or model.dtype)
        elif isinstance(old, nn.Linear):
            new = CompressedLinear(form, _bias(old, form, (biases or {}).get(name)), run)
        else:
            raise ValueError(f"{name} is a {type(old).__name__}, not a linear or an embedding")
        new.train(old.training)
        model.set_submodule(name, new)
    if layout.tied and layout.embedding in forms:
        tie_head(model)


def hold_resident(model: nn.Module, names: Iterable[str], coded: bool = False) -> None:
    """Keep the forms of a loaded model as they are best run, in place; `stored_form` is what they were.

    Args:
        names: of the modules that hold them. Of embeddings nothing is made resident but entropy-coded parts.
        coded: leave modules with entropy-coded parts as they are: each call then decodes them anew.

    Raises:
        LmpressError: names the module whose weights are damaged.
    """
    holders = {name: cast(FormHolder, model.get_submodule(name)) for name in names}
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
    """Let the head share the tensors of a compressed embedding, and tell transformers which they are."""
    layout = layout_of(model.config)
    embedding = cast(CompressedEmbedding, model.get_submodule(layout.embedding))
    head = CompressedLinear(embedding.form, None, run)
    head.share(embedding)
    model.set_submodule(layout.head, head)
    parameters = [name for name, _ in embedding.named_parameters(recurse=False)]
    tied = {f"{layout.head}.{name}": f"{layout.embedding}.{name}" for name in parameters}
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = {**getattr(model, "all_tied_weights_keys", {}), **tied}


def forms_of(model: nn.Module) -> dict[str, Form]:
    """The forms that a model holds, by module name; of tied modules the first one only."""
    found: dict[str, Form] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, FormHolder):
            first = id(module.form_tensors()["weight"])
            if first not in seen:
                seen.add(first)
                found[name] = module.form
    return found


def densify(model: Any, dtype: torch.dtype) -> None:
    """Replace every compressed module, in place, by the dense one of the config's shapes.

    Removed neurons come back as zero rows and columns, which changes no output: the result is a stock
    model that loads anywhere.
    """
    from lmpress.families import skeleton

    layout = layout_of(model.config)
    plain = skeleton(model.config)
    neurons = {
        f"{layout.block_name(i)}.{linear}": layout.block(i).neurons.parts(linear)
        for i in range(layout.num_blocks)
        for linear in layout.block(i).linears
    }
    for name, module in list(model.named_modules()):
        if not isinstance(module, FormHolder):
            continue
        stock = plain.get_submodule(name)
        parts = neurons.get(name) or 1
        weight = _padded(module.form.dense(dtype), cast(Tensor, stock.weight).shape, parts)
        replacement = stock  # its buffers are real, and its parameters come now
        replacement.weight = nn.Parameter(weight, requires_grad=False)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = _padded(bias.data.to(dtype), cast(Tensor, stock.bias).shape, parts)
            replacement.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(name, replacement)
    if layout.tied:
        model.get_submodule(layout.head).weight = model.get_submodule(layout.embedding).weight


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


def _embedding(
    old: nn.Embedding | CompressedEmbedding, form: Form, dtype: torch.dtype
) -> CompressedEmbedding:
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
