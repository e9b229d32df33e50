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
    LeafContext,
    LeafStep,
    PruneNeurons,
    Quantize,
    Recover,
    Step,
    Svd,
    in_storage,
)

__all__ = [
    "STEPS",
    "Calibration",
    "LeafContext",
    "LeafStep",
    "PruneNeurons",
    "Quantize",
    "Recipe",
    "Recover",
    "Step",
    "Svd",
    "in_storage",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
    "shipped_text",
]
