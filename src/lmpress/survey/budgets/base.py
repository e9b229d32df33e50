"""What every kind of budget does: looks at the modules that share it, gives out shares, hears what they took.

In the manner of optax's gradient transformations its state goes in and comes out: what was given out once is
plain JSON that the journal keeps, what the blocks took is a record a block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import ReferenceType, ref

from torch import Tensor

from lmpress.families import BlockLayout, Rows
from lmpress.forms import Form
from lmpress.recipes import Step
from lmpress.statistics import InputStatistics

Record = Mapping[str, Any]
"""What the modules of one block took; JSON, for the journal."""


@dataclass(frozen=True)
class Pool:
    """Who draws on a budget.

    Attributes:
        step: the step that asks for shares.
        place: what an error calls it.
        shapes: (out, in) of the dense weights, by the full names of the modules.
        kinds: of all steps of the recipe.
    """

    step: Step
    place: str
    shapes: Mapping[str, tuple[int, int]]
    kinds: frozenset[str] = frozenset()

    @property
    def weights(self) -> int:
        """Of all modules together."""
        return sum(rows * columns for rows, columns in self.shapes.values())


@dataclass(frozen=True)
class Sight:
    """What a survey sees of one module.

    Attributes:
        weight: dense, (out, in).
        inputs: moments of its inputs.
        sensitivity: mean squared gradient of the model's loss by each output, (out,); None in a survey
            without gradients.
        energy: mean squared norm of a token's hidden state behind the block; of a survey without gradients.
        activation: mean magnitude of the neurons, (in,), where the step asks for it.
        has_bias: whether the module has one.
    """

    weight: Tensor
    inputs: InputStatistics
    sensitivity: Tensor | None = None
    energy: float = 1.0
    activation: Tensor | None = None
    has_bias: bool = False


@dataclass(frozen=True)
class State:
    """Where a budget stands.

    Attributes:
        given: what the survey gave out, as the journal keeps it.
        shares: what is settled before the first block, by module.
        past: what the blocks that are done took.
    """

    given: Mapping[str, Any]
    shares: Mapping[str, float] = field(default_factory=dict)
    past: tuple[Record, ...] = ()

    def then(self, record: Record | None) -> State:
        """After one more block."""
        return self if record is None else replace(self, past=(*self.past, record))


class Budget(ABC):
    """One kind of thing that modules share. To add one: a file here, and a line in `BUDGETS`.

    Args:
        pool: who draws on it.
    """

    kind: ClassVar[str]
    """What steps call it in `Step.budget`."""

    gradients: ClassVar[bool] = True
    """Whether a look takes the gradients of the model; else one pass forwards will do."""

    hessian: bool = True
    """Whether a look takes the Hessian of the inputs."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._last: tuple[ReferenceType[InputStatistics], Tensor] | None = None

    @property
    def decides(self) -> Any:
        """All that decides what a survey tells, JSON-able, so that recipes that agree in it share one survey;
        None where what is given out depends on more."""
        return None

    def signal(self, block: BlockLayout) -> Rows | None:
        """Outputs whose mean magnitude a look asks for."""
        return None

    @abstractmethod
    def look(self, sight: Sight) -> Any:
        """What one module tells of itself."""

    @abstractmethod
    def give_out(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What all modules told, by name, as the journal keeps it; JSON.

        Raises:
            RequestError: the budget cannot be met; it tells the least that can.
        """

    @abstractmethod
    def begin(self, given: Mapping[str, Any]) -> State:
        """The state before the first block. Raises as `give_out`."""

    def next(self, state: State, names: Sequence[str], tried: Record | None = None) -> dict[str, float]:
        """The shares of the modules of the next block.

        Args:
            names: all modules of that block.
            tried: what they took before, if the block is done again.
        """
        return {name: state.shares[name] for name in names if name in state.shares}

    def took(self, state: State, forms: Mapping[str, Form], shares: Mapping[str, float]) -> Record | None:
        """What the modules of a block took of their shares; None where nobody has to know."""
        return None

    def settled(self, state: State, record: Record) -> bool:
        """Whether a block took about what was expected of it; else it is worth doing again."""
        return True

    def facts(self, state: State) -> dict[str, Any]:
        """For the manifest: what came of it."""
        return {}

    def _columns(self, inputs: InputStatistics) -> Tensor:
        """`_weigh`, made once for the linears of a site, which have one input. Its Hessian is not kept."""
        if self._last is None or self._last[0]() is not inputs:
            self._last = ref(inputs), self._weigh(inputs)
        return self._last[1]

    def _weigh(self, inputs: InputStatistics) -> Tensor:
        """What the error of each column counts or is divided by, as the method of the step weighs it."""
        raise NotImplementedError


def upwards(bits: float) -> str:
    """A number that meets what it tells: rounded up."""
    return f"{math.ceil(bits * 1000) / 1000:.3f}"
