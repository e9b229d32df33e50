"""A run: the blocks rewritten one by one; the journal that survives a crash."""

from lmpress.pipeline.assemble import assemble, discard, sizes, written_files
from lmpress.pipeline.journal import WORK, Journal
from lmpress.pipeline.output import finish_publication
from lmpress.pipeline.run import Run
from lmpress.pipeline.setting import RunOptions

__all__ = [
    "WORK",
    "Journal",
    "Run",
    "RunOptions",
    "assemble",
    "discard",
    "finish_publication",
    "sizes",
    "written_files",
]
