"""Would a test notice if a line of the mathematics were wrong?

    pip install cosmic-ray      # beside lmpress[dev], or in an environment of its own that sees it
    python benchmarks/mutation.py --sample 20 [--seed 0] [--limit 60] [methods forms/ans.py ...]

Cosmic Ray makes the mutants: one operator, number, comparison or decorator of one file changed. Each one
runs against the tests that mirror its file (the first failure is enough), in a copy of the repository. Prints
how many were killed, survived or ran out of time, file by file, and every survivor as a diff (on standard
error as soon as it is found).

Third-party packages are imported once, and every mutant is a fork of that process: without that, most of the
time would go to importing torch. Linux and macOS alone, therefore. What is left out: annotations, assertions
(they speak to the type checker; `strict` of zip is one) and the wording of errors. A sample draws places in
the code, and then one mutant for each, for an operator of arithmetic has eleven and a number two.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cosmic_ray.plugins as operators
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/lmpress"
ROOMS = ("methods", "statistics", "survey", "forms")
MEMORY = 16 << 30
"""Bytes of address space that a mutant may take: a wrong size should fail, and not fill the machine."""

LOG = "output.txt"
"""What the last tests printed, beside the copy."""

Place = tuple[int, int]


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    start: Place
    operator: str
    occurrence: int

    def applied(self, source: str) -> str:
        """The source with the change."""
        mutated: str = mutate_code(source, operators.get_operator(self.operator)(), self.occurrence)
        return mutated

    def diff(self, source: str, name: str) -> str:
        """The change, as a unified diff without context."""
        lines = difflib.unified_diff(
            source.splitlines(), self.applied(source).splitlines(), name, name, n=0, lineterm=""
        )
        return "\n".join(list(lines)[2:])


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a file."""
    tree, silent = get_ast(source), _silent(source)
    found = []
    for name in operators.operator_names():
        kind = operators.get_operator(name)
        if kind.arguments():
            continue
        starts = [start for node in ast_nodes(tree) for start, _ in kind().mutation_positions(node)]
        found += [
            Mutant(start, name, number)
            for number, start in enumerate(starts)
            if not any(first <= start < last for first, last in silent)
        ]
    return found


def _silent(source: str) -> list[tuple[Place, Place]]:
    """Where a change says nothing about the mathematics: annotations, assertions and errors."""
    spans: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert | ast.Raise):
            spans.append(node)
        if isinstance(node, ast.keyword) and node.arg == "strict":
            spans.append(node)
        spans += [
            part for part in (getattr(node, "annotation", None), getattr(node, "returns", None)) if part
        ]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in spans]  # type: ignore[attr-defined]


def drawn(mutants: list[Mutant], sample: int | None, seed: str) -> list[Mutant]:
    """Up to `sample` of them, each from another place; None for all."""
    if sample is None:
        return mutants
    generator = random.Random(seed)
    places: dict[Place, list[Mutant]] = {}
    for mutant in mutants:
        places.setdefault(mutant.start, []).append(mutant)
    picked = generator.sample(sorted(places), min(sample, len(places)))
    return [generator.choice(places[place]) for place in sorted(picked)]


def mirror(file: Path) -> list[str]:
    """The tests of a file, relative to the root: its mirror, and those that hold the whole room.

    These are the tests of `base.py`, and what mirrors no single file. A file without a mirror has all tests
    of its room, or of the nearest room around it that has some.
    """
    room = ROOT / "tests" / file.relative_to(ROOT / PACKAGE).parent
    while not any(room.glob("test_*.py")):
        room = room.parent
    own, every = room / f"test_{file.stem}.py", sorted(room.glob("test_*.py"))
    others = [path for path in every if not (file.parent / path.name.removeprefix("test_")).is_file()]
    tests = [own, room / "test_base.py", *others] if own.is_file() else every
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(tests) if path.is_file()]


def preload() -> None:
    """Import what the tests import, but for the package and the tests themselves."""
    code = "import sys, lmpress, tests.conftest, hypothesis, pytest; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in told.stdout.split():
        if name.partition(".")[0] not in ("lmpress", "tests", "__main__"):
            with suppress(Exception):
                importlib.import_module(name)


def outcome(tests: list[str], copy: Path, limit: float) -> str:
    """`killed`, `survived` or `timeout`: the tests in a fork, on the copy as it is now."""
    child = os.fork()
    if not child:
        _run(tests, copy)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _run(tests: list[str], copy: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        told = os.open(copy.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy / "src"), str(copy)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        pytest = importlib.import_module("pytest")
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help="rooms, or files of them; default: " + " ".join(ROOMS))
    parser.add_argument("--sample", type=int, help="mutants of a file; default: all there are")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds a mutant, or thrice what no mutant takes"
    )
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True  # a mutant of the same second and size would run as the one before
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    preload()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "repository"
        kept = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", ".venv")
        shutil.copytree(ROOT, copy, ignore=kept, symlinks=True)
        report(files(arguments.parts), copy, arguments)


def files(parts: list[str]) -> list[Path]:
    """The files of the named rooms and of the rooms in them, but for those that only import."""
    found: list[Path] = []
    for part in parts or [room for room in ROOMS if (ROOT / PACKAGE / room).is_dir()]:
        path = ROOT / PACKAGE / part
        if not path.exists():
            sys.exit(f"there is no {PACKAGE}/{part}")
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [path for path in found if path.name != "__init__.py"]


def report(paths: list[Path], copy: Path, arguments: argparse.Namespace) -> None:
    """Run everything, and print the table and the survivors."""
    survivors: list[str] = []
    rooms: dict[str, Counter[str]] = {}
    print(f"{'file':42} {'mutants':>7} {'killed':>7} {'timeout':>7} {'survived':>8}")
    for path in paths:
        name, source = str(path.relative_to(ROOT / PACKAGE)), path.read_text()
        tests, changed = mirror(path), copy / path.relative_to(ROOT)
        start = time.monotonic()
        if outcome(tests, copy, 5 * arguments.limit) != "survived":
            print((copy.parent / LOG).read_text()[-4000:])
            sys.exit(f"{' '.join(tests)} fail without any mutant, or take {5 * arguments.limit:g} s")
        limit = max(arguments.limit, 3 * (time.monotonic() - start))  # slow tests are no sign of a mutant
        found: Counter[str] = Counter()
        for mutant in drawn(mutants_of(source), arguments.sample, f"{arguments.seed} {name}"):
            changed.write_text(mutant.applied(source))
            result = outcome(tests, copy, limit)
            found[result] += 1
            if result == "survived":
                survivors.append(f"{name}, {mutant.operator.partition('/')[2]}\n{mutant.diff(source, name)}")
                print(survivors[-1], file=sys.stderr, flush=True)
        changed.write_text(source)
        rooms.setdefault(name.partition("/")[0], Counter()).update(found)
        row(name, found)
    for room, told in (rooms | {"all": sum(rooms.values(), Counter())}).items():
        row(room, told)
    print("\n".join(["", "Survivors:", *survivors]))


def row(name: str, found: Counter[str]) -> None:
    numbers = found.total(), found["killed"], found["timeout"], found["survived"]
    noticed = 1 - found["survived"] / max(1, found.total())
    print(f"{name:42} {numbers[0]:7} {numbers[1]:7} {numbers[2]:7} {numbers[3]:8} {noticed:7.0%}", flush=True)


if __name__ == "__main__":
    main()
