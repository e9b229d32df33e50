"""Writing and reading checkpoints; the transformers plug-in."""

from lmpress.checkpoint.bounds import check_bounds
from lmpress.checkpoint.card import model_card
from lmpress.checkpoint.files import (
    INDEX,
    MANIFEST,
    SINGLE,
    copy_file,
    indexed_paths,
    is_plain_name,
    json_text,
    read_header,
    read_index,
    read_json,
    read_tensors,
    sha256_file,
    shard_paths,
    sync_directory,
    write_bytes,
    write_json,
    write_tensors,
)
from lmpress.checkpoint.gguf_header import read_gguf_header
from lmpress.checkpoint.manifest import read_manifest
from lmpress.checkpoint.plan import FORMAT_VERSION, names_in, stored_names
from lmpress.checkpoint.plugin import (
    METHOD,
    RESIDENT,
    LmpressConfig,
    LmpressQuantizer,
    checked_resident,
    register,
)
from lmpress.checkpoint.swap import (
    cast_floats,
    densify,
    forms_of,
    hold_resident,
    put_forms,
    tie_head,
    use_sparse_cores,
)
from lmpress.checkpoint.verify import is_compressed, plan_of, verify_checkpoint

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "MANIFEST",
    "METHOD",
    "RESIDENT",
    "SINGLE",
    "LmpressConfig",
    "LmpressQuantizer",
    "cast_floats",
    "check_bounds",
    "checked_resident",
    "copy_file",
    "densify",
    "forms_of",
    "hold_resident",
    "indexed_paths",
    "is_compressed",
    "is_plain_name",
    "json_text",
    "model_card",
    "names_in",
    "plan_of",
    "put_forms",
    "read_gguf_header",
    "read_header",
    "read_index",
    "read_json",
    "read_manifest",
    "read_tensors",
    "register",
    "sha256_file",
    "shard_paths",
    "stored_names",
    "sync_directory",
    "tie_head",
    "use_sparse_cores",
    "verify_checkpoint",
    "write_bytes",
    "write_json",
    "write_tensors",
]
