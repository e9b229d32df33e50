"""How a form runs fast on a device: `run` walks it and takes a leaf's runner from one visible table."""

from lmpress.kernels.dispatch import TABLE, attach, run
from lmpress.kernels.semi_structured import SemiStructured, suits

__all__ = ["TABLE", "SemiStructured", "attach", "run", "suits"]
