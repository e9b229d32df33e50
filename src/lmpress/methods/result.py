"""What a method gives back: the new form, and what is worth telling about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lmpress.forms import Form


@dataclass(frozen=True)
class Rewritten:
    """The result of a method on one weight.

    Attributes:
        form: the new form; the old one where the method found nothing worth doing.
        report: JSON-able facts for the manifest (rank, damping, reason for staying dense, ...).
        target: the dense weight (out, in) that the form was fitted to, where the method moved it away from
            the one that it was given (asymmetric calibration); None where it did not. A later step that
            fits to anything else would undo the move.
    """

    form: Form
    report: dict[str, Any] = field(default_factory=dict)
    target: Tensor | None = None
