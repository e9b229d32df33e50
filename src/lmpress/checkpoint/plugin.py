"""The transformers plug-in: `from_pretrained` on a directory that lmpress wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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

from lmpress.checkpoint.files import read_header
from lmpress.checkpoint.fit import check_fit
from lmpress.checkpoint.plan import (
    FORMAT_VERSION,
    check_absent,
    check_stored,
    check_version,
    empty_forms,
    names_in,
)
from lmpress.checkpoint.swap import (
    cast_floats,
    densify,
    hold_resident,
    holders_of,
    put_forms,
    tie_head,
    use_sparse_cores,
)
from lmpress.errors import RequestError
from lmpress.forms import Form, form_from_description
from lmpress.forms.base import dense_leaf_names, float_dtype
from lmpress.forms.linear import FormHolder

METHOD = "lmpress"

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
        check_version(self.quantization_config.version, "config.json")

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None  # as stored; `_process_model_after_weight_loading` casts what is computed with

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        self._dtype = model.dtype  # the skeleton was made in the type that the user asked for
        config = self.quantization_config
        forms = empty_forms(config.plan, "config.json")
        names = names_in(model, forms)
        if absent := forms.keys() - names.keys():
            check_absent(model.config, sorted(absent))
        if checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            files = [Path(file) for file in checkpoint_files]
            headers = {name: entry for file in files for name, entry in read_header(file).items()}
            check_stored(forms, headers, str(files[0].parent))
        config.plan = {own: config.plan[name] for name, own in names.items()}
        held = {own: forms[name] for name, own in names.items()}
        check_fit(model, held, "config.json")
        put_forms(model, held, dtype=self._dtype)
        for name in held:  # checked above; random numbers, which transformers gives to others, fit no codes
            model.get_submodule(name)._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        hold_resident(model, self.quantization_config.plan, self.quantization_config.resident == "coded")
        tie_head(model)
        cast_floats(model, self._dtype)
        use_sparse_cores(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state as a checkpoint holds it, and the plan of what the model holds now.

        Weights are in the types of the plan wherever that loses nothing, so that saving again gives the forms
        bit for bit. A form that takes other bytes when coded anew, as with another numpy it might, or that
        became another one, is described anew; what is no form any more leaves the plan.
        """
        state = model.state_dict()
        planned, plan = self.quantization_config.plan, {}
        unique = holders_of(model)
        for name, holder in model.named_modules():
            if isinstance(holder, FormHolder):
                for parameter in holder.form_tensors():
                    state.pop(f"{name}.{parameter}", None)  # of a tied head: stored with the embedding
        for name, holder in unique.items():
            form = holder.stored_form
            if name in planned:
                form = _in_types_of(form_from_description(planned[name]), form)
            for place, (tensor, value) in enumerate(form.tensors().items()):
                state[f"{name}.weight" if place == 0 else f"{name}.{tensor}"] = value.detach()
            plan[name] = form.describe()
        self.quantization_config.plan = plan
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


def _in_types_of(planned: Form, form: Form) -> Form:
    """`form` with its weights in the types that they have in `planned`, wherever that rounds none."""
    types, leaves = {name: t.dtype for name, t in planned.tensors().items()}, dense_leaf_names(form)
    tensors = form.tensors()
    for name in leaves & types.keys():
        tensor = tensors[name]
        cast = tensor.to(types[name])
        if tensor.is_meta or torch.equal(cast.to(tensor.dtype), tensor):
            tensors[name] = cast
    return form.with_tensors(tensors)
