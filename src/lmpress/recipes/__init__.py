"""The recipe's strict schema, its steps, and the recipes that ship."""

from lmpress.recipes.schema import (
    Calibration,
    Recipe,
    load_recipe,
    parse_recipe,
    shipped_recipes,
    shipped_text,
)
from lmpress.recipes.steps import (
    STEPS,
    Correct,
    FormStep,
    LeafContext,
    LeafStep,
    Pivot,
    PruneNeurons,
    Quantize,
    Recover,
    SparseLowRank,
    Sparsify,
    Step,
    Svd,
    in_storage,
)

__all__ = [
    "STEPS",
    "Calibration",
    "Correct",
    "FormStep",
    "LeafContext",
    "LeafStep",
    "Pivot",
    "PruneNeurons",
    "Quantize",
    "Recipe",
    "Recover",
    "SparseLowRank",
    "Sparsify",
    "Step",
    "Svd",
    "in_storage",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
    "shipped_text",
]
