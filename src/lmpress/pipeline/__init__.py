"""A run: the blocks rewritten one by one; the journal that survives a crash."""

from lmpress.pipeline.assemble import assemble, discard, sizes, staged_files, written_files
from lmpress.pipeline.journal import WORK, Journal
from lmpress.pipeline.output import at_work, finish_publication
from lmpress.pipeline.run import Run
from lmpress.pipeline.setting import RunOptions

__all__ = [
    "WORK",
    "Journal",
    "Run",
    "RunOptions",
    "assemble",
    "at_work",
    "discard",
    "finish_publication",
    "sizes",
    "staged_files",
    "written_files",
]
