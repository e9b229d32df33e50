"""Steps that take whole neurons out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lmpress.families import BlockLayout, Rows, Site
from lmpress.methods.neuron_pruning import NeuronOptions, aligned_width, prune_neurons
from lmpress.recipes.steps.base import (
    Junction,
    Positive,
    Ratio,
    SiteRewritten,
    SiteStep,
    Step,
    forms_before,
)
from lmpress.statistics import Channels


class PruneNeurons(SiteStep):
    """Structured removal of MLP neurons: SPQ's rule (arXiv 2602.18420) or the exact loss (2302.04089).

    Attributes:
        max_ratio: the most that a layer loses under `allocation: activation`.
        ratio: the share that all layers lose together under `allocation: uniform` and `loss`.
    """

    kind: ClassVar[str] = "prune_neurons"
    once: ClassVar[str | None] = "neurons are pruned once in a recipe"
    told_as: ClassVar[str | None] = "neurons"
    targets: Literal["mlp"] = "mlp"
    allocation: Literal["activation", "uniform", "loss"] = "activation"
    min_ratio: Ratio = 0.0
    max_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    importance: Literal["output", "activation"] = "output"
    compensate: bool = NeuronOptions.compensate
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
    def budget(self) -> str | None:
        return None if self.allocation == "uniform" else "widths"

    @property
    def needs_hessian(self) -> bool:
        return self.importance == "output" or self.compensate or self.allocation == "loss"

    @property
    def needs_statistics(self) -> bool:
        return True

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        # scaled neurons would be ranked by their scales, and these were made for columns that go
        before = next((s.kind for s in earlier if s.scope == "sites"), None) or forms_before(earlier)
        return f"prune_neurons comes before {before} of the same MLP" if before else None

    def overlaps(self, other: Step) -> bool:
        return "mlp" in other.targets or super().overlaps(other)

    def sites(self, block: BlockLayout) -> tuple[Site, ...]:
        return (block.site_of(block.neurons.output),)

    def touched(self, site: Site, block: BlockLayout) -> tuple[str, ...]:
        return (*block.neurons.linears, *site.linears)

    def signal(self, block: BlockLayout) -> Rows | None:
        return block.neurons.signal if self.importance == "activation" else None

    def width(self, neurons: int) -> int:
        """How many of its neurons a layer keeps under `allocation: uniform`."""
        return aligned_width(neurons, self.ratio or 0.0, self.multiple_of)

    def narrowed(
        self, shape: tuple[int, int], linear: str, block: BlockLayout
    ) -> tuple[tuple[int, int], bool]:
        rows, columns = shape
        parts, reads = block.neurons.parts(linear), linear == block.neurons.output
        if self.allocation == "activation":
            return shape, not (parts or reads)
        if parts:
            return (parts * self.width(rows // parts), columns), self.allocation == "uniform"
        return ((rows, self.width(columns)), self.allocation == "uniform") if reads else (shape, True)

    def unit(self, linear: str, block: BlockLayout) -> int:
        return self.multiple_of if linear == block.neurons.output else 0

    def rewrite_site(self, junction: Junction) -> SiteRewritten | None:
        ((linear, weight),) = junction.readers.items()
        total = weight.shape[1]
        width = self.width(total) if junction.share is None else int(junction.share)
        if width >= total:
            return SiteRewritten(junction.readers, Channels(), None, {"kept": total, "removed": 0})
        if junction.statistics is None:
            raise ValueError("prune_neurons needs calibration text")
        choice = prune_neurons(
            weight,
            junction.statistics,
            width,
            self.told(NeuronOptions),
            activation=junction.activation,
            output_bias=junction.bias,
        )
        bias = None
        if junction.bias is not None and choice.bias_delta is not None:
            bias = junction.bias + choice.bias_delta.to(junction.bias)
        return SiteRewritten({linear: choice.output}, Channels(choice.keep), bias, choice.report)
