"""What goes along with the weights: what a tokenizer and a generation read, and the terms of use; no code."""

from __future__ import annotations

import codecs
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from lmpress.checkpoint import copy_file, read_json, write_bytes, write_json
from lmpress.errors import RequestError
from lmpress.progress import note

READ = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",  # sentencepiece
    "tokenizer.model.*",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
"""What a tokenizer and a generation read."""

TERMS = tuple(
    f"{name}*"
    for word in ("license", "licence", "copying", "copyright", "notice", "use_policy", "third_party")
    for name in (word, word.capitalize(), word.upper())
)
"""What the terms of a model want passed on, in the spellings that the hub is asked for."""

MARKED = (".json", ".jinja", ".txt")
"""Files that may begin with a byte order mark, which not everybody reads: the copies do without it."""

REMOTE_CODE = ("auto_map", "custom_pipelines")
"""Keys of JSON files that name code of the model's own, which is neither run nor copied."""


def is_companion(name: str) -> bool:
    """Whether a file goes along, by its path relative to the model directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix in (".py", ".safetensors", ".part"):
        return False
    if any(fnmatchcase(name.lower(), terms) for terms in TERMS):
        return len(path.parts) == 1
    return any(len(path.parts) == len(Path(read).parts) and fnmatchcase(name, read) for read in READ)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what goes along: of links the content, of JSON all but the names of code.

    A link that leads out of the model directory is left behind, and told: what it brings is not the
    model's. In a cache of the hub, files are links to the blobs beside the snapshots.
    """
    for path in sorted([*source.iterdir(), *source.glob("*/*.jinja")]):
        name = path.relative_to(source).as_posix()
        if not path.is_file() or not is_companion(name):
            continue
        if not _belongs(path, source):
            note(f"{path} is a link out of the model directory: it is left behind; copy it if you trust it")
            continue
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        coded = _remote_code(path) if path.suffix == ".json" else None
        if coded is None and path.suffix in MARKED:
            write_bytes(copy, path.read_bytes().removeprefix(codecs.BOM_UTF8))
            continue
        if coded is None:
            copy_file(path, copy)
            continue
        write_json(copy, coded)
        note(
            f"{path} names code of the model's own, which does not go along: its {REMOTE_CODE[0]} is left out"
        )


def _belongs(path: Path, directory: Path) -> bool:
    real, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"  # of models--NAME/snapshots/REVISION
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs))


def _remote_code(path: Path) -> dict[str, Any] | None:
    """The content without the keys that name code; None where it has none, or is no JSON object."""
    if not path.name.endswith("_config.json"):
        return None
    try:
        content = read_json(path)
    except RequestError:
        return None
    if not isinstance(content, dict) or not any(key in content for key in REMOTE_CODE):
        return None
    return {key: value for key, value in content.items() if key not in REMOTE_CODE}
