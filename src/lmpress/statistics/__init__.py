"""What calibration tells about the input of a linear layer."""

from lmpress.statistics.inputs import InputStatistics, StatisticsAccumulator, counts_of_rows

__all__ = ["InputStatistics", "StatisticsAccumulator", "counts_of_rows"]
