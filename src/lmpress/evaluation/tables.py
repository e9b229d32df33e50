"""Evaluations as a table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from lmpress.evaluation.evaluate import Evaluation, TextResult
from lmpress.evaluation.modules import ModuleRow

WIDE = 5
"""Models up to which each is a column; more of them are rows."""

ERRORS = {"relative_weight_error": "weight error", "relative_output_error": "output error"}
"""What a manifest calls a module's errors -> what the table does."""

NOT_FINITE = "not finite"
"""What stands in the place of a number that is none."""

Cell = Callable[[Evaluation], str]


def evaluation_table(evaluations: Mapping[str, Evaluation], title: str | None = None) -> Table:
    """Size, quality and speed of models beside each other, the reference first.

    A reference that is not among the evaluations is taken from the first that has one.
    """
    shown = list(evaluations.values())
    for reference in (e.reference for e in shown):
        if reference is not None and reference.name not in evaluations:
            shown.insert(0, reference)
            break
    metrics = _metrics(shown)
    cells = [[cell(evaluation) for evaluation in shown] for _, cell in metrics]
    table = Table(title=title)
    if len(shown) <= WIDE:
        table.add_column("")
        for evaluation in shown:
            table.add_column(evaluation.name, justify="right")
        for (label, _), row in zip(metrics, cells, strict=True):
            table.add_row(label, *row)
        return table
    table.add_column("")
    for label, _ in metrics:
        table.add_column(label, justify="right")
    for evaluation, column in zip(shown, zip(*cells, strict=True), strict=True):
        table.add_row(evaluation.name, *column)
    return table


def module_rows_table(rows: Sequence[ModuleRow], title: str | None = None) -> Table:
    """What each module became, and what it costs; with the relative errors that the manifest holds."""
    table = Table(title=title)
    for label in ("module", "form"):
        table.add_column(label)
    errors = {key: label for key, label in ERRORS.items() if any(key in row.report for row in rows)}
    for label in ("shape", "was", "size", "bits a weight", *errors.values()):
        table.add_column(label, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.formula,
            "x".join(map(str, row.shape)),
            "x".join(map(str, row.original_shape)),
            human_bytes(row.bytes),
            f"{row.bits_per_weight:.2f}",
            *(_number(row.report.get(key), ".2%") for key in errors),
        )
    return table


def human_bytes(count: int | None) -> str:
    """1_234_567 -> `1.2 MB`, in powers of 1000; a dash for None."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95 or (unit == "B" and size < 1000):
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _metrics(shown: Sequence[Evaluation]) -> list[tuple[str, Cell]]:
    metrics: list[tuple[str, Cell]] = [
        ("on disk", lambda e: human_bytes(e.bytes_on_disk) + ("" if e.disk_measured else " *")),
        ("of 16-bit", lambda e: _number(e.ratio, ".1%")),
        ("bits a weight (linears)", lambda e: _number(e.bpw, ".2f")),
        ("in memory", lambda e: human_bytes(e.resident_bytes)),
    ]
    if any(not e.disk_measured and e.bytes_on_disk is not None for e in shown):
        metrics[0] = ("on disk (* as 16-bit)", metrics[0][1])
    several = max(len(e.texts) for e in shown) > 1
    for i, text in enumerate(shown[0].texts):
        of = f", {text.protocol.corpus}" if several else ""
        label = "" if text.protocol.label == "lmpress" else f" ({text.protocol.label} protocol)"
        metrics.append((f"perplexity{label}{of}", _of_text(i, _perplexity)))
        if any(e.texts[i].score.kl is not None for e in shown):
            metrics.append((f"KL to dense, nats{label}{of}", _of_text(i, _kl)))
            metrics.append((f"same top token{label}{of}", _of_text(i, _agreement)))
    if any(e.throughput for e in shown):
        metrics.append(("prefill, tokens/s", _prefill))
        metrics.append(("decode, tokens/s", _decode))
    return metrics


def _of_text(index: int, cell: Callable[[TextResult], str]) -> Cell:
    return lambda e: cell(e.texts[index])


def _perplexity(text: TextResult) -> str:
    return _number(text.score.perplexity, ".3f")


def _kl(text: TextResult) -> str:
    return _number(text.score.kl, ".4f")


def _agreement(text: TextResult) -> str:
    return _number(text.score.top1_agreement, ".1%")


def _prefill(evaluation: Evaluation) -> str:
    speed = evaluation.throughput
    return "-" if speed is None else _speed(speed.prefill_tokens_per_s, speed.prefill_ratio)


def _decode(evaluation: Evaluation) -> str:
    speed = evaluation.throughput
    return "-" if speed is None else _speed(speed.decode_tokens_per_s, speed.decode_ratio)


def _speed(tokens_per_s: float, ratio: float | None) -> str:
    speed = f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"
    return speed if ratio is None else f"{speed} ({ratio:.2f}x)"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else NOT_FINITE
