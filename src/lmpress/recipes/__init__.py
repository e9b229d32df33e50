"""The recipe's strict schema, its steps, and the recipes that ship."""

from lmpress.recipes.outline import Leaf, Outline
from lmpress.recipes.schema import (
    Calibration,
    Recipe,
    load_recipe,
    parse_recipe,
    shipped_recipes,
    shipped_text,
)
from lmpress.recipes.steps import (
    GROUPS,
    STEPS,
    FormStep,
    Junction,
    LeafContext,
    Recover,
    SiteRewritten,
    SiteStep,
    Step,
    options_of,
)

__all__ = [
    "GROUPS",
    "STEPS",
    "Calibration",
    "FormStep",
    "Junction",
    "Leaf",
    "LeafContext",
    "Outline",
    "Recipe",
    "Recover",
    "SiteRewritten",
    "SiteStep",
    "Step",
    "load_recipe",
    "options_of",
    "parse_recipe",
    "shipped_recipes",
    "shipped_text",
]
