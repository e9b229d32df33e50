"""Several recipes over one model, measured in one run at real bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmpress.api.compression import compress_with
from lmpress.api.loading import device_of
from lmpress.api.measuring import evaluate_many
from lmpress.checkpoint import read_json, write_bytes, write_json
from lmpress.corpora import check_corpus
from lmpress.errors import RequestError, writing
from lmpress.evaluation import METRICS, Evaluation, nominal_compression, srcr, tcr
from lmpress.pipeline import RunOptions
from lmpress.recipes import Recipe, load_recipe
from lmpress.report import comparison_plot

TIMES = "runs.json"
"""Beside the checkpoints: seconds and peak memory of each compression, for a resumed comparison."""


SURVEYS = "surveys"
"""Beside the checkpoints: what recipes of one model and text need to see only once."""


@dataclass(frozen=True)
class Row:
    """One recipe in a comparison.

    Attributes:
        name: of the recipe; `dense` for the reference.
        evaluation: what was measured.
        sparsity: share of the linears' weights for which no value is stored; 0 for the reference.
        bits: mean nominal bits of the values that are stored.
        seconds: of the compression; None for the reference.
        peak_resident_set: of the compressing process, which a comparison does one recipe after the other in.
    """

    name: str
    evaluation: Evaluation
    sparsity: float
    bits: float
    seconds: float | None
    peak_resident_set: int | None

    def to_json(self) -> dict[str, Any]:
        """The evaluation with the retention figures and what the compression took."""
        told = self.evaluation.to_json() | {"name": self.name, "reference": None}
        retention = told["sr_perplexity"]
        return told | {
            "sparsity": self.sparsity,
            "bits": self.bits,
            "tcr": tcr(self.sparsity, self.bits),
            "sr_perplexity": retention,
            "srcr_perplexity": None if retention is None else srcr(retention, self.sparsity, self.bits),
            "compression_seconds": self.seconds,
            "compression_peak_resident_set": self.peak_resident_set,
        }


@dataclass(frozen=True)
class Comparison:
    """A table of recipes; the dense model first."""

    rows: tuple[Row, ...]
    directory: Path

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By name, the dense model first."""
        return {row.name: row.evaluation for row in self.rows}

    def to_json(self) -> dict[str, Any]:
        """All rows as one object."""
        return {"directory": str(self.directory), "rows": [row.to_json() for row in self.rows]}

    def to_csv(self) -> str:
        """A line a recipe: sizes, a perplexity and a KL a text, retention, times and speeds."""
        buffer = io.StringIO()
        writer: csv.DictWriter[str] | None = None
        for row in self.rows:
            flat = _flat(row.to_json())
            if writer is None:
                writer = csv.DictWriter(buffer, list(flat), lineterminator="\n")
                writer.writeheader()
            writer.writerow(flat)
        return buffer.getvalue()


def compare(
    model: str | Path,
    recipes: Sequence[str | Path | Recipe | Mapping[str, Any]],
    output: str | Path,
    *,
    calibration: str = "self",
    text: str | Sequence[str] = "python-docs",
    window: int | None = None,
    max_tokens: int | None = None,
    throughput: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    memory: int | None = None,
) -> Comparison:
    """Compress a model with each recipe, and measure all of them and the dense model in one pass.

    The dense model is measured once, and text that it writes for calibration is written once. Every
    checkpoint goes to `output/RECIPE`; a comparison that was interrupted goes on where it stopped.
    `comparison.json`, `comparison.csv`, `comparison.svg` and `comparison.png` are written to `output`.

    Args:
        model: as for `compress`.
        recipes: two recipes or more make sense; their names have to differ.
        calibration: as for `compress`; the same for all.
        text: as for `evaluate`.

    Raises:
        RequestError: two recipes of one name, among others.
    """
    loaded = [load_recipe(recipe) for recipe in recipes]
    names = _checked_names(loaded)
    for spec in [text] if isinstance(text, str) else text:
        check_corpus(spec)  # before hours of compression
    target = Path(output).expanduser()
    with writing(Path(output), "run the same command again: it goes on where it stopped"):
        times = _compress_all(model, loaded, target, RunOptions(calibration, device_of(device), memory))
        results = evaluate_many(
            {"dense": model} | {name: target / name for name in names},
            text=text,
            reference="dense",
            window=window,
            max_tokens=max_tokens,
            throughput=throughput,
            dtype=dtype,
            device=device,
        )
        rows = [Row("dense", results["dense"], 0.0, 16.0, None, None)]
        for name in names:
            took = times[name]
            nominal = nominal_compression(target / name)
            rows.append(Row(name, results[name], *nominal, took["seconds"], took["peak_resident_set"]))
        comparison = Comparison(tuple(rows), target)
        _write(comparison)
    return comparison


def _checked_names(recipes: Sequence[Recipe]) -> list[str]:
    """The names of recipes, each of which becomes a directory. RequestError where they cannot."""
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1 or name in ("dense", SURVEYS)})
    stray = next((name for name in names if name in ("", ".", "..") or Path(name).name != name), None)
    if stray is not None:
        raise RequestError(f"a comparison has a directory a recipe, and {stray!r} cannot name one")
    if twice or not recipes:
        told = f"{twice[0]!r} is taken" if twice else "none is given"
        raise RequestError(f"a comparison needs recipes of different names, and {told}")
    return names


def _compress_all(
    model: str | Path, recipes: Sequence[Recipe], target: Path, options: RunOptions
) -> dict[str, Any]:
    """Each recipe into `target/NAME`. What each took; of one that was finished before, what it took then."""
    times = dict(read_json(target / TIMES)) if (target / TIMES).is_file() else {}
    lenders = tuple(target / recipe.name for recipe in recipes)
    shared = replace(options, resume=True, lenders=lenders, surveys=target / SURVEYS)
    for recipe in recipes:
        done = compress_with(model, recipe, target / recipe.name, shared)
        if recipe.name not in times:
            times[recipe.name] = {"seconds": done.seconds, "peak_resident_set": done.peak_resident_set}
            write_json(target / TIMES, times)
    return times


def _write(comparison: Comparison) -> None:
    write_json(comparison.directory / "comparison.json", comparison.to_json())
    write_bytes(comparison.directory / "comparison.csv", comparison.to_csv().encode())
    for kind in ("svg", "png"):
        picture = comparison_plot(comparison.evaluations, kind)
        write_bytes(comparison.directory / f"comparison.{kind}", picture)


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the CSV: scalars as they are, a column a text, the speeds spelled out."""
    flat = {k: v for k, v in told.items() if not isinstance(v, dict | list) and k != "reference"}
    names = [text["corpus"] for text in told["texts"]]
    for name, text in zip(names, told["texts"], strict=True):  # files of one name differ by their hashes
        place = name if names.count(name) == 1 else f"{name} {text['corpus_sha256'][:12]}"
        for key in ("perplexity", *(metric.key for metric in METRICS), "tokens", "not_finite"):
            flat[f"{key} ({place})"] = text[key]
    speeds = told["throughput"] or {}
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio"):
        flat[key] = speeds.get(key)
    return flat
