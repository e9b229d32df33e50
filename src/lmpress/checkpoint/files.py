"""Files that are written whole or not at all, and safetensors headers that are read with suspicion."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as short
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmpress.errors import RequestError, naming

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "lmpress.json"


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut, where the system syncs directories."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, whose place it takes when the block has ended well; else it goes.

    Raises:
        OSError: what the system refused; it names `path`.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with naming(path):
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. OSError, which names it, where that fails."""
    with _whole(path) as temporary:
        temporary.write_bytes(data)


def json_text(data: Any, indent: int = 1, encoding: str = "utf-8") -> str:
    """JSON, indented: null for what is not finite, and escapes where an `encoding` lacks a character.

    UTF-8 lacks what stands for the bytes of a file name that is none.
    """
    plain = _plain(data)
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(plain, indent=indent, allow_nan=False)
    return text


def write_json(path: Path, data: Any) -> None:
    """Write JSON, indented and with a newline at its end, whole or not at all."""
    write_bytes(path, (json_text(data) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all; equal tensors give equal bytes."""
    with _whole(path) as temporary:
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary,
            metadata={"format": "pt"},  # one key only: the order of several is not defined
        )
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # as any other file; safetensors makes it private


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, of a link what it leads to, whole or not at all."""
    with open(source, "rb") as file, _whole(target) as temporary, open(temporary, "wb") as copy:
        shutil.copyfileobj(file, copy)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """JSON from a file. RequestError where it is missing or broken."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise _unread(path, error) from None
    except ValueError as error:
        raise RequestError(f"{path} is broken: no JSON ({error}); restore the file") from None


def parse_json(text: bytes) -> Any:
    """JSON in UTF-8, with or without a byte order mark. ValueError for all else, or a key there twice."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {short(twice)} stands twice")
    return found


def _unread(path: Path, error: OSError) -> RequestError:
    missing = isinstance(error, FileNotFoundError)
    return RequestError(f"{path} is missing" if missing else f"cannot read {path}: {error.strerror}")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: name -> {dtype, shape, data_offsets}.

    Whatever is let through, the safetensors library reads.

    Raises:
        RequestError: a file that is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            header: dict[str, dict[str, Any]] = parse_json(file.read(length))
        end = _end(header)
        if size < 8 + length + end:
            raise RequestError(
                f"{path} is truncated: {size} bytes instead of {8 + length + end}; fetch it again"
            )
        with safe_open(path, framework="pt"):  # offsets, shapes and types agree
            pass
    except OSError as error:
        raise _unread(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        raise RequestError(
            f"{path} is no safetensors file, or its header is broken ({error}): fetch it again"
        ) from None
    header.pop("__metadata__", None)
    return header


def _end(header: Mapping[str, Any]) -> int:
    """Where the last tensor ends, by its offset."""
    return max(
        (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. RequestError as of `read_header`."""
    read_header(path)
    return load_file(path)


def is_plain_name(name: Any) -> bool:
    """Whether a file's word for another file is the name of one beside it, and leads nowhere else."""
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        return False
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint in order; a single one goes before an index, as in transformers.

    Raises:
        RequestError: there are none, or the index names a path that leaves the directory.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        return indexed_paths(directory)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise RequestError(
            f"{directory} holds pickled weights, which lmpress does not open; convert them to safetensors"
        )
    raise RequestError(f"{directory} has no weights: no {SINGLE} and no {INDEX}")


def indexed_paths(directory: Path) -> list[Path]:
    """The files that the index of a checkpoint names, in order. RequestError as of `read_index`."""
    return [directory / name for name in sorted(set(read_index(directory).values()))]


def read_index(directory: Path) -> dict[str, str]:
    """What the index of a checkpoint tells: tensor -> the file that holds it.

    Raises:
        RequestError: the index is broken, or names a path that leaves the directory.
    """
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{directory / INDEX} has no weight_map; fetch it again")
    for name in weight_map.values():
        if not is_plain_name(name):
            raise RequestError(
                f"{directory / INDEX} names {short(name)}, which is outside its directory or no file name"
            )
    return weight_map


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
