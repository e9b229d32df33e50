"""What is finished survives a crash: data, fsync, rename, and only then a line in the journal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lmpress.checkpoint import sha256_file, sync_directory
from lmpress.errors import naming
from lmpress.pipeline.journal_line import sealed, unsealed

WORK = ".lmpress-work"
"""The directory inside the output that holds what is not finished."""


STAGING = "checkpoint"
"""Below the work directory: what will be published, and nothing else."""


def file_entry(path: Path) -> dict[str, Any]:
    """What an entry says of a file in the staging directory, by which it is known again."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


class Journal:
    """An append-only file of JSON lines; the first names the run by its fingerprint.

    Args:
        directory: the work directory, in which the finished shards are staged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.staging = directory / STAGING
        self.path = directory / "journal.jsonl"
        self.entries: list[dict[str, Any]] = []
        self._seal = 0  # of the last line

    def start(self, fingerprint: str) -> None:
        """Begin a new journal; an old one is gone."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.unlink()
        self.entries, self._seal = [], 0
        self.append({"fingerprint": fingerprint})

    def append(self, entry: dict[str, Any]) -> None:
        """Record that something is finished; what it speaks of has to be on the disk by now."""
        line, seal = sealed(entry, self._seal)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.directory)
        self._seal = seal
        self.entries.append(entry)

    def open(self) -> str | None:
        """Read what is there; the fingerprint of the run, or None where there is no usable journal.

        A last line that was torn by a crash is cut off, and so is all from a damaged line on. Entries from
        the first shard on that is missing or damaged do not count, and are cut off too; unless publishing has
        begun, which moves shards away.
        """
        if not self.path.is_file():
            return None
        good: list[dict[str, Any]] = []
        lengths, seals = [0], [0]
        for line in self.path.read_bytes().splitlines(keepends=True):
            read = unsealed(line, seals[-1])
            if read is None:
                break
            good.append(read[0])
            seals.append(read[1])
            lengths.append(len(line))
        if not any("publishing" in entry for entry in good):
            whole = next((i for i, entry in enumerate(good) if not self._holds(entry)), len(good))
            del good[whole:], lengths[whole + 1 :], seals[whole + 1 :]
        if not good or "fingerprint" not in good[0]:
            return None
        with open(self.path, "r+b") as file:
            file.truncate(sum(lengths))
            os.fsync(file.fileno())
        self.entries, self._seal = good, seals[-1]
        return str(good[0]["fingerprint"])

    def find(self, key: str) -> dict[str, Any] | None:
        """The last entry that has `key`."""
        return next((entry for entry in reversed(self.entries) if key in entry), None)

    def blocks(self) -> list[dict[str, Any]]:
        """The finished blocks, in order from the first."""
        return [entry for entry in self.entries if "block" in entry]

    def _holds(self, entry: dict[str, Any]) -> bool:
        """Whether the file that an entry speaks of is what it was."""
        if "file" not in entry:
            return True
        path = self.staging / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        return bool(sha256_file(path) == entry["sha256"])
