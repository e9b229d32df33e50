"""The assembled result, its JSON and its table."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lmpress.corpora import Corpus, evaluation_windows
from lmpress.errors import RequestError
from lmpress.evaluation import (
    Evaluation,
    EvaluationText,
    TextProtocol,
    Timing,
    bytes_16bit,
    disk_bytes,
    evaluate_models,
    evaluation_table,
    human_bytes,
    measure,
    module_rows_table,
    module_table,
    resident_bytes,
    spq_text,
    weight_bytes,
)
from lmpress.evaluation.modules import block_linears
from tests.evaluation.test_modules import put, rounded
from tests.tiny import save_tiny, tiny_model, tiny_text, tiny_tokenizer

CORPUS = Corpus("novel", "test", (tiny_text(600, seed=2),))


def text_of(corpus: Corpus = CORPUS, window: int = 128) -> EvaluationText:
    windows = evaluation_windows(corpus, tiny_tokenizer(), window)
    return EvaluationText(TextProtocol.of(corpus, windows, window, None), windows)


def int8() -> Any:
    model = tiny_model("llama")
    for name in block_linears(model.config):
        put(model, name, rounded(model.get_submodule(name).weight.detach()))
    return model


def printed(table: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Evaluation], Path, dict[str, Any]]:
    path = save_tiny("llama", tmp_path_factory.mktemp("dense"))
    models = {"int8": int8(), "dense": tiny_model("llama")}
    texts = [text_of(), spq_text(CORPUS, tiny_tokenizer())]
    timing = Timing(prefill_tokens=16, decode_tokens=2, runs=1)
    return evaluate_models(models, texts, {"dense": path}, "dense", timing), path, models


def test_every_number_is_where_it_belongs(evaluated: Any) -> None:
    results, path, models = evaluated
    assert list(results) == ["int8", "dense"]
    text = text_of()
    scores = measure(models, text.windows, "dense")
    full = bytes_16bit(models["dense"].config)
    dense = results["dense"].to_json()
    assert dense["perplexity"] == pytest.approx(scores["dense"].perplexity)
    assert dense["bytes_on_disk"] == disk_bytes(path) > dense["weight_bytes_on_disk"] == weight_bytes(path)
    assert dense["bytes_16bit"] == full
    assert dense["ratio"] == disk_bytes(path) / full
    assert dense["bpw"] == 32
    assert dense["resident_bytes"] == resident_bytes(models["dense"])
    assert dense["reference"] is None

    packed = results["int8"].to_json()
    assert packed["kl"] == pytest.approx(scores["int8"].kl)
    assert packed["top1_agreement"] == scores["int8"].top1_agreement
    assert packed["tokens"] == sum(len(w) - 1 for w in text.windows)
    assert (packed["window"], packed["stride"], packed["bos"], packed["dtype"]) == (
        128,
        128,
        "none",
        "float32",
    )
    assert (packed["corpus"], packed["split"], packed["corpus_sha256"]) == ("novel", "test", CORPUS.sha256)
    assert packed["bytes_on_disk"] is packed["ratio"] is None  # compressed, and in no file
    assert 8 < packed["bpw"] < 8.5
    assert packed["resident_bytes"] < dense["resident_bytes"]
    assert packed["sr_perplexity"] == pytest.approx(dense["perplexity"] / packed["perplexity"])
    assert packed["reference"] == dense
    assert packed["throughput"]["baseline"] == "dense"
    assert [t["label"] for t in packed["texts"]] == ["lmpress", "spq"]
    assert json.loads(json.dumps(packed, allow_nan=False)) == packed


def test_a_dense_model_without_files_stands_for_the_16_bit_checkpoint() -> None:
    model = tiny_model("llama")
    result = evaluate_models({"m": model}, [text_of()])["m"].to_json()
    assert result["bytes_on_disk"] == result["weight_bytes_on_disk"] == bytes_16bit(model.config)
    assert (result["disk_measured"], result["ratio"], result["bpw"]) == (False, 1.0, 16.0)
    assert result["kl"] is result["throughput"] is result["reference"] is None


def test_a_model_that_broke_is_null_in_json() -> None:
    broken = int8()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    result = evaluate_models({"a": broken, "dense": tiny_model("llama")}, [text_of()], reference="dense")["a"]
    assert math.isnan(result.texts[0].score.perplexity)
    told = result.to_json()
    json.dumps(told, allow_nan=False)
    assert told["perplexity"] is told["kl"] is told["top1_agreement"] is told["sr_perplexity"] is None
    assert told["not_finite"] == told["tokens"]


def test_two_models_that_broke_do_not_agree() -> None:
    models = {"dense": tiny_model("llama"), "a": int8()}
    for model in models.values():
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))
    results = evaluate_models(models, [text_of()], reference="dense")
    assert all(result.to_json()["top1_agreement"] is None for result in results.values())
    shown = printed(evaluation_table(results))
    assert [line.count("not finite") for line in shown.splitlines() if "same top token" in line] == [2]
    assert [line.count("not finite") for line in shown.splitlines() if "perplexity" in line] == [2]


def test_an_unsupported_family_is_measured_without_bits() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=2)).eval()
    result = evaluate_models({"m": model}, [text_of()])["m"]
    assert result.bpw is None
    assert result.bytes_16bit == 2 * model.num_parameters()
    assert "-" in printed(evaluation_table({"m": result}))


def test_nothing_to_measure() -> None:
    with pytest.raises(RequestError, match="needs a model and a text"):
        evaluate_models({}, [text_of()])


def test_the_table_has_a_column_a_model_and_a_row_a_metric(evaluated: Any) -> None:
    results = evaluated[0]
    shown = printed(evaluation_table({"int8": results["int8"]}, "A title"))
    header = next(line for line in shown.splitlines() if "int8" in line)
    assert header.index("dense") < header.index("int8")  # the reference came along
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    score = results["int8"].texts[0].score
    assert f"{score.perplexity:.3f}" in rows["perplexity, novel"]
    assert "perplexity (spq protocol), novel" in rows
    assert f"{score.kl:.4f}" in rows["KL to dense, nats, novel"]
    assert f"{results['dense'].ratio:.1%}" in rows["of 16-bit"]
    assert "(1.00x)" in rows["decode, tokens/s"]


def test_many_models_are_rows(evaluated: Any) -> None:
    results = evaluated[0]
    many = {"dense": results["dense"]} | {f"recipe{i}": results["int8"] for i in range(6)}
    shown = printed(evaluation_table(many))
    assert sum("int8" in line for line in shown.splitlines()) == 6


def test_the_table_of_modules() -> None:
    shown = printed(module_rows_table(module_table(int8())))
    line = next(line for line in shown.splitlines() if "model.layers.1.mlp.up_proj" in line)
    assert all(piece in line for piece in ("int8", "96x64", "6.3 kB", "8.25"))
    assert "error" not in shown


def test_the_table_of_modules_shows_the_errors_that_are_known() -> None:
    rows = module_table(int8())
    rows[3] = replace(rows[3], report={"relative_output_error": 0.0123})
    shown = printed(module_rows_table(rows))
    assert "output error" in shown
    assert "weight error" not in shown
    assert [line.split("│")[1].strip() for line in shown.splitlines() if "1.23%" in line] == [rows[3].name]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (269_060_352, "269.1 MB"),
        (13_476_839_424, "13.5 GB"),
        (2 * 10**12, "2.0 TB"),
        (None, "-"),
    ],
)
def test_human_bytes(count: int | None, expected: str) -> None:
    assert human_bytes(count) == expected
