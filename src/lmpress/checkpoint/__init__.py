"""Writing and reading checkpoints; the transformers plug-in."""

from lmpress.checkpoint.card import model_card
from lmpress.checkpoint.files import (
    INDEX,
    MANIFEST,
    copy_file,
    read_header,
    read_json,
    sha256_file,
    shard_paths,
    sync_directory,
    write_bytes,
    write_json,
    write_tensors,
)
from lmpress.checkpoint.plan import FORMAT_VERSION, stored_names
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
from lmpress.checkpoint.verify import is_compressed, plan_of, read_manifest, verify_checkpoint

__all__ = [
    "FORMAT_VERSION",
    "INDEX",
    "MANIFEST",
    "METHOD",
    "RESIDENT",
    "LmpressConfig",
    "LmpressQuantizer",
    "cast_floats",
    "checked_resident",
    "copy_file",
    "densify",
    "forms_of",
    "hold_resident",
    "is_compressed",
    "model_card",
    "plan_of",
    "put_forms",
    "read_header",
    "read_json",
    "read_manifest",
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
