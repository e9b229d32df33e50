"""What calibration tells about the input of a linear layer."""

from lmpress.statistics.channels import Channels, pooled
from lmpress.statistics.inputs import InputStatistics, StatisticsAccumulator, counts_of_rows

__all__ = ["Channels", "InputStatistics", "StatisticsAccumulator", "counts_of_rows", "pooled"]
