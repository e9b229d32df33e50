"""The output directory: what may be written into it, and the end of a publication that was cut short."""

from __future__ import annotations

from pathlib import Path

from lmpress.checkpoint import MANIFEST, read_json
from lmpress.errors import RequestError
from lmpress.pipeline.assemble import discard, publish, remove_stale, written_files
from lmpress.pipeline.journal import WORK, Journal
from lmpress.source import ModelSource


def check_output(output: Path, source: ModelSource, again: bool) -> None:
    """RequestError where writing to `output` would harm what is there; `again` lets a checkpoint be."""
    if output.exists() and not output.is_dir():
        raise RequestError(f"{output} is a file; name a directory")
    place = output.resolve()
    if any(place in (path.resolve().parent, path.parent.resolve()) for path in source.files):
        raise RequestError(f"{output} holds the model that is to be compressed; name another directory")
    if again:
        return
    if (output / WORK).exists():
        raise RequestError(
            f"{output} holds an unfinished run: go on with --resume, or start anew with --force"
        )
    check_empty(output)


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
