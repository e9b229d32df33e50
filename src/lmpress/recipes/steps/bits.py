"""Steps that put weights on a grid."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from lmpress.forms import Dense, Form, NofM, Sparse
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import RoundOptions, parse_granularity, round_to_nearest
from lmpress.methods.sparsegpt import SparseGptOptions, quantize_survivors
from lmpress.recipes.steps.base import LeafContext, LeafStep, group_of
from lmpress.statistics import InputStatistics

HYBRIDS = ("percentile", "name", "meanstd")
"""Granularities that choose tensor or channel for each module (SPQ, arXiv 2602.18420)."""

SURVIVORS_NEED_GPTQ = (
    "what is sparse is quantized by `solver: gptq`, or in one pass by the `bits` of the step before"
)


class Quantize(LeafStep):
    """Linear quantization to 2 to 8 bits; SPQ's five granularities at 8 (arXiv 2602.18420).

    Attributes:
        granularity: `tensor`, `channel`, `group:N`, or a hybrid of tensor and channel by out-dimension
            (`percentile`, `meanstd`) or by module name (`name`).
        solver: `round` to the nearest grid point, or `gptq` (arXiv 2210.17323): column by column, what is not
            yet rounded makes up for what is, in the metric of the calibration text. Embeddings have no
            such metric and are rounded. What is sparse takes `gptq`: its survivors alone are
            quantized, and the pattern stays.
        clip: shrink each range to the least squared error.
        damping: of gptq: added to the Hessian's diagonal, relative to its mean.
        order: of gptq's columns: `group-aware` (largest inputs first, with contiguous groups), `activation`
            or `none`.
        sweeps: of gptq: passes of coordinate descent afterwards.
        percentile: of the out-dimensions, from which on `percentile` takes `channel`.
        std_factor: `meanstd` takes `channel` from mean + std_factor * standard deviation on.
    """

    kind: ClassVar[str] = "quantize"
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    granularity: str = "channel"
    symmetric: bool = True
    solver: Literal["round", "gptq"] = "round"
    clip: bool = False
    damping: Annotated[float, Field(ge=0, le=1)] = 0.03
    order: Literal["group-aware", "activation", "none"] = "group-aware"
    sweeps: Annotated[int, Field(ge=0, le=100)] = 0
    percentile: Annotated[float, Field(ge=0, le=100)] = 50.0
    std_factor: float = 0.5

    @field_validator("granularity")
    @classmethod
    def _granularity_is_known(cls, value: str) -> str:
        if value not in HYBRIDS:
            parse_granularity(value)
        return value

    @property
    def column_groups(self) -> dict[str, int]:
        return {} if self.hybrid else group_of(self.granularity)

    @property
    def needs_hessian(self) -> bool:
        return self.solver == "gptq" and self.targets != "embeddings"

    @property
    def hybrid(self) -> bool:
        """Whether tensor or channel is chosen module by module."""
        return self.granularity in HYBRIDS

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        granularity = context.granularity or self.granularity
        if isinstance(leaf, Sparse) and isinstance(leaf.values, Dense):
            return self._survivors(leaf, statistics, granularity)
        if not isinstance(leaf, Dense):
            raise ValueError(f"quantize takes dense weights, and this one is already {leaf.formula}")
        if self.solver == "gptq" and statistics is not None:
            return gptq(
                leaf.weight.float(),
                statistics,
                GptqOptions(
                    bits=self.bits,
                    granularity=granularity,
                    symmetric=self.symmetric,
                    damping=self.damping,
                    order=self.order,
                    clip=self.clip,
                    sweeps=self.sweeps,
                ),
            )
        options = RoundOptions(self.bits, granularity, self.symmetric, clip=self.clip)
        return round_to_nearest(leaf.weight, statistics, options)

    def _survivors(self, form: Sparse, statistics: InputStatistics | None, granularity: str) -> Rewritten:
        if self.solver != "gptq" or statistics is None:
            raise ValueError(SURVIVORS_NEED_GPTQ)
        pattern = form.pattern.name if isinstance(form.pattern, NofM) else "unstructured"
        options = SparseGptOptions(
            pattern=pattern,
            bits=self.bits,
            granularity=granularity,
            symmetric=self.symmetric,
            clip=self.clip,
            damping=self.damping,
            sweeps=self.sweeps,
        )
        return quantize_survivors(form, statistics, options)
