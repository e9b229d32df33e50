"""Pictures and pages of what was measured."""

from lmpress.report.plot import comparison_plot

__all__ = ["comparison_plot"]
