"""The whole thing on a real small model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmpress.api.compression import compress_with
from lmpress.api.generation import continuation
from lmpress.api.loading import device_of, load_any
from lmpress.api.measuring import evaluate_loaded
from lmpress.errors import writing
from lmpress.evaluation import Evaluation
from lmpress.pipeline import RunOptions
from lmpress.recipes import Calibration, load_recipe

DEMO_SAMPLES = 16
DEMO_TOKENS = 16_384
DEMO_PROMPT = "The water cycle has three main steps. First,"


@dataclass(frozen=True)
class Demo:
    """What `demo` made and measured.

    Attributes:
        evaluations: of `dense`, `int8` and `spq`.
        directories: where the checkpoints are, by recipe.
        prompt: what the samples go on from.
        samples: greedy continuations by model.
    """

    evaluations: Mapping[str, Evaluation]
    directories: Mapping[str, Path]
    prompt: str
    samples: Mapping[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything as one object."""
        return {
            "models": {name: e.to_json() | {"reference": None} for name, e in self.evaluations.items()},
            "directories": {name: str(path) for name, path in self.directories.items()},
            "prompt": self.prompt,
            "samples": dict(self.samples),
            "seconds": round(self.seconds, 1),
        }


def demo(output: str | Path) -> Demo:
    """Compress the demo model with `int8` and `spq`, load both back, and compare them with the dense model.

    The calibration text is written by the model itself; the evaluation text is the language reference
    that comes with Python. An interrupted demo goes on where it stopped.
    """
    start = time.perf_counter()
    target = Path(output).expanduser()
    options = RunOptions("self", device_of("auto"), resume=True)
    directories = {}
    with writing(Path(output), "run the same command again: it goes on where it stopped"):
        for name in ("int8", "spq"):
            recipe = load_recipe(name)
            recipe = recipe.model_copy(update={"calibration": Calibration(samples=DEMO_SAMPLES, seq_len=512)})
            compress_with("demo", recipe, target / name, options)
            directories[name] = target / name
    models: dict[str, str | Path] = {"dense": "demo", **directories}
    loaded = {name: load_any(model) for name, model in models.items()}
    evaluations = evaluate_loaded(
        loaded, models, ["python-docs"], "dense", None, DEMO_TOKENS, None, throughput=True
    )
    samples = {name: continuation(parts, DEMO_PROMPT, 40) for name, parts in loaded.items()}
    return Demo(evaluations, directories, DEMO_PROMPT, samples, time.perf_counter() - start)
