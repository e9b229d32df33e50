"""The command line: one JSON object, one clear line, the right exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmpress.cli import main
from lmpress.cli.output import parse_bytes
from lmpress.errors import RequestError
from tests.conftest import EVERY_STEP
from tests.tiny import tiny_model, tiny_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `lmpress ARGUMENTS`: (exit code, standard output, standard error)."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lmpress", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(EVERY_STEP))  # JSON is YAML
    return path


def test_compress_evaluate_inspect_generate(
    run: Run, tiny: Callable[[str], Path], recipe: Path, text_file: Path, other_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run(
        "compress", tiny("llama"), "-r", recipe, "-o", out, "--calibration", text_file, "--json"
    )
    assert code == 0
    told = json.loads(stdout)
    on_disk = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert told["bytes_on_disk"] == on_disk

    code, stdout, _ = run(
        "evaluate", out, "--text", other_text, "--reference", tiny("llama"), "--window", 64, "--json"
    )
    assert code == 0
    told = json.loads(stdout)
    keys = ["perplexity", "tokens", "window", "corpus_sha256", "bytes_on_disk", "bytes_16bit", "ratio", "bpw"]
    assert all(told[key] is not None for key in keys)
    assert all(told["reference"][key] is not None for key in keys)
    assert told["bytes_on_disk"] == on_disk
    assert told["ratio"] == pytest.approx(on_disk / told["bytes_16bit"])
    assert told["kl"] > 0

    code, stdout, _ = run("inspect", out, "--json")
    assert code == 0
    told = json.loads(stdout)
    module = told["modules"]["model.layers.0.self_attn.q_proj"]
    assert 0 < module["relative_output_error"] < 1
    assert module["form"].startswith("LowRank")

    code, stdout, _ = run("generate", out, "the quick", "--max-new-tokens", 5, "--json")
    assert code == 0
    assert isinstance(json.loads(stdout)["continuation"], str)

    for verb in (
        ["inspect", out],
        ["evaluate", out, "--text", other_text, "--window", 64],
        ["generate", out, "a"],
    ):
        code, stdout, _ = run(*verb)
        assert code == 0
        assert stdout.strip()


def test_the_card_gets_the_numbers(
    run: Run, compressed: Callable[[str], Path], tiny: Callable[[str], Path], other_text: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(compressed("llama"), copy)
    assert "Nothing yet" in (copy / "README.md").read_text()
    options = ["--text", other_text, "--window", 64, "--reference", tiny("llama"), "--card", "--json"]
    code, stdout, _ = run("evaluate", copy, *options)
    assert code == 0
    assert f"{json.loads(stdout)['perplexity']:.3f}" in (copy / "README.md").read_text()


def test_text_that_calibration_saw_is_refused(
    run: Run, compressed: Callable[[str], Path], text_file: Path
) -> None:
    code, _, stderr = run("evaluate", compressed("llama"), "--text", text_file, "--window", 64)
    assert code == 2
    assert "evaluate on another text" in " ".join(stderr.split())


def test_a_part_of_it_is_refused_too(
    run: Run, compressed: Callable[[str], Path], other_text: Path, tmp_path: Path
) -> None:
    seen = load_file(compressed("llama") / "calibration.safetensors")["input_ids"][2]
    part = tmp_path / "part.txt"
    part.write_text(bytes(seen.tolist()).decode() + other_text.read_text()[:400])
    code, _, stderr = run("evaluate", compressed("llama"), "--text", part, "--window", 64)
    assert code == 2
    assert "13-grams" in stderr


def test_dry_run_prints_the_plan_and_writes_nothing(
    run: Run, tiny: Callable[[str], Path], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, _ = run("compress", tiny("llama"), "-r", recipe, "-o", out, "--dry-run")
    assert code == 0
    plan = json.loads(stdout)
    assert plan["predicted"]["bytes"] > 0
    assert set(plan["modules"]["model.layers.1.mlp.up_proj"]["steps"][0]) == {"quantize"}
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "{model}", "-r", "nothing", "-o", "{out}"], "no recipe is called 'nothing'"),
        (["compress", "{model}", "-r", "int8"], "say where the checkpoint goes"),
        (["compress", "/nowhere/model", "-r", "int8", "-o", "{out}"], "there is no model"),
        (["compress", "{model}", "-r", "int8", "-o", "{out}", "--memory", "lots"], "is no size"),
        (["compress", "{model}", "-r", "int8", "-o", "{out}", "--device", "quantum"], "is not to be had"),
        (
            ["compress", "{model}", "-r", "svd", "-o", "{out}", "--calibration", "{out}"],
            "calibration|corpus|text",
        ),
        (["inspect", "{model}"], "no checkpoint that lmpress wrote"),
        (["evaluate", "{model}", "--text", "nonsense"], "nonsense"),
        (["recipes", "show", "int9"], "did you mean 'int8'"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, run: Run, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    import re

    filled = [a.format(model=tiny("llama"), out=tmp_path / "out") for a in arguments]
    code, stdout, stderr = run(*filled)
    assert code == 2
    assert stdout == ""
    assert "Traceback" not in stderr
    assert re.search(words, " ".join(stderr.split()))
    assert not (tmp_path / "out").exists()
    code, stdout, _ = run(*filled, "--json")
    assert code == 2
    assert json.loads(stdout)["exit_code"] == 2


NEEDS_NO_TEXT, NEEDS_TEXT = "int8", "svd"


@pytest.mark.parametrize("recipe", [NEEDS_NO_TEXT, NEEDS_TEXT])
@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--resume"]])
@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ("NONSENSE", "there is no corpus or file 'NONSENSE'"),
        ("python-docs,NONSENSE", "there is no corpus or file 'NONSENSE'"),
        ("file:nowhere/gone.txt", "cannot read the text file 'nowhere/gone.txt': No such file"),
        (",", "no text is named in ','"),
        ("{directory}", "Is a directory"),
    ],
)
def test_calibration_that_does_not_exist_is_refused_before_any_work(
    recipe: str,
    more: list[str],
    calibration: str,
    words: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lmpress.api import compression
    from lmpress.corpora import corpus

    def too_late(*_: Any) -> None:
        raise AssertionError("a model was opened, or a text was read")

    monkeypatch.setattr(compression, "open_source", too_late)
    monkeypatch.setitem(corpus.NAMED, "python-docs", too_late)
    out = tmp_path / "out"
    filled = calibration.format(directory=tmp_path)
    code, stdout, stderr = run(
        "compress", "model", "-r", recipe, "-o", out, "--calibration", filled, *more, "--json"
    )
    assert code == 2
    told = json.loads(stdout)
    assert words in told["error"]
    assert "\n" not in told["error"]
    assert "Traceback" not in stderr
    assert not out.exists()


def test_text_that_does_not_exist_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmpress.api import comparison, measuring

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was compressed or loaded")

    monkeypatch.setattr(comparison, "compress_with", too_late)
    monkeypatch.setattr(measuring, "load_any", too_late)
    for verb in (["evaluate", "model"], ["compare", "model", "-r", "int8", "-o", tmp_path / "out"]):
        code, stdout, _ = run(*verb, "--text", "NONSENSE", "--json")
        assert code == 2
        assert "there is no corpus or file 'NONSENSE'" in json.loads(stdout)["error"]


def test_recipes(run: Run, tmp_path: Path) -> None:
    code, stdout, _ = run("recipes", "--json")
    assert code == 0
    assert {"spq", "spq-paper", "svd", "prune", "int8", "int4"} <= {
        r["name"] for r in json.loads(stdout)["recipes"]
    }
    code, stdout, _ = run("recipes", "show", "spq")
    assert code == 0
    assert "prune_neurons" in stdout
    copy = tmp_path / "mine.yaml"
    assert run("recipes", "copy", "spq", copy)[0] == 0
    assert run("recipes", "copy", "spq", copy)[0] == 2
    code, stdout, _ = run("recipes", "show", copy, "--json")
    assert code == 0
    assert json.loads(stdout)["name"] == "spq"


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6_000_000_000), ("512 MB", 512_000_000), ("4GiB", 4 << 30), ("1.5k", 1500), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_no_size() -> None:
    assert parse_bytes(None) is None
    with pytest.raises(RequestError):
        parse_bytes("much")


@pytest.mark.parametrize("path", ["file/mine.yaml", "x" * 300])
def test_a_recipe_that_cannot_be_written_there(path: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, stdout, stderr = run("recipes", "copy", "int8", tmp_path / path)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {tmp_path / path}: ")
    assert stderr.count("\n") == 1


def test_what_is_shown_is_what_it_is(run: Run, tiny: Callable[[str], Path]) -> None:
    prompt = "a [bold]b[/x] :heart:\tc " + "long " * 30
    code, stdout, _ = run("generate", tiny("llama"), prompt, "--max-new-tokens", 1)
    assert code == 0
    assert stdout.startswith(prompt)
    code, _, stderr = run("compress", "[x][/y] :heart:", "-r", "int8", "-o", "out")
    assert code == 2
    assert "[x][/y] :heart:" in stderr


def test_a_comparison_of_models_that_broke_is_json(
    run: Run, recipe: Path, text_file: Path, other_text: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # too large for the type that it is stored in
    model.half().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["-r", "int8", "-r", recipe, "-o", out, "--text", other_text, "--window", 64]
    code, stdout, stderr = run(
        "compare", tmp_path / "model", *arguments, "--calibration", text_file, "--json"
    )
    assert code == 0
    for told in (strictly(stdout), strictly((out / "comparison.json").read_text())):
        for row in told["rows"]:
            assert row["not_finite"] > 0
            keys = ("perplexity", "kl", "top1_agreement", "sr_perplexity", "srcr_perplexity")
            assert all(row[key] is None for key in keys)
    assert "logits that are not finite" in stderr
    assert "nan" not in (out / "comparison.csv").read_text()


def strictly(text: str) -> Any:
    """JSON without the NaN that Python would take."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize(("verb", "words"), [("compress", "; go on with --resume"), ("generate", "")])
def test_a_signal_is_one_line_and_its_exit_code(
    verb: str, words: str, number: int, code: int, word: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmpress import api

    def interrupted(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(api, verb, interrupted)
    before = signal.getsignal(number)
    more = ["-r", "int8", "-o", "nowhere"] if verb == "compress" else ["a"]
    found, stdout, stderr = run(verb, "demo", *more)
    assert (found, stdout) == (code, "")
    assert stderr.startswith(f"error: {word}{words}")
    assert stderr.count("\n") == 1
    assert signal.getsignal(number) == before


def test_what_the_machine_lacks_is_no_unexpected_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmpress import api

    for error, words in (
        (OSError(errno.EIO, "Input/output error", "model/x"), "model/x: input/output error; mend that"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "model"), "model: file name too long"),
    ):

        def fails(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(api, "generate", fails)
        code, _, stderr = run("generate", "model", "a")
        assert code == (2 if "name" in words else 1)
        assert stderr.startswith(f"error: {words}")
