"""A killed run goes on, and ends with the bytes of an unbroken one; equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tqdm.auto
import tqdm.std
from transformers import LlamaConfig

import lmpress
from lmpress.errors import RequestError
from lmpress.pipeline import WORK, Run
from tests.conftest import EVERY_STEP
from tests.tiny import TINY, save_tiny, tiny_model, tiny_tokenizer

RECOVERING: dict[str, Any] = {
    **EVERY_STEP,
    "steps": [
        *EVERY_STEP["steps"],
        {"recover": {"steps": 4, "seq_len": 32, "learning_rate": 1e-2, "rank": 2}},
    ],
}


def digest(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of six blocks: enough moments to be killed at."""
    TINY["deep"] = lambda: LlamaConfig(
        **{**TINY["llama"]().to_dict(), "num_hidden_layers": 6, "model_type": "llama"}
    )
    try:
        return save_tiny("deep", tmp_path_factory.mktemp("deep") / "model")
    finally:
        del TINY["deep"]


@pytest.fixture(scope="module")
def unbroken(
    deep: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], float]:
    """The files of an unbroken run, and how long it took."""
    root = tmp_path_factory.mktemp("unbroken")
    lmpress.compress(deep, RECOVERING, root / "warm", calibration=str(text_file))  # imports take time once
    start = time.perf_counter()
    lmpress.compress(deep, RECOVERING, root / "out", calibration=str(text_file))
    return digest(root / "out"), time.perf_counter() - start


def recovering(model: Path, text: Path, output: Path) -> dict[str, Any]:
    """The arguments of `lmpress.compress` for the run that these tests interrupt."""
    return {"model": model, "recipe": RECOVERING, "output": output, "calibration": str(text)}


def start_and_kill(moment: Callable[[], bool], **arguments: Any) -> bool:
    """Run `lmpress.compress` in a forked process, and SIGKILL it at a moment. Whether it was killed."""
    child = os.fork()
    if child == 0:
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # the one that forks share would stay locked by the dead
            bar.set_lock(threading.RLock())
        try:
            lmpress.compress(**arguments, resume=True)
        finally:
            os._exit(0)
    while not moment():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_and_resumed(
    seed: int, deep: Path, text_file: Path, unbroken: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    expected, seconds = unbroken
    arguments = recovering(deep, text_file, tmp_path / "out")
    draw = random.Random(seed)

    def after(share: float) -> Callable[[], bool]:
        deadline = time.perf_counter() + share * seconds
        return lambda: time.perf_counter() >= deadline

    killed = sum(start_and_kill(after(draw.uniform(0.02, 0.6)), **arguments) for _ in range(3))
    assert killed, "no run was interrupted: the test would show nothing"
    lmpress.compress(**arguments, resume=True)
    assert digest(tmp_path / "out") == expected


def test_finished_blocks_are_not_made_again(
    deep: Path, text_file: Path, unbroken: tuple[dict[str, str], float], tmp_path: Path, monkeypatch: Any
) -> None:
    arguments = recovering(deep, text_file, tmp_path / "out")
    journal = tmp_path / "out" / WORK / "journal.jsonl"
    assert start_and_kill(lambda: journal.is_file() and b'"block": 3' in journal.read_bytes(), **arguments)
    made = []
    original = Run._block
    monkeypatch.setattr(
        Run,
        "_block",
        lambda self, index, *rest, **more: (made.append(index), original(self, index, *rest, **more))[1],
    )
    lmpress.compress(**arguments, resume=True)
    assert made
    assert min(made) >= 4
    assert digest(tmp_path / "out") == unbroken[0]


BUDGETS: dict[str, Any] = {
    "name": "budgets",
    "calibration": {"samples": 8, "seq_len": 32},
    "steps": [
        {"prune_neurons": {"allocation": "loss", "ratio": 0.2, "multiple_of": 8}},
        {"quantize": {"targets": "attention", "bits": 4.5, "allocation": "mixed", "solver": "gptq"}},
        {"entropy_quantize": {"targets": "mlp", "bits": 3.5}},
        {"entropy_quantize": {"targets": "embeddings", "bits": 6}},
    ],
}
"""Bits that depend on all blocks together, and on the real sizes of those before."""


@pytest.fixture(scope="module")
def within_budgets(deep: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an unbroken run under BUDGETS."""
    output = tmp_path_factory.mktemp("budgets") / "out"
    lmpress.compress(deep, BUDGETS, output, calibration=str(text_file))
    return digest(output)


@pytest.mark.parametrize(
    "line", [b'"calibration"', b'"outer"', b'"survey"', b'"allocation"', b'"block": 0', b'"block": 3']
)
def test_a_killed_run_shares_its_budgets_as_before(
    line: bytes, deep: Path, text_file: Path, within_budgets: dict[str, str], tmp_path: Path
) -> None:
    arguments = recovering(deep, text_file, tmp_path / "out") | {"recipe": BUDGETS}
    journal = tmp_path / "out" / WORK / "journal.jsonl"
    assert start_and_kill(lambda: journal.is_file() and line in journal.read_bytes(), **arguments)
    lmpress.compress(**arguments, resume=True)
    assert digest(tmp_path / "out") == within_budgets


def test_a_lost_survey_is_made_again(
    deep: Path, text_file: Path, within_budgets: dict[str, str], tmp_path: Path
) -> None:
    arguments = recovering(deep, text_file, tmp_path / "out") | {"recipe": BUDGETS}
    work = tmp_path / "out" / WORK
    journal = work / "journal.jsonl"
    assert start_and_kill(lambda: journal.is_file() and b'"block": 1' in journal.read_bytes(), **arguments)
    (work / "sensitivity.safetensors").unlink()
    lmpress.compress(**arguments, resume=True)
    assert digest(tmp_path / "out") == within_budgets


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_scaled_biases_are_those_that_a_resumed_run_reads(
    family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind scaled channels the biases of values are no 16-bit numbers any more, until they are rounded."""
    tiny_model(family).bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = {
        "calibration": {"samples": 8, "seq_len": 32, "precision": "float32"},
        "steps": [{"awq": {}}, {"quantize": {"bits": 4, "solver": "gptq"}}],
    }
    whole, broken = (recovering(tmp_path / "model", text_file, tmp_path / n) for n in ("whole", "broken"))
    lmpress.compress(**whole | {"recipe": recipe})
    original = Run._block

    def until(self: Run, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        original(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_block", until)
        with pytest.raises(KeyboardInterrupt):
            lmpress.compress(**broken | {"recipe": recipe})
    lmpress.compress(**broken | {"recipe": recipe}, resume=True)
    assert digest(tmp_path / "broken") == digest(tmp_path / "whole")


@pytest.mark.parametrize("moved", [1, 4, 9])
def test_a_kill_while_publishing(
    moved: int,
    deep: Path,
    text_file: Path,
    unbroken: tuple[dict[str, str], float],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    arguments = recovering(deep, text_file, tmp_path / "out")
    original, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        if Path(target).parent == tmp_path / "out":
            count += 1
            if count > moved:
                raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        lmpress.compress(**arguments)
    monkeypatch.undo()
    lmpress.compress(**arguments, resume=True)
    assert digest(tmp_path / "out") == unbroken[0]


def test_same_inputs_same_bytes(
    deep: Path, text_file: Path, unbroken: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    lmpress.compress(deep, RECOVERING, tmp_path / "again", calibration=str(text_file))
    assert digest(tmp_path / "again") == unbroken[0]


def test_another_seed_draws_other_text(deep: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = {**EVERY_STEP, "seed": 43}
    one = lmpress.compress(deep, recipe, tmp_path / "a", calibration=str(text_file)).manifest
    two = lmpress.compress(deep, EVERY_STEP, tmp_path / "b", calibration=str(text_file)).manifest
    assert one["calibration"][0]["ids_sha256"] != two["calibration"][0]["ids_sha256"]


def test_resume_with_nothing_there_begins(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lmpress.compress(tiny("llama"), "int8", tmp_path / "out", resume=True)
    first = digest(tmp_path / "out")
    lmpress.compress(tiny("llama"), "int8", tmp_path / "out", resume=True)  # finished: nothing to do
    assert digest(tmp_path / "out") == first


def test_a_full_directory_is_left_alone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    with pytest.raises(RequestError, match="not empty"):
        lmpress.compress(tiny("llama"), "int8", output)
    assert digest(output) == {"precious.txt": hashlib.sha256(b"mine").hexdigest()}
    lmpress.compress(tiny("llama"), "int8", output, force=True)
    assert (output / "precious.txt").read_text() == "mine"
    assert not (output / WORK).exists()


def test_resume_where_no_run_was_leaves_what_is_there(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(tiny("llama-untied"), output)
    before = digest(output)
    with pytest.raises(RequestError, match="not empty"):
        lmpress.compress(tiny("llama"), "int8", output, resume=True)
    assert digest(output) == before


def test_old_and_new_weights_never_load_together(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    lmpress.compress(tiny("llama"), "int8", output)
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == output / "model-00002-of-00003.safetensors":
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            lmpress.compress(tiny("mistral"), "int8", output, force=True)
    assert not (output / "config.json").exists()
    lmpress.compress(tiny("mistral"), "int8", output, resume=True)
    lmpress.compress(tiny("mistral"), "int8", tmp_path / "fresh")
    assert digest(output) == digest(tmp_path / "fresh")


def test_force_does_not_overwrite_foreign_weights(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    lmpress.compress(tiny("llama"), "int8", output)
    (output / "theirs.safetensors").write_bytes(b"precious")
    before = digest(output)
    with pytest.raises(RequestError, match=r"did not write \(theirs\.safetensors\)"):
        lmpress.compress(tiny("llama"), "int8", output, force=True)
    assert digest(output) == before


def test_force_after_a_cut_publication_keeps_one_whole_checkpoint(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    lmpress.compress(tiny("llama-untied"), "int8", tmp_path / "whole")
    original, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        if Path(target).parent == output:
            count += 1
            if count > 3:
                raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        lmpress.compress(tiny("llama-untied"), "int8", output)
    monkeypatch.undo()
    monkeypatch.setattr(Run, "execute", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lmpress.compress(tiny("llama"), "int8", output, force=True)
    shutil.rmtree(output / WORK)
    assert digest(output) == digest(tmp_path / "whole")


def test_force_replaces_an_earlier_checkpoint_whole(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lmpress.compress(tiny("llama-untied"), "int8", tmp_path / "out")
    lmpress.compress(tiny("llama"), "int8", tmp_path / "out", force=True)
    lmpress.compress(tiny("llama"), "int8", tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_resume_of_another_run_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lmpress.compress(tiny("llama"), "int8", tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(RequestError, match="another model, recipe"):
        lmpress.compress(tiny("llama"), "prune", tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == before


def test_a_directory_of_links_to_the_model_is_never_overwritten(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for path in tiny("llama").iterdir():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(RequestError, match="is to be compressed"):
        lmpress.compress(tmp_path, "int8", tmp_path, force=True)
    assert (tmp_path / "model.safetensors").is_symlink()


def test_the_model_itself_is_never_overwritten(tiny: Callable[[str], Path]) -> None:
    before = digest(tiny("llama"))
    with pytest.raises(RequestError, match="is to be compressed"):
        lmpress.compress(tiny("llama"), "int8", tiny("llama"), force=True)
    assert digest(tiny("llama")) == before


def test_a_damaged_shard_is_made_again(
    deep: Path, text_file: Path, unbroken: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    arguments = recovering(deep, text_file, tmp_path / "out")
    journal_path = tmp_path / "out" / WORK / "journal.jsonl"
    assert start_and_kill(
        lambda: journal_path.is_file() and b'"block": 1' in journal_path.read_bytes(), **arguments
    )
    shards = sorted((tmp_path / "out" / WORK / "checkpoint").glob("model-*.safetensors"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-7])
    with open(journal_path, "ab") as journal:
        journal.write(b'{"block": 5, "file"')  # a line torn by the crash
    lmpress.compress(**arguments, resume=True)
    assert digest(tmp_path / "out") == unbroken[0]
