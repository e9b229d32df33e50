"""The command as a process of its own: streams that are closed, full, or lack characters; early signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-c", "from lmpress_command import main; main()"]


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, **options)


def test_a_reader_that_has_enough() -> None:
    command = start("recipes", "--json", stdout=subprocess.PIPE)
    assert command.stdout is not None
    command.stdout.close()
    _, stderr = command.communicate()
    assert (command.returncode, stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_a_standard_output_that_is_full() -> None:
    with open("/dev/full", "wb") as full:
        command = start("recipes", stdout=full)
        _, stderr = command.communicate()
    assert command.returncode == 1
    assert stderr.startswith(b"error: standard output: no space left on device")
    assert stderr.count(b"\n") == 1


def test_a_standard_output_that_is_closed() -> None:
    shell = ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "recipes", "show", "int9"]
    done = subprocess.run(shell, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no recipe is called 'int9'")
    assert done.stderr.count(b"\n") == 1


def test_characters_that_the_terminal_lacks(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text('name: "é☃"\nsteps:\n  - quantize: {targets: linears}\n', encoding="utf-8")
    shown = {}
    for more in ([], ["--json"]):
        command = start(
            "recipes",
            "show",
            str(recipe),
            *more,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        shown[len(more)], stderr = command.communicate()
        assert (command.returncode, stderr) == (0, b"")
    assert shown[0].startswith(b'name: "\\xe9\\u2603"')
    assert json.loads(shown[1])["name"] == "é☃"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_libraries_are_loaded(number: int) -> None:
    command = start("recipes", stdout=subprocess.PIPE)
    time.sleep(0.5)
    command.send_signal(number)
    stdout, stderr = command.communicate()
    assert (command.returncode, stdout, stderr) == (128 + number, b"", b"error: interrupted\n")
