"""The steps of a recipe: what each may be told, what it needs to know, and the method that it calls."""

from lmpress.recipes.steps.base import (
    GROUPS,
    FormStep,
    Junction,
    LeafContext,
    LeafStep,
    SiteRewritten,
    SiteStep,
    Step,
    Strict,
    options_of,
)
from lmpress.recipes.steps.bits import HYBRIDS, EntropyQuantize, Quantize
from lmpress.recipes.steps.factors import Correct, Pivot, Svd
from lmpress.recipes.steps.recovery import Recover
from lmpress.recipes.steps.rotation import Rotate
from lmpress.recipes.steps.scales import Awq
from lmpress.recipes.steps.sparsity import SparseLowRank, Sparsify
from lmpress.recipes.steps.structure import PruneNeurons

# One line a step: its key in a recipe and its class.
STEPS: dict[str, type[Step]] = {
    "rotate": Rotate,
    "awq": Awq,
    "prune_neurons": PruneNeurons,
    "svd": Svd,
    "pivot": Pivot,
    "sparsify": Sparsify,
    "sparse_low_rank": SparseLowRank,
    "quantize": Quantize,
    "entropy_quantize": EntropyQuantize,
    "correct": Correct,
    "recover": Recover,
}

__all__ = [
    "GROUPS",
    "HYBRIDS",
    "STEPS",
    "Awq",
    "Correct",
    "EntropyQuantize",
    "FormStep",
    "Junction",
    "LeafContext",
    "LeafStep",
    "Pivot",
    "PruneNeurons",
    "Quantize",
    "Recover",
    "Rotate",
    "SiteRewritten",
    "SiteStep",
    "SparseLowRank",
    "Sparsify",
    "Step",
    "Strict",
    "Svd",
    "options_of",
]
