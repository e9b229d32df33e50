"""A recipe, resolved for one model: which step touches which module, with which options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lmpress.families import BlockLayout, Layout
from lmpress.recipes import FormStep, Recipe, Step, options_of


@dataclass(frozen=True)
class ModulePlan:
    """What happens to one module.

    Attributes:
        shape: (out, in) of its dense weight.
        steps: indices into the recipe of the steps that rewrite its form, in order.
        granularity: by step index, where a hybrid was resolved.
    """

    shape: tuple[int, int]
    steps: tuple[int, ...] = ()
    granularity: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A recipe, resolved for one model.

    Attributes:
        modules: by full name, linears of the blocks as well as the embedding and an untied head.
        sites: by the full name of a site, such as "model.layers.3.down", the steps over whole sites there.
        outer: the names of the embedding and of a head of its own.
        layout: of the model.
        trained: the modules that get an adapter in recovery.
        predicted: `bytes` of the weights after compression; whether that is `exact`, or an estimate.
    """

    model: str
    recipe: Recipe
    dtype: torch.dtype
    layout: Layout
    modules: dict[str, ModulePlan]
    sites: dict[str, tuple[int, ...]]
    outer: tuple[str, ...]
    trained: tuple[str, ...] = ()
    predicted: dict[str, Any] = field(default_factory=dict)

    def step(self, index: int) -> Step:
        """The step of the recipe at `index`."""
        return self.recipe.steps[index]

    def form_steps(self, name: str) -> list[tuple[int, FormStep]]:
        """The steps that rewrite the form of a module, with their places in the recipe."""
        steps = ((index, self.step(index)) for index in self.modules[name].steps)
        return [(index, step) for index, step in steps if isinstance(step, FormStep)]

    @property
    def inner(self) -> tuple[Step, ...]:
        """The steps that touch a block, in the order of the recipe."""
        touched = {i for name, m in self.modules.items() if name not in self.outer for i in m.steps}
        touched |= {index for steps in self.sites.values() for index in steps}
        return tuple(self.step(index) for index in sorted(touched))

    @property
    def needs_text(self) -> bool:
        """Whether any step looks at calibration text (recovery aside)."""
        return self.weighs_tokens or any(step.needs_statistics for step in self.recipe.steps)

    @property
    def weighs_tokens(self) -> bool:
        """Whether a step of the embedding or the head asks how probable tokens are."""
        return any(
            self.step(index).weighs_tokens for name in self.outer for index in self.modules[name].steps
        )

    @property
    def weighs_positions(self) -> bool:
        """Whether the moments that a step of the blocks asks for are weighted by position."""
        wanted = self.recipe.calibration.weighting == "positions"
        return wanted and any(step.needs_statistics for step in self.inner)

    @property
    def needs_original(self) -> bool:
        """Whether the dense model has to be run beside the compressed one."""
        return any(step.needs_original for step in self.inner)

    @property
    def recovers(self) -> bool:
        """Whether the compressed model is trained at the end."""
        return bool(self.trained)

    def place(self, index: int) -> str:
        """What an error calls a step."""
        return f"recipe {self.recipe.name}: step {index + 1} ({self.step(index).kind})"

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON."""
        over_sites = sorted({index for steps in self.sites.values() for index in steps})
        return {
            "model": self.model,
            "recipe": self.recipe.resolved(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "modules": {
                name: {"shape": list(m.shape), "steps": [self._entry(i, m) for i in m.steps]}
                for name, m in self.modules.items()
                if m.steps
            },
            "sites": [options_of(self.step(index)) for index in over_sites],
            "trained": list(self.trained),
            "predicted": self.predicted,
        }

    def _entry(self, index: int, module: ModulePlan) -> dict[str, Any]:
        chosen = {"granularity": module.granularity[index]} if index in module.granularity else {}
        return {self.step(index).kind: chosen}


def block_of(layout: Layout, name: str) -> tuple[BlockLayout, str] | None:
    """The block that a module stands in, and its name there; None outside the blocks."""
    if not name.startswith(layout.blocks + "."):
        return None
    index, _, linear = name.removeprefix(layout.blocks + ".").partition(".")
    return layout.block(int(index)), linear


def narrowed(plan: Plan, name: str) -> tuple[tuple[int, int], bool]:
    """The shape of a module behind the steps over sites, and whether that is sure."""
    shape, sure, place = plan.modules[name].shape, True, block_of(plan.layout, name)
    if place is None:
        return shape, sure
    for _, step in plan.recipe.site_steps:
        shape, known = step.narrowed(shape, place[1], place[0])
        sure &= known
    return shape, sure
