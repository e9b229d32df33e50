"""What the journal says counts as far as it is whole, and leads nowhere else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lmpress.pipeline.journal import Journal
from lmpress.pipeline.journal_line import sealed, unsealed


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A journal of a calibration and two blocks, with their shards."""
    made = Journal(tmp_path / "work")
    made.staging.mkdir(parents=True)
    made.start("model and recipe")
    made.append({"calibration": {"name": "é\ud800", "share": float("nan")}})
    for block in range(2):
        made.append(shard(made, block))
    return made


def shard(journal: Journal, block: int) -> dict[str, Any]:
    data = b"weights" * (block + 1)
    (journal.staging / f"{block}.safetensors").write_bytes(data)
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"block": block, "file": f"{block}.safetensors", "plan": {}, "report": {}, **told}


def reopened(journal: Journal) -> Journal | None:
    again = Journal(journal.directory)
    return None if again.open() is None else again


def test_it_is_read_as_it_was_written_and_goes_on(journal: Journal) -> None:
    again = reopened(journal)
    assert again is not None
    assert json.dumps(again.entries) == json.dumps(journal.entries)
    again.append(shard(again, 2))
    third = reopened(again)
    assert third is not None
    assert [entry["block"] for entry in third.blocks()] == [0, 1, 2]


@pytest.mark.parametrize("number", range(4))
def test_nothing_behind_a_damaged_line_counts(journal: Journal, number: int) -> None:
    lines = journal.path.read_bytes().splitlines(keepends=True)
    flipped = bytearray(lines[number])
    flipped[len(flipped) // 2] ^= 1
    for damaged in ([bytes(flipped)], [], [lines[number], lines[number]], [lines[number][:-1]]):
        journal.path.write_bytes(b"".join([*lines[:number], *damaged, *lines[number + 1 :]]))
        again = reopened(journal)
        whole = number + damaged.count(lines[number]) // 2
        assert (0 if again is None else len(again.entries)) == whole
        if again is not None:
            assert journal.path.read_bytes() == b"".join(lines[:whole])


@pytest.mark.parametrize(
    "entry",
    [
        {"publishing": "../../elsewhere", "stale": []},
        {"publishing": "/etc", "stale": []},
        {"publishing": "..", "stale": []},
        {"publishing": "checkpoint"},
        {"publishing": "checkpoint", "stale": "all"},
        {"block": 2, "file": "../0.safetensors", "bytes": 7, "sha256": "", "plan": {}, "report": {}},
        {"block": 2, "file": "a\0b", "bytes": 7, "sha256": "", "plan": {}, "report": {}},
        {"block": "2", "file": "0.safetensors", "bytes": 7, "sha256": "", "plan": {}, "report": {}},
        {"block": 2, "file": "0.safetensors"},
        {"block": 2},
    ],
)
def test_entries_that_lead_elsewhere_or_lack_a_part(journal: Journal, entry: dict[str, Any]) -> None:
    journal.append(entry)
    again = reopened(journal)
    assert again is not None
    assert len(again.entries) == 4


@pytest.mark.parametrize("line", [b"", b"\n", b"3\n", b"[]\n", b"{}\n", b"[" * 100_000 + b"\n", b"\xff\n"])
def test_what_is_no_line(line: bytes) -> None:
    assert unsealed(line, 0) is None


def test_a_line_has_its_place() -> None:
    first, seal = sealed({"a": 1}, 0)
    second, _ = sealed({"b": {1: 2.5}}, seal)
    assert unsealed(first.encode(), 0) == ({"a": 1}, seal)
    read = unsealed(second.encode(), seal)
    assert read is not None
    assert read[0] == {"b": {"1": 2.5}}
    assert unsealed(second.encode(), 0) is None
