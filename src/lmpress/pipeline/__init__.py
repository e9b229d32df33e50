"""Recipe + model -> plan; the block stream; the journal that survives a crash."""

from lmpress.pipeline.assemble import assemble, discard, staged_files, written_files
from lmpress.pipeline.calibration import (
    CALIBRATION,
    CalibrationText,
    calibration_text,
    check_calibration,
    load_dense,
    small_ids,
)
from lmpress.pipeline.journal import WORK, Journal
from lmpress.pipeline.output import at_work, finish_publication
from lmpress.pipeline.plan import Plan, make_plan
from lmpress.pipeline.prediction import ModulePlan
from lmpress.pipeline.run import Run, sizes
from lmpress.pipeline.setting import RunOptions
from lmpress.pipeline.source import GgufSource, ModelSource, SafetensorsSource, open_source, read_tokenizer
from lmpress.pipeline.stream import BlockStream
from lmpress.pipeline.walk import Gathered

__all__ = [
    "CALIBRATION",
    "WORK",
    "BlockStream",
    "CalibrationText",
    "Gathered",
    "GgufSource",
    "Journal",
    "ModelSource",
    "ModulePlan",
    "Plan",
    "Run",
    "RunOptions",
    "SafetensorsSource",
    "assemble",
    "at_work",
    "calibration_text",
    "check_calibration",
    "discard",
    "finish_publication",
    "load_dense",
    "make_plan",
    "open_source",
    "read_tokenizer",
    "sizes",
    "small_ids",
    "staged_files",
    "written_files",
]
