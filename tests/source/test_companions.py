"""What goes along with the weights, what does not, and what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import lmpress
from lmpress.source.companions import copy_companions, is_companion


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "tokenizer.model.v3",
        "vocab.txt",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
        "LICENSE",
        "LICENSE.md",
        "License-Gemma.txt",
        "NOTICE.txt",
        "USE_POLICY.md",
    ],
)
def test_goes_along(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        "modeling_x.py",
        "license.py",
        "tokenization_x.py",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "../LICENSE",
        "/LICENSE",
        "other/LICENSE",
        "other/tool_use.jinja",
        "additional_chat_templates/deep/x.jinja",
        "tokenizer.model.part",
    ],
)
def test_stays_behind(name: str) -> None:
    assert not is_companion(name)


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny model, to be added to."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def add(model: Path, name: str, content: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text(content)


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_templates_and_terms_arrive_and_code_does_not(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("LICENSE", "NOTICE.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        add(model, name, name)
    add(model, "modeling_x.py", "raise SystemExit")
    lmpress.compress(model, "int8", out)
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text().endswith("tool_use.jinja")
    assert (out / "LICENSE").read_text() == "LICENSE"
    assert not list(out.glob("*.py"))
    manifest = json.loads((out / "lmpress.json").read_text())
    assert {"LICENSE", "NOTICE.txt", "additional_chat_templates/tool_use.jinja"} <= set(
        manifest["companions"]
    )


def test_what_the_earlier_model_brought_goes_with_it(
    model: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("LICENSE", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        add(model, name, name)
    lmpress.compress(model, "int8", out)
    (out / "NOTICE.mine").write_text("not of a model")
    lmpress.compress(tiny("llama"), "int8", out, force=True)
    assert not (out / "LICENSE").exists()
    assert not (out / "chat_template.jinja").exists()
    assert not list(out.rglob("tool_use.jinja"))
    assert (out / "NOTICE.mine").exists()


def test_names_of_code_are_left_out_and_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(
        model / "config.json", auto_map={"AutoConfig": "configuration_x.X"}, my_note="kept", pad_token_id=253
    )
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    source = json.loads((model / "config.json").read_text())
    lmpress.compress(model, "int8", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["my_note"] == "kept"
    assert set(source) - {"auto_map"} <= set(config)  # defaults that it states included
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert set(json.loads((model / "tokenizer_config.json").read_text())) - set(tokenizer) == {"auto_map"}
    assert "tokenizer_config.json names code of the model's own" in capsys.readouterr().err


def test_a_link_out_of_the_directory_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    (tmp_path / "secret").write_text("secret")
    (model / "real").write_text("mine")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    (model / "NOTICE").symlink_to("real")
    (model / "chat_template.jinja").symlink_to("nowhere")
    copy_companions(model, out)
    assert [path.name for path in out.iterdir()] == ["NOTICE"]
    assert (out / "NOTICE").read_text() == "mine"
    assert not (out / "NOTICE").is_symlink()
    assert "LICENSE is a link out of the model directory" in " ".join(capsys.readouterr().err.split())


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    repository, out = tmp_path / "models--a--b", tmp_path / "out"
    snapshot = repository / "snapshots" / "0123"
    for directory in (snapshot, repository / "blobs", out):
        directory.mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (tmp_path / "linked").symlink_to(snapshot)
    copy_companions(tmp_path / "linked", out)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "tokenizer.json").is_symlink()
