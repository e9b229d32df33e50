"""What a model is worth: perplexity, divergence, size, speed, retention."""

from lmpress.evaluation.evaluate import Evaluation, TextResult, evaluate_models
from lmpress.evaluation.modules import (
    ModuleRow,
    linear_bits_per_weight,
    module_table,
    nominal_compression,
    stored_bits_per_weight,
)
from lmpress.evaluation.perplexity import TextScore, measure
from lmpress.evaluation.protocol import (
    EvaluationText,
    TextProtocol,
    check_windows,
    default_window,
    refuse_seen_text,
    spq_text,
)
from lmpress.evaluation.retention import gain, sr, sr_from_perplexity, srcr, tcr
from lmpress.evaluation.size import (
    bytes_16bit,
    current_resident_set,
    disk_bytes,
    peak_resident_set,
    resident_bytes,
    weight_bytes,
)
from lmpress.evaluation.tables import evaluation_table, human_bytes, module_rows_table
from lmpress.evaluation.throughput import Throughput, Timing, throughput, throughput_many

__all__ = [
    "Evaluation",
    "EvaluationText",
    "ModuleRow",
    "TextProtocol",
    "TextResult",
    "TextScore",
    "Throughput",
    "Timing",
    "bytes_16bit",
    "check_windows",
    "current_resident_set",
    "default_window",
    "disk_bytes",
    "evaluate_models",
    "evaluation_table",
    "gain",
    "human_bytes",
    "linear_bits_per_weight",
    "measure",
    "module_rows_table",
    "module_table",
    "nominal_compression",
    "peak_resident_set",
    "refuse_seen_text",
    "resident_bytes",
    "spq_text",
    "sr",
    "sr_from_perplexity",
    "srcr",
    "stored_bits_per_weight",
    "tcr",
    "throughput",
    "throughput_many",
    "weight_bytes",
]
