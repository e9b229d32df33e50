"""What reads files, given damaged ones: how many it refuses, how long it takes, how much memory, what faults.

    python -m benchmarks.fuzz [--inputs 10000] [--seed 0] [--only WORD] [--megabytes 4000]

The readers and their damage are those of tests/fuzz, which tries a few hundred; run it from the root of a
checkout.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
import traceback
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import transformers
from tests.fuzz.readers import READERS, Reader, Samples, outcome


@dataclass
class Row:
    """What one reader did; seconds of the processor and bytes of its worst input."""

    counts: dict[str, int] = field(default_factory=lambda: {"refused": 0, "accepted": 0, "fault": 0})
    seconds: float = 0.0
    bytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)


def resident(key: str) -> int:
    """Bytes of this process by a key of /proc/self/status: VmRSS now, VmHWM the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def try_one(reader: Reader, samples: Samples, folder: Path, seed: str, row: Row) -> None:
    """One damaged input; what it took goes into `row`."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    try:
        told = outcome(reader, samples, folder, Random(seed))
    except Exception as fault:  # that is what is looked for
        told = "fault"
        frames = [f for f in traceback.extract_tb(fault.__traceback__) if "lmpress/" in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        line = f"{type(fault).__name__} at {place}: {str(fault)[:100]!r}"
        if line not in row.faults:
            print(f"  {reader.name}, seed {seed}: {line}", flush=True)
        row.faults[line] = row.faults.get(line, 0) + 1
    row.counts[told] += 1
    row.seconds = max(row.seconds, time.process_time() - start)
    row.bytes = max(row.bytes, resident("VmHWM") - before)


def main() -> None:
    """Try every reader, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name has this word")
    parser.add_argument("--megabytes", type=int, default=8000, help="of address space")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    chosen = [reader for reader in READERS if arguments.only in reader.name]
    unit = arguments.inputs / sum(reader.share for reader in chosen)
    with tempfile.TemporaryDirectory() as root, redirect_stderr(io.StringIO()):
        samples = Samples(Path(root))
        resource.setrlimit(resource.RLIMIT_AS, (arguments.megabytes << 20,) * 2)
        print(f"| {'reader':24} | inputs | refused | accepted | faults | worst s | worst MB |")
        print(f"|{'-' * 26}|-------:|--------:|---------:|-------:|--------:|---------:|")
        for reader in chosen:
            row, count = Row(), max(1, round(unit * reader.share))
            for number in range(count):
                seed = f"{arguments.seed}/{reader.name}/{number}"
                try_one(reader, samples, Path(root) / "tried", seed, row)
            told = f"{row.counts['refused']:7} | {row.counts['accepted']:8} | {row.counts['fault']:6}"
            print(
                f"| {reader.name:24} | {count:6} | {told} | {row.seconds:7.2f} | {row.bytes / 1e6:8.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
