"""Recipe + config -> plan: which step touches which module; and the bytes to expect."""

from lmpress.plan.plan import ModulePlan, Plan
from lmpress.plan.resolve import make_plan

__all__ = ["ModulePlan", "Plan", "make_plan"]
