"""Where calibration and evaluation text comes from."""

from lmpress.corpora.corpus import (
    Corpus,
    check_corpus,
    check_distinct,
    evaluation_split,
    load_corpus,
    split_specs,
)
from lmpress.corpora.generate import generate_text
from lmpress.corpora.mixing import draw_windows
from lmpress.corpora.overlap import fingerprint, ngram_overlap
from lmpress.corpora.windows import (
    adds_bos,
    calibration_windows,
    check_context,
    check_ids,
    context_of,
    evaluation_windows,
)

__all__ = [
    "Corpus",
    "adds_bos",
    "calibration_windows",
    "check_context",
    "check_corpus",
    "check_distinct",
    "check_ids",
    "context_of",
    "draw_windows",
    "evaluation_split",
    "evaluation_windows",
    "fingerprint",
    "generate_text",
    "load_corpus",
    "ngram_overlap",
    "split_specs",
]
