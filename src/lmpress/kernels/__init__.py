"""How a form runs fast on a device: `run` walks it and takes a leaf's runner from one visible table."""

from lmpress.kernels.dispatch import TABLE, attach, run

__all__ = ["TABLE", "attach", "run"]
