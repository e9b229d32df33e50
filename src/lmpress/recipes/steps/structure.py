"""Steps that take whole neurons out."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lmpress.recipes.steps.base import Positive, Ratio, Step


class PruneNeurons(Step):
    """Structured removal of MLP neurons: SPQ's rule (arXiv 2602.18420) or the exact loss (2302.04089).

    Attributes:
        max_ratio: the most that a layer loses under `allocation: activation`.
        ratio: the share that all layers lose together under `allocation: uniform` and `loss`.
    """

    kind: ClassVar[str] = "prune_neurons"
    targets: Literal["mlp"] = "mlp"
    allocation: Literal["activation", "uniform", "loss"] = "activation"
    min_ratio: Ratio = 0.0
    max_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    importance: Literal["output", "activation"] = "output"
    compensate: bool = True
    multiple_of: Positive = 1

    @model_validator(mode="after")
    def _ratios_fit(self) -> PruneNeurons:
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio} is above max_ratio {self.max_ratio}")
        if self.allocation == "activation" and self.ratio is not None:
            raise ValueError(
                "allocation: activation takes min_ratio and max_ratio; `ratio` is for the others"
            )
        if self.allocation != "activation" and self.ratio is None:
            raise ValueError(f"allocation: {self.allocation} takes the share to remove as `ratio`")
        return self

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "output" or self.compensate or self.allocation == "loss"

    @property
    def needs_statistics(self) -> bool:
        return True
