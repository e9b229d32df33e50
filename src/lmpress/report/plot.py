"""Perplexity against real bytes, as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

from lmpress.errors import RequestError
from lmpress.evaluation import Evaluation

SALT = "lmpress"
"""Names the elements of an SVG, so that equal figures give equal bytes."""


def comparison_plot(evaluations: Mapping[str, Evaluation], kind: str) -> bytes:
    """A point a model: real bytes on disk against the perplexity on the first text.

    Args:
        evaluations: by name; one without bytes on disk is left out, and one whose perplexity is not finite.
        kind: `svg` or `png`.

    Raises:
        RequestError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("the plot needs matplotlib: pip install 'lmpress[plot]'") from None
    with rc_context({"svg.hashsalt": SALT, "font.size": 9}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, evaluation in evaluations.items():
            perplexity = evaluation.texts[0].score.perplexity
            if evaluation.bytes_on_disk is None or not math.isfinite(perplexity):
                continue
            size = evaluation.bytes_on_disk / 1e6
            marker = "s" if evaluation.reference is None else "o"
            axes.plot([size], [perplexity], marker)
            axes.annotate(name, (size, perplexity), textcoords="offset points", xytext=(5, 5))
        first = next(iter(evaluations.values())).texts[0].protocol
        axes.set_yscale("log")
        axes.set_xlabel("MB on disk, everything included")
        axes.set_ylabel(f"perplexity, {first.corpus}, windows of {first.window}")
        axes.grid(alpha=0.3, which="both")
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
