"""Files that are written whole or not at all, and safetensors headers that are read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lmpress.errors import RequestError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "lmpress.json"


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, indented and with a newline at its end, whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all; equal tensors give equal bytes."""
    temporary = path.with_name(path.name + ".part")
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        temporary,
        metadata={"format": "pt"},  # one key only: the order of several is not defined
    )
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)  # as any other file; safetensors makes it private
    os.replace(temporary, path)
    sync_directory(path.parent)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """JSON from a file. RequestError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is broken ({error}); restore the file, or compress again") from None


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name -> {dtype, shape, data_offsets}.

    Raises:
        RequestError: a file that is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 1 << 30):
                raise ValueError("no header")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except FileNotFoundError:
        raise RequestError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, AttributeError):
        raise RequestError(
            f"{path} is no safetensors file, or its header is broken: fetch it again"
        ) from None
    if 8 + length + end != size:
        raise RequestError(f"{path} is truncated: {size} bytes instead of {8 + length + end}; fetch it again")
    return header


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint in order; a single one goes before an index, as in transformers.

    Raises:
        RequestError: there are none, or the index names a path that leaves the directory.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise RequestError(f"{directory / INDEX} has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise RequestError(f"{directory / INDEX} names {name!r}, which is outside its directory")
        return [directory / name for name in names]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise RequestError(
            f"{directory} holds pickled weights, which lmpress does not open; convert them to safetensors"
        )
    raise RequestError(f"{directory} has no weights: no {SINGLE} and no {INDEX}")


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file whole or not at all."""
    temporary = target.with_name(target.name + ".part")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)
