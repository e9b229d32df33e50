"""What a manifest tells of a module: its form, and how far it strays from what it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmpress.forms import Form
from lmpress.stream import Gathered


def error_report(before: Form, form: Form, gathered: Gathered | None) -> dict[str, Any]:
    """The form and its relative error: of the outputs on calibration text, where there is some."""
    weight, error = before.dense(), before.dense() - form.dense()
    if gathered is None:
        return plain_report(form) | {"relative_weight_error": _ratio(error, weight)}
    x = gathered.sample
    return plain_report(form) | {"relative_output_error": _ratio(x @ error.T, x @ weight.T)}


def plain_report(form: Form) -> dict[str, Any]:
    """What the form is."""
    return {"form": form.formula, "shape": list(form.shape), "bytes": form.num_bytes}


def _ratio(error: Tensor, whole: Tensor) -> float:
    return round(float(error.norm() / whole.norm().clamp_min(1e-30)), 6)
