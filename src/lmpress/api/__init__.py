"""The public API: what every command calls."""

from lmpress.api.comparison import Comparison, Row, compare
from lmpress.api.compression import Compressed, compress, plan
from lmpress.api.demonstration import Demo, demo
from lmpress.api.generation import continuation, generate
from lmpress.api.loading import load, load_any
from lmpress.api.measuring import check_card, evaluate, evaluate_many, inspect, write_card

__all__ = [
    "Comparison",
    "Compressed",
    "Demo",
    "Row",
    "check_card",
    "compare",
    "compress",
    "continuation",
    "demo",
    "evaluate",
    "evaluate_many",
    "generate",
    "inspect",
    "load",
    "load_any",
    "plan",
    "write_card",
]
