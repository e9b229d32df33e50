"""What calibration tells about the input of a linear layer."""

from lmpress.statistics.inputs import InputStatistics, StatisticsAccumulator

__all__ = ["InputStatistics", "StatisticsAccumulator"]
