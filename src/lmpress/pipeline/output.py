"""The output directory: what may be written into it, and the end of a publication that was cut short."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmpress.checkpoint import MANIFEST, read_json
from lmpress.errors import RequestError
from lmpress.pipeline.assemble import discard, publish, remove_stale, written_files
from lmpress.pipeline.claim import claimed, unfinished
from lmpress.pipeline.journal import WORK, Journal
from lmpress.source import ModelSource


def check_place(output: Path, source: ModelSource) -> None:
    """RequestError where no checkpoint can be: a file, a link to nowhere, the model's own directory."""
    if output.exists() and not output.is_dir():
        raise RequestError(f"{output} is a file; name a directory")
    if output.is_symlink() and not output.exists():
        raise RequestError(
            f"{output} is a link to {os.readlink(output)}, which does not exist: make it, or "
            "name another directory"
        )
    place = output.resolve()
    if any(place in (path.resolve().parent, path.parent.resolve()) for path in source.files):
        raise RequestError(f"{output} holds the model that is to be compressed; name another directory")


def check_output(output: Path, source: ModelSource, again: bool) -> None:
    """RequestError where writing to `output` would harm what is there; `again` lets a checkpoint be."""
    check_place(output, source)
    if again:
        return
    if unfinished(output):
        raise RequestError(
            f"{output} holds an unfinished run: go on with --resume, or start anew with --force"
        )
    check_empty(output)


@contextmanager
def at_work(output: Path, source: ModelSource, again: bool) -> Iterator[None]:
    """The right to write to `output`, as far as looking at it tells; while it is held, no other run has it.

    Args:
        again: whether what is there may be an earlier checkpoint.

    Raises:
        RequestError: nothing is to be written there, or another run is at work.
    """
    check_place(output, source)
    if not again:
        check_empty(output)  # before anything is made there
    with claimed(output):
        yield


def check_empty(output: Path) -> None:
    """RequestError where `output` holds anything but what an unfinished run left."""
    if output.is_dir() and any(path.name != WORK for path in output.iterdir()):
        raise RequestError(f"{output} is not empty: name another directory, or overwrite it with --force")


def finish_publication(output: Path) -> bool:
    """Complete a publication that was cut short, if there is one. Whether there was."""
    journal = Journal(output / WORK)
    marker = journal.find("publishing") if journal.open() is not None else None
    if marker is None:
        return False
    publish(output / WORK / str(marker["publishing"]), output)
    remove_stale(output, marker["stale"])
    discard(output / WORK)
    return True


def check_foreign(output: Path) -> None:
    """RequestError where `output` holds weights that lmpress did not write: they are not overwritten."""
    foreign = sorted({path.name for path in output.glob("*.safetensors")} - written_files(output))
    if foreign:
        raise RequestError(
            f"{output} holds weights that lmpress did not write ({foreign[0]}): name another directory"
        )


def finished_fingerprint(output: Path) -> str | None:
    path = output / MANIFEST
    if not path.is_file() or not (output / "config.json").is_file():
        return None
    manifest = read_json(path)
    return manifest.get("fingerprint") if isinstance(manifest, dict) else None
