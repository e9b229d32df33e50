"""Which families there are, and the questions that the rest of the package asks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from lmpress.errors import RequestError
from lmpress.families.base import Family, Layout
from lmpress.families.llama_like import LlamaLike
from lmpress.families.opt import Opt
from lmpress.families.phi3 import Phi3

FAMILIES: list[Family] = [
    LlamaLike(),
    Opt(),
    Phi3(),
]


def supported() -> tuple[str, ...]:
    """The `model_type`s that a layout is known for."""
    return tuple(model_type for family in FAMILIES for model_type in family.model_types)


def layout_of(config: Any) -> Layout:
    """The layout of a model with this transformers config.

    Raises:
        RequestError: if the config's `model_type` is none that is supported.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family.layout(config)
    raise RequestError(
        f"a model of type {model_type!r} is not supported{_reason(config, model_type)};"
        f" the supported types are {', '.join(supported())}"
    )


def skeleton(
    config: Any,
    dtype: torch.dtype = torch.float32,
    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config,
) -> PreTrainedModel:
    """The causal language model of `config` without its weights, in eval mode.

    Parameters are on the meta device and take no memory; buffers that no checkpoint holds (rotary
    frequencies, the scale of an embedding) are real, on the CPU; tied weights are one parameter.

    Args:
        config: the model's transformers config; it is copied, not changed.
        dtype: the type that the parameters say they have.
        build: makes the model of a config, where it is to be another than the causal one.
    """
    with _EmptyOnMeta():
        model = build(copy.deepcopy(config), dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:  # a norm's: made by torch.ones
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                setattr(module, name, empty)
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, which linears and embeddings are made by, makes meta tensors; the rest is as ever."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _reason(config: Any, model_type: Any) -> str:
    """What a person may want to know about the type that is not supported, or nothing."""
    text_type = getattr(getattr(config, "text_config", None), "model_type", None)
    if text_type in supported():
        return f" (it holds more than text; a checkpoint of its text model alone, type {text_type!r}, is)"
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        return " (a mixture of experts)"
    return ""
