"""The transformers plug-in: `from_pretrained` on a directory that lmpress wrote."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmpress.checkpoint.swap import cast_floats, densify, hold_resident, put_forms, tie_head, use_sparse_cores
from lmpress.errors import LmpressError, RequestError
from lmpress.families import layout_of
from lmpress.forms import form_from_description
from lmpress.forms.base import dense_leaf_names, float_dtype
from lmpress.forms.linear import FormHolder

METHOD = "lmpress"
FORMAT_VERSION = 1

RESIDENT = ("decoded", "coded")
"""How entropy-coded weights are kept in memory: decoded once; or as stored, and decoded in every call."""


class LmpressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` in config.json.

    Attributes:
        version: of the checkpoint format.
        plan: the description of each compressed module's form, by module name.
        resident: one of `RESIDENT`; a wish for loading, which says nothing of the weights.
        stated: what config.json says of `resident`, and will say again; None for nothing.

    Raises:
        RequestError: another `resident`.
    """

    def __init__(
        self,
        plan: dict[str, dict[str, Any]] | None = None,
        version: int = FORMAT_VERSION,
        resident: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version = version
        self.plan = plan or {}
        self.stated = resident
        self.resident = checked_resident(resident or RESIDENT[0])

    def to_dict(self) -> dict[str, Any]:
        named = {"quant_method": METHOD, "version": self.version, "plan": self.plan}
        return named if self.stated is None else named | {"resident": self.stated}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def checked_resident(resident: str) -> str:
    """`resident` itself. RequestError where it is none of `RESIDENT`."""
    if resident not in RESIDENT:
        raise RequestError(f"resident is {' or '.join(RESIDENT)}, not {resident!r}")
    return resident


class LmpressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the plan's forms into the skeleton before the weights are loaded, and casts what is left after."""

    requires_calibration = True

    def __init__(self, quantization_config: LmpressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype: torch.dtype = torch.float32

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        version = self.quantization_config.version
        if version > FORMAT_VERSION:
            raise LmpressError(
                f"this checkpoint has format {version}, and this lmpress reads {FORMAT_VERSION}: upgrade it"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None  # as stored; `_process_model_after_weight_loading` casts what is computed with

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._dtype = model.dtype  # the skeleton was made in the type that the user asked for
        plan = self.quantization_config.plan
        forms = {name: form_from_description(description) for name, description in plan.items()}
        put_forms(model, forms, dtype=self._dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        layout = layout_of(model.config)
        hold_resident(model, self.quantization_config.plan, self.quantization_config.resident == "coded")
        if layout.tied and layout.embedding in self.quantization_config.plan:
            tie_head(model)
        cast_floats(model, self._dtype)
        use_sparse_cores(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state in the types of the plan, so that saving again gives the forms bit for bit.

        The plan is told of a form that takes other bytes when coded anew, as with another numpy it might.
        """
        state = model.state_dict()
        plan = self.quantization_config.plan
        for name, description in plan.items():
            holder = model.get_submodule(name)
            if not isinstance(holder, FormHolder):
                continue
            form = holder.stored_form
            if form is not holder.form:
                for parameter in holder.form_tensors():
                    del state[f"{name}.{parameter}"]
            leaves = dense_leaf_names(form)
            stored = form_from_description(description).tensors()
            tensors = {n: t.to(stored[n].dtype) if n in leaves else t for n, t in form.tensors().items()}
            for place, (tensor, value) in enumerate(tensors.items()):
                state[f"{name}.weight" if place == 0 else f"{name}.{tensor}"] = value
            plan[name] = form.with_tensors(tensors).describe()
        layout = layout_of(model.config)
        head = model.get_submodule(layout.head)
        if layout.tied and layout.embedding in plan and isinstance(head, FormHolder):
            for parameter in head.form_tensors():  # stored with the embedding
                state.pop(f"{layout.head}.{parameter}", None)
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # transformers takes it from a config, where saving leaves a name
            dtype = float_dtype(dtype)
        densify(model, dtype or self._dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Make transformers know the method; harmless when repeated."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LmpressConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LmpressQuantizer)
