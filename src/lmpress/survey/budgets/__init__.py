"""The kinds of budgets that modules share, one a file."""

from lmpress.survey.budgets.base import Budget, Pool, Record, Sight, State
from lmpress.survey.budgets.bits import Bits
from lmpress.survey.budgets.density import Density
from lmpress.survey.budgets.ranks import Ranks
from lmpress.survey.budgets.rate import Rate
from lmpress.survey.budgets.widths import Widths

# One line a budget.
BUDGETS: dict[str, type[Budget]] = {
    "bits": Bits,
    "rate": Rate,
    "ranks": Ranks,
    "density": Density,
    "widths": Widths,
}

__all__ = ["BUDGETS", "Budget", "Pool", "Record", "Sight", "State"]
