"""A model read tensor by tensor; a block of it, real."""

from lmpress.source.blocks import (
    Descriptions,
    bias_of,
    block_tensors,
    current_form,
    dense_block,
    dense_outer,
    outer_tensors,
    restored_block,
    restored_outer,
    run_as_restored,
    running,
    set_form,
    store,
)
from lmpress.source.equal import as_recipe_reads
from lmpress.source.model import GgufSource, ModelSource, SafetensorsSource, open_source

__all__ = [
    "Descriptions",
    "GgufSource",
    "ModelSource",
    "SafetensorsSource",
    "as_recipe_reads",
    "bias_of",
    "block_tensors",
    "current_form",
    "dense_block",
    "dense_outer",
    "open_source",
    "outer_tensors",
    "restored_block",
    "restored_outer",
    "run_as_restored",
    "running",
    "set_form",
    "store",
]
