"""The modules that run a form: `CompressedLinear` and `CompressedEmbedding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmpress.forms.base import Form, dense_leaf_names
from lmpress.forms.packed import PackedWeight, as_parameter, real

Runner = Callable[[Form, Tensor], Tensor]
"""How a form runs on a device: (form, x of shape (..., in)) -> (..., out)."""


class FormHolder(nn.Module):
    """Keeps the tensors of a form as its own, so that they move, save and load like any other.

    The first tensor of the form is called `weight`, in its packed shape; the others keep their names in
    the form. Floating-point weights (and `weight`, whatever it is) are parameters; scales and the like
    are buffers, for they are no weights: `model.dtype` and `.to(dtype)` pass them by. Whoever replaces
    a tensor (a loader, `.to()`, an optimizer) need not tell: the form is bound anew whenever one of
    them is another object.

    The attribute `weight` is what other libraries take for the matrix: it is the parameter of that name where
    the form is `Dense`, and a `PackedWeight` elsewhere, which refuses to be computed with.
    """

    in_features: int
    out_features: int

    def hold(self, form: Form) -> None:
        """Take `form` in, tensors and all, in the place of what was held."""
        for name in getattr(self, "_names", {}).values():
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        tensors, weights = form.tensors(), dense_leaf_names(form)
        first = next(iter(tensors))
        self._names = {name: "weight" if name == first else name for name in tensors}
        for name, tensor in tensors.items():
            if name == first or name in weights:
                self.register_parameter(self._names[name], as_parameter(tensor))
            else:
                self.register_buffer(self._names[name], tensor.detach())
        self.out_features, self.in_features = form.shape
        self._bound: tuple[dict[str, Tensor], Form] = ({}, form)  # replaced whole: threads read it
        vars(self)["_view"] = None  # of `weight`, made when it is asked for
        self._stored: Form | None = None

    def hold_resident(self, resident: Form | None = None) -> None:
        """Keep the form as it is best run from now on; `stored_form` is what it was.

        Args:
            resident: a form that `stored` of the present one undoes; its `resident()` where it is None.
        """
        stored = self.form
        resident = stored.resident() if resident is None else resident
        if resident is not stored:
            self.hold(resident)
            self._stored = stored.without_values()

    @property
    def stored_form(self) -> Form:
        """The form as a checkpoint stores it, over the tensors as they are now.

        It is the form that runs where that holds more than the stored kind can: weights off its pattern,
        which training or a merged adapter put there.
        """
        form = self.form
        if self._stored is None:
            return form
        device = next(iter(form.tensors().values())).device
        kept = {n: t if t.is_meta else t.to(device) for n, t in self._stored.tensors().items()}
        stored = self._stored.with_tensors(kept).stored(form)
        return stored if _nonzero_weights(stored) == _nonzero_weights(form) else form

    @property
    def form(self) -> Form:
        """The form over the tensors as they are now."""
        bound, form = self._bound
        for name in self._names.values():
            if self._tensor(name) is not bound.get(name):
                break
        else:
            return form
        bound = self.form_tensors()
        form = form.with_tensors({name: bound[own] for name, own in self._names.items()})
        self._bound = bound, form
        return form

    @property
    def offloaded(self) -> bool:
        """Whether a tensor of the form is on the meta device, as where accelerate brings it for each call."""
        return any(tensor.is_meta for tensor in self.form_tensors().values())

    def form_tensors(self) -> dict[str, Tensor]:
        """The tensors that make up the form, by their names in the module."""
        return {name: self._tensor(name) for name in self._names.values()}

    def kept_beside(self) -> list[Tensor]:
        """What brings the stored form back, beside the tensors that run: in memory, in no state dict."""
        running = {tensor.data_ptr() for tensor in self.form_tensors().values()}
        kept = [] if self._stored is None else list(self._stored.tensors().values())
        return [tensor for tensor in kept if not tensor.is_meta and tensor.data_ptr() not in running]

    def share(self, other: FormHolder) -> None:
        """Take the tensors of `other` for one's own: tied modules. They are saved with `other` alone."""
        self.hold(other.form)
        for name, tensor in other.form_tensors().items():
            if name in self._parameters:
                self._parameters[name] = cast(nn.Parameter, tensor)
            else:
                self.register_buffer(name, tensor.detach(), persistent=False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ever, for the parameter behind a view, and with codes that say why they cannot be trained."""
        param = real(param)
        if type(param) is nn.Parameter and not param.is_floating_point():
            attributes, param = vars(param), as_parameter(param)
            vars(param).update(attributes)  # such as a loader's mark
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return repr(self._bound[1])

    def __getattr__(self, name: str) -> Any:
        held = vars(self)
        if name != "weight" or "_bound" not in held or self._bound[1].kind == "dense":
            return super().__getattr__(name)
        if name not in self._parameters:  # while another form is taken in
            return super().__getattr__(name)
        parameter = cast(nn.Parameter, self._tensor(name))
        if held["_view"] is None or held["_view"].parameter is not parameter:
            held["_view"] = PackedWeight.of(parameter, self._bound[1].formula)  # nn.Module would register it
        return held["_view"]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_view": None}  # made anew from the copied parameter

    def _tensor(self, name: str) -> Tensor:
        tensor = self._parameters.get(name)
        if type(tensor) is PackedWeight:  # registered by a loader that passes `register_parameter` by
            tensor = self._parameters[name] = tensor.parameter
        return cast(Tensor, self._buffers[name] if tensor is None else tensor)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.form_tensors()  # no view among them from now on
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ever, but a scale keeps its type: in another one it would be another grid."""
        before = {name: self._buffers[name] for name in self._names.values() if name in self._buffers}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return result


class CompressedLinear(FormHolder, nn.Linear):
    """`y = form(x) + bias`: a drop-in for `nn.Linear`, and a subclass of it, so that PEFT accepts it.

    Args:
        form: the weight, (out, in).
        bias: (out,), or None.
        runner: how to run the form; `form.forward` where it is None, or where gradients are wanted.
    """

    def __init__(self, form: Form, bias: Tensor | None = None, runner: Runner | None = None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a dense weight
        self.hold(form)
        self.runner = runner
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:  # (..., in) -> (..., out)
        form = self.form
        run = self.runner or type(form).forward
        if not torch.is_grad_enabled():
            y = run(form, input)
        elif any(t.requires_grad for t in self.form_tensors().values()):
            y = form.forward(input)
        elif input.requires_grad:
            rows = input.reshape(-1, input.shape[-1])
            y = cast(Tensor, _FrozenProduct.apply(rows, form, run))  # type: ignore[no-untyped-call]
            y = y.view(*input.shape[:-1], y.shape[1])
        else:
            y = run(form, input)
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def reset_parameters(self) -> None:
        """Nothing to draw: a form comes with its tensors."""


class _FrozenProduct(torch.autograd.Function):
    """y = x @ W.T for a form that is not trained: backward builds W anew, and no graph keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, run: Runner) -> Tensor:
        ctx.form = form
        y = run(form, x)
        return (
            y.clone() if y._is_view() else y
        )  # autograd lets nobody write into a view that was made in here

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]  # (..., out)
        return gradient @ ctx.form.dense(gradient.dtype), None, None


class CompressedEmbedding(FormHolder, nn.Embedding):
    """A lookup table (tokens, width) held as a form, and an `nn.Embedding`, so that PEFT accepts it.

    Args:
        form: the table.
        dtype: of the rows that come out; the model's, unless a loader says otherwise.
        scale: what the rows are multiplied by (Gemma's embeddings are scaled), None for nothing; it is kept
            as `multiplier`.
    """

    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        form: Form,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
        padding_idx: int | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's, which would make a dense table
        self.hold(form)
        self.dtype = dtype
        self.multiplier = scale  # `scale` is the name of a grid's parameter
        self.padding_idx = padding_idx

    def hold(self, form: Form) -> None:
        super().hold(form)
        self.num_embeddings, self.embedding_dim = form.shape

    @property
    def embed_scale(self) -> Tensor:
        """The multiplier, as Gemma's own embedding tells it and PEFT asks; without one, no attribute."""
        if self.multiplier is None:
            raise AttributeError("embed_scale")
        return torch.tensor(self.multiplier)

    def forward(self, input: Tensor) -> Tensor:  # (...) -> (..., width)
        rows = self.form.rows(input).to(self.dtype)
        # Gemma multiplies by sqrt(width) rounded to the dtype of the table
        return rows if self.multiplier is None else rows * torch.tensor(self.multiplier).to(rows)

    def reset_parameters(self) -> None:
        """Nothing to draw: a form comes with its tensors."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follow .to(dtype), .half(), ...
        return super()._apply(fn, recurse)


def _nonzero_weights(form: Form) -> int:
    """How many floating-point weights of a form are not zero; those on the meta device count for none."""
    tensors = form.tensors()
    return sum(
        int(tensors[name].count_nonzero()) for name in dense_leaf_names(form) if not tensors[name].is_meta
    )
