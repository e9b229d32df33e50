"""One look at the dense model, and what each module is worth."""

from lmpress.survey.allocation import Allocation, Shares
from lmpress.survey.budgets import BUDGETS, Budget
from lmpress.survey.kept import Survey, key_of, shared_survey
from lmpress.survey.look import budgets_of, look_backwards, look_forwards, survey_samples
from lmpress.survey.tables import TableMetric
from lmpress.survey.weighting import position_weights, weighting_samples

__all__ = [
    "BUDGETS",
    "Allocation",
    "Budget",
    "Shares",
    "Survey",
    "TableMetric",
    "budgets_of",
    "key_of",
    "look_backwards",
    "look_forwards",
    "position_weights",
    "shared_survey",
    "survey_samples",
    "weighting_samples",
]
