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
from lmpress.source.dense_model import load_dense
from lmpress.source.equal import as_recipe_reads
from lmpress.source.failing import failing_at
from lmpress.source.gguf_source import GgufSource
from lmpress.source.model import ModelSource
from lmpress.source.opening import open_source
from lmpress.source.safetensors_source import SafetensorsSource
from lmpress.source.tokenizer_files import read_tokenizer

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
    "failing_at",
    "load_dense",
    "open_source",
    "outer_tensors",
    "read_tokenizer",
    "restored_block",
    "restored_outer",
    "run_as_restored",
    "running",
    "set_form",
    "store",
]
