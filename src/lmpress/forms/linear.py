"""The modules that run a form: `CompressedLinear` and `CompressedEmbedding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmpress.forms.base import Form

Runner = Callable[[Form, Tensor], Tensor]
"""How a form runs on a device: (form, x of shape (..., in)) -> (..., out)."""


class FormHolder(nn.Module):
    """Keeps the tensors of a form as parameters, so that they move, save and load like any other.

    The first tensor of the form is the parameter `weight`, in its packed shape; the others keep
    their names in the form. Whoever replaces a parameter (a loader, `.to()`, an optimizer) need not
    tell: the form is bound anew to the parameters whenever one of them is another object.
    """

    in_features: int
    out_features: int

    def hold(self, form: Form) -> None:
        """Take `form` in, tensors and all, in the place of what was held."""
        for name in getattr(self, "_names", {}).values():
            self._parameters.pop(name, None)
        tensors = form.tensors()
        first = next(iter(tensors))
        self._names = {name: "weight" if name == first else name for name in tensors}
        for name, tensor in tensors.items():
            self.register_parameter(self._names[name], nn.Parameter(tensor, requires_grad=False))
        self.out_features, self.in_features = form.shape
        self._form = form
        self._bound: dict[str, Tensor] = {}

    @property
    def form(self) -> Form:
        """The form over the parameters as they are now."""
        parameters, bound = self._parameters, self._bound
        for name in self._names.values():
            if parameters[name] is not bound.get(name):
                break
        else:
            return self._form
        self._bound = {name: cast(Tensor, parameters[name]) for name in self._names.values()}
        self._form = self._form.with_tensors({n: self._bound[p] for n, p in self._names.items()})
        return self._form

    def form_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that make up the form, by their names in the module."""
        return {p: cast(nn.Parameter, self._parameters[p]) for p in self._names.values()}

    def extra_repr(self) -> str:
        return repr(self._form)


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
        elif any(p.requires_grad for p in self.form_parameters().values()):
            y = form.forward(input)
        elif input.requires_grad:
            y = cast(Tensor, _FrozenProduct.apply(input, form, run))  # type: ignore[no-untyped-call]
        else:
            y = run(form, input)
        return y if self.bias is None else y + self.bias

    def reset_parameters(self) -> None:
        """Nothing to draw: a form comes with its tensors."""


class _FrozenProduct(torch.autograd.Function):
    """y = x @ W.T for a form that is not trained: backward builds W anew, and no graph keeps it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Form, run: Runner) -> Tensor:
        ctx.form = form
        return run(form, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]  # (..., out)
        return gradient @ ctx.form.dense(gradient.dtype), None, None


class CompressedEmbedding(FormHolder):
    """A lookup table (tokens, width) held as a form.

    Args:
        form: the table.
        dtype: of the rows that come out; the model's, unless a loader says otherwise.
        scale: what the rows are multiplied by (Gemma's embeddings are scaled), None for nothing; it is kept
            as `multiplier`.
    """

    def __init__(
        self,
        form: Form,
        dtype: torch.dtype = torch.float32,
        scale: float | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.hold(form)
        self.dtype = dtype
        self.multiplier = scale  # `scale` is the name of a grid's parameter
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        """Tokens in the table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width of a row."""
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:  # (...) -> (..., width)
        rows = self.form.rows(input).to(self.dtype)
        # Gemma multiplies by sqrt(width) rounded to the dtype of the table
        return rows if self.multiplier is None else rows * torch.tensor(self.multiplier).to(rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follow .to(dtype), .half(), ...
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
