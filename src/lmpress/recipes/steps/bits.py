"""Steps that put weights on a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from lmpress.forms import Form, Sparse
from lmpress.methods.entropy_quantization import EntropyOptions, entropy_quantize
from lmpress.methods.entropy_table import entropy_round
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.granularity import hybrid_granularities
from lmpress.methods.patterns import check_grid_fits
from lmpress.methods.result import Rewritten
from lmpress.methods.rtn import RoundOptions, parse_granularity, round_to_nearest
from lmpress.methods.sparsegpt import SparseGptOptions, quantize_survivors
from lmpress.recipes.outline import Outline
from lmpress.recipes.steps.base import LeafContext, LeafStep, Ratio, Step, group_of
from lmpress.statistics import InputStatistics

HYBRIDS = ("percentile", "name", "meanstd")
"""Granularities that choose tensor or channel for each module (SPQ, arXiv 2602.18420)."""

RAREST = 0.005
"""No token counts as less probable than this, relative to the mean: text of other domains has others."""

SURVIVORS_NEED_GPTQ = (
    "what is sparse is quantized by `solver: gptq`, or in one pass by the `bits` of the step before"
)


class _Codes(LeafStep):
    """What both steps have in common: all that they leave is codes."""

    leaves_codes: ClassVar[bool] = True
    takes_floats: ClassVar[bool] = True
    bits: int | float

    def _coded(self, outline: Outline) -> Outline:
        """`bits` is what all together takes a weight; who gets more is not known yet."""
        leaves = tuple(replace(leaf, bits=self.bits, coded=True) for leaf in outline.leaves)
        return replace(outline, leaves=leaves, exact=False)


class Quantize(_Codes):
    """Linear quantization to 2 to 8 bits; SPQ's five granularities at 8 (arXiv 2602.18420).

    Attributes:
        granularity: `tensor`, `channel`, `group:N`, or a hybrid of tensor and channel by out-dimension
            (`percentile`, `meanstd`) or by module name (`name`).
        solver: `round` to the nearest grid point, or `gptq` (arXiv 2210.17323): column by column, what is not
            yet rounded makes up for what is, in the metric of the calibration text. What is sparse takes
            `gptq`: its survivors alone are quantized, and the pattern stays.
        clip: shrink each range to the least squared error.
        damping: of gptq: added to the Hessian's diagonal, relative to its mean.
        order: of gptq's columns: `group-aware` (largest inputs first, with contiguous groups), `activation`
            or `none`.
        sweeps: of gptq: passes of coordinate descent afterwards.
        allocation: `uniform` gives every module the same bits. `mixed` takes `bits` as what all modules
            together may take a weight, scales included, such as 4.25, and gives each 2 to 8 bits of its own:
            the least loss that the model is expected to have, by an exact knapsack.
        asymmetry: of gptq: how far to move towards the outputs of the dense model, 0 to 1 (GPTAQ, arXiv
            2504.02692): errors of the blocks before are made up for. Calibration takes twice as long.
        percentile: of the out-dimensions, from which on `percentile` takes `channel`.
        std_factor: `meanstd` takes `channel` from mean + std_factor * standard deviation on.
    """

    kind: ClassVar[str] = "quantize"
    bits: Annotated[int | float, Field(ge=2, le=9)] = 8
    allocation: Literal["uniform", "mixed"] = "uniform"
    granularity: str = GptqOptions.granularity
    symmetric: bool = GptqOptions.symmetric
    solver: Literal["round", "gptq"] = "round"
    clip: bool = GptqOptions.clip
    damping: Annotated[float, Field(ge=0, le=1)] = GptqOptions.damping
    order: Literal["group-aware", "activation", "none"] = GptqOptions.order
    sweeps: Annotated[int, Field(ge=0, le=100)] = GptqOptions.sweeps
    asymmetry: Annotated[float, Field(ge=0, le=1)] = GptqOptions.asymmetry
    percentile: Annotated[float, Field(ge=0, le=100)] = 50.0
    std_factor: float = 0.5

    @field_validator("granularity")
    @classmethod
    def _granularity_is_known(cls, value: str) -> str:
        if value not in HYBRIDS:
            parse_granularity(value)
        return value

    @model_validator(mode="after")
    def _bits_are_whole(self) -> Quantize:
        if self.allocation == "uniform" and (self.bits > 8 or self.bits != int(self.bits)):
            raise ValueError("bits are 2, 3, ... 8; a share of a bit takes allocation: mixed")
        if self.allocation == "mixed" and self.hybrid:
            raise ValueError("allocation: mixed takes granularity tensor, channel or group:N")
        if self.allocation == "mixed" and self.targets == "embeddings":
            raise ValueError("allocation: mixed works on the linears of the blocks, not on embeddings")
        return self

    @property
    def blocks_only(self) -> bool:
        return self.allocation == "mixed"

    @property
    def uniform_bits(self) -> int:
        """The bits of every code, where all modules have the same."""
        return int(self.bits)

    @property
    def budget(self) -> str | None:
        return "bits" if self.allocation == "mixed" else None

    @property
    def column_groups(self) -> dict[str, int]:
        return {} if self.hybrid else group_of(self.granularity)

    @property
    def needs_hessian(self) -> bool:
        return (self.solver == "gptq" or self.budget is not None) and self.targets != "embeddings"

    @property
    def weighs_tokens(self) -> bool:
        return self.solver == "gptq"

    @property
    def needs_original(self) -> bool:
        return self.solver == "gptq" and self.asymmetry > 0

    @property
    def hybrid(self) -> bool:
        """Whether tensor or channel is chosen module by module."""
        return self.granularity in HYBRIDS

    def granularities(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        if not self.hybrid:
            return {}
        return hybrid_granularities(shapes, self.granularity, percentile=self.percentile, k=self.std_factor)

    def grid(self) -> RoundOptions | None:
        bits = min(8, max(2, round(self.bits)))
        granularity = "channel" if self.hybrid else self.granularity
        return self.told(RoundOptions, bits=bits, granularity=granularity)

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        for s in earlier:
            if s.leaves_codes:  # named by number in the plan, which sees the modules
                continue
            if s.has_bits:
                return f"{s.kind} with bits has quantized these modules already; leave one of the two out"
            if s.leaves_pattern:
                if self.solver != "gptq":
                    return SURVIVORS_NEED_GPTQ
                try:
                    check_grid_fits(self.symmetric, self.granularity == "tensor", s.group)
                except ValueError as error:
                    return f"after {s.kind}: {error}"
        return None

    def after(self, outline: Outline) -> Outline:
        if self.budget is not None:
            return self._coded(outline)
        grid = outline.granularity or self.granularity
        leaves = tuple(
            replace(leaf, bits=self.uniform_bits, granularity=grid, symmetric=self.symmetric)
            for leaf in outline.leaves
        )
        return replace(outline, leaves=leaves)

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        granularity = context.granularity or self.granularity
        bits = self.uniform_bits if context.share is None else int(context.share)
        weight = leaf.plain
        if isinstance(leaf, Sparse) and leaf.values.plain is not None:
            return self._survivors(leaf, statistics, granularity, bits)
        if weight is None:
            raise ValueError(f"quantize takes dense weights, and this one is already {leaf.formula}")
        if self.solver == "gptq" and statistics is not None:
            solver = self.told(GptqOptions, bits=bits, granularity=granularity)
            cross = context.cross if self.needs_original else None
            return gptq(weight.float(), statistics, solver, cross)
        grid = self.told(RoundOptions, bits=bits, granularity=granularity)
        return round_to_nearest(weight, statistics, grid)

    def _survivors(
        self, form: Sparse, statistics: InputStatistics | None, granularity: str, bits: int
    ) -> Rewritten:
        if self.solver != "gptq" or statistics is None:
            raise ValueError(SURVIVORS_NEED_GPTQ)
        pattern = "unstructured" if form.pattern.group is None else form.pattern.name
        options = self.told(SparseGptOptions, pattern=pattern, bits=bits, granularity=granularity)
        return quantize_survivors(form, statistics, options)


class EntropyQuantize(_Codes):
    """GPTQ on a uniform grid of free step, the codes stored by an entropy coder.

    One constant sets every step of every module, by how sensitive the model is to each output and by the
    conditional deviation of each input: columns, rows and modules share the bits by themselves. The constant
    is found on the sizes that the coder really reaches.

    Attributes:
        bits: a weight, all that is stored counted, of the weights that are coded.
        damping: added to the Hessian's diagonal, relative to its mean.
        dead_zone: codes round towards zero by this, times step over standard deviation; it saves bits.
        token_weight: of embeddings and heads: an error in the row of a token counts by this power of the
            token's mean probability on calibration text; 0 for all alike. At 5 bits on SmolLM2-135M, 0.5
            gives a third to a fifth of the KL divergence of 0, on text of another domain too.
        asymmetry: how far to move towards the outputs of the dense model, 0 to 1, as in `quantize`.
        largest_code: no code is larger; 127 keeps every decoded code to a byte. None leaves them free: the
            few that need more are kept apart in memory.
    """

    kind: ClassVar[str] = "entropy_quantize"
    takes_updates: ClassVar[bool] = False
    bits: Annotated[float, Field(gt=0, le=12)] = 4.0
    damping: Annotated[float, Field(ge=0, le=1)] = EntropyOptions.damping
    dead_zone: Annotated[float, Field(ge=0, le=1)] = EntropyOptions.dead_zone
    token_weight: Ratio = 0.5
    asymmetry: Annotated[float, Field(ge=0, le=1)] = EntropyOptions.asymmetry
    largest_code: Annotated[int, Field(ge=1)] | None = EntropyOptions.largest_code

    @property
    def needs_hessian(self) -> bool:
        return self.targets != "embeddings"

    @property
    def budget(self) -> str | None:
        return None if self.targets == "embeddings" else "rate"

    @property
    def needs_original(self) -> bool:
        return self.asymmetry > 0

    @property
    def weighs_tokens(self) -> bool:
        return self.token_weight > 0

    def options(self) -> EntropyOptions:
        """The options of the method."""
        return self.told(EntropyOptions)

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        for s in earlier:
            if s.leaves_pattern:
                return f"an entropy coder stores zeros at what they are worth; leave {s.kind} out"
            if s.has_bits and not s.leaves_codes:
                return f"{s.kind} with bits has quantized these modules already; leave one of the two out"
        return None

    def after(self, outline: Outline) -> Outline:
        return self._coded(outline)

    def _rows(self, probability: Tensor | None) -> float | Tensor:
        """What an error in each row of a table counts."""
        if probability is None or not self.token_weight:
            return 1.0
        least = RAREST / max(1, probability.numel())
        return (probability.float() + least).pow(self.token_weight)

    def rewrite_leaf(self, leaf: Form, statistics: InputStatistics | None, context: LeafContext) -> Rewritten:
        weight = leaf.plain
        if weight is None:
            raise ValueError(f"entropy_quantize takes dense weights, and this one is {leaf.formula}")
        if context.share is None:  # a table of its own
            rows = self._rows(context.probability)
            return entropy_round(
                weight.float(), self.bits, self.options(), sensitivity=rows, statistics=statistics
            )
        if statistics is None:
            raise ValueError("entropy_quantize needs the Hessian of the input")
        return entropy_quantize(
            weight.float(),
            statistics,
            context.share,
            self.options(),
            sensitivity=1.0 if context.sensitivity is None else context.sensitivity,
            cross=context.cross if self.needs_original else None,
        )
