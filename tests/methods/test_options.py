"""The ranges of every option: their ends belong to them, what lies beyond is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lmpress.methods.alps import AlpsOptions
from lmpress.methods.asvd import AsvdOptions
from lmpress.methods.entropy_quantization import EntropyOptions
from lmpress.methods.gptq import GptqOptions
from lmpress.methods.low_rank_correction import CorrectionOptions
from lmpress.methods.neuron_pruning import NeuronOptions
from lmpress.methods.pivoting import PivotOptions
from lmpress.methods.rtn import RoundOptions
from lmpress.methods.sparsegpt import SparseGptOptions
from lmpress.methods.sslc import SslcOptions
from lmpress.methods.svd import SvdOptions
from lmpress.methods.svd_llm import SvdLlmOptions
from lmpress.methods.wanda import WandaOptions

SHARE = ((0.0, 1.0), (-0.01, 1.01))
POSITIVE_SHARE = ((1e-9, 1.0), (0.0, 1.01, -0.5))
NOT_NEGATIVE = ((0.0, 3.0), (-1e-9, -1.0))
COUNT = ((1, 5), (0, -1))
PASSES = ((0, 3), (-1,))
BITS = ((2, 8), (1, 9))

RANGES: list[tuple[type, str, tuple[tuple[Any, ...], tuple[Any, ...]], dict[str, Any]]] = [
    (AlpsOptions, "sparsity", SHARE, {}),
    (AlpsOptions, "damping", NOT_NEGATIVE, {}),
    (AlpsOptions, "iterations", COUNT, {}),
    (AlpsOptions, "refit", PASSES, {}),
    (AlpsOptions, "asymmetry", SHARE, {}),
    (AsvdOptions, "ratio", POSITIVE_SHARE, {}),
    (AsvdOptions, "multiple_of", COUNT, {}),
    (EntropyOptions, "damping", NOT_NEGATIVE, {}),
    (EntropyOptions, "dead_zone", NOT_NEGATIVE, {}),
    (EntropyOptions, "asymmetry", SHARE, {}),
    (EntropyOptions, "chunk_size", COUNT, {}),
    (EntropyOptions, "largest_code", COUNT, {}),
    (GptqOptions, "bits", BITS, {}),
    (GptqOptions, "damping", NOT_NEGATIVE, {}),
    (GptqOptions, "sweeps", PASSES, {}),
    (GptqOptions, "asymmetry", SHARE, {}),
    (CorrectionOptions, "rank", COUNT, {}),
    (CorrectionOptions, "damping", NOT_NEGATIVE, {}),
    (NeuronOptions, "damping", NOT_NEGATIVE, {}),
    (PivotOptions, "largest_coefficient", ((1.001, 2.0), (1.0, 0.5)), {}),
    (PivotOptions, "largest_error", ((1e-9, 1.0), (0.0, -1.0)), {}),
    (RoundOptions, "bits", BITS, {}),
    (SparseGptOptions, "sparsity", SHARE, {}),
    (SparseGptOptions, "bits", BITS, {}),
    (SparseGptOptions, "damping", NOT_NEGATIVE, {}),
    (SparseGptOptions, "sweeps", PASSES, {}),
    (SparseGptOptions, "block", COUNT, {}),
    (SparseGptOptions, "asymmetry", SHARE, {}),
    (SslcOptions, "sparsity", ((0.0, 0.999), (-0.01, 1.0)), {}),
    (SslcOptions, "protect", ((0.0, 0.999), (-0.01, 1.0)), {}),
    (SslcOptions, "kappa", ((0.0, 1.0, None), (-0.01, 1.01)), {}),
    (SslcOptions, "kappa", ((0.0, 0.9), (1.0, None)), {"pattern": "2:4"}),
    (SslcOptions, "iterations", COUNT, {}),
    (SslcOptions, "refit", PASSES, {}),
    (SslcOptions, "damping", NOT_NEGATIVE, {}),
    (SslcOptions, "asymmetry", SHARE, {}),
    (SvdOptions, "keep_variance", POSITIVE_SHARE, {}),
    (SvdOptions, "ratio", POSITIVE_SHARE, {}),
    (SvdOptions, "max_error", NOT_NEGATIVE, {}),
    (SvdOptions, "multiple_of", COUNT, {"ratio": 0.5}),
    (SvdOptions, "damping", NOT_NEGATIVE, {"ratio": 0.5}),
    (SvdLlmOptions, "ratio", POSITIVE_SHARE, {}),
    (SvdLlmOptions, "rank", ((1, 9, None), (0, -1)), {}),
    (SvdLlmOptions, "damping", NOT_NEGATIVE, {}),
    (SvdLlmOptions, "update", SHARE, {}),
    (SvdLlmOptions, "multiple_of", COUNT, {}),
    (WandaOptions, "sparsity", SHARE, {}),
]


@pytest.mark.parametrize(("options", "name", "values", "others"), RANGES)
def test_ranges_have_their_ends(
    options: type, name: str, values: tuple[tuple[Any, ...], tuple[Any, ...]], others: dict[str, Any]
) -> None:
    allowed, refused = values
    for value in allowed:
        assert getattr(options(**{name: value}, **others), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=r"\w"):
            options(**{name: value}, **others)


DEFAULTS: dict[type, dict[str, Any]] = {
    AlpsOptions: {"sparsity": 0.5, "damping": 0.1, "iterations": 300, "refit": 10, "asymmetry": 0.0},
    AsvdOptions: {"ratio": 0.8, "alpha": 0.5, "multiple_of": 1},
    EntropyOptions: {"damping": 0.1, "dead_zone": 0.1, "asymmetry": 0.0, "flat_columns": False},
    GptqOptions: {
        "bits": 4,
        "granularity": "channel",
        "damping": 0.03,
        "sweeps": 0,
        "asymmetry": 0.0,
        "symmetric": True,
        "clip": False,
    },
    CorrectionOptions: {"rank": 32, "damping": 0.01, "bits": None},
    NeuronOptions: {"damping": 0.01, "compensate": True},
    PivotOptions: {"largest_coefficient": 1.1, "largest_error": 0.01, "safe_bits": 2.0},
    RoundOptions: {"bits": 8, "symmetric": True, "clip": False},
    SparseGptOptions: {"sparsity": 0.5, "damping": 0.01, "block": 128, "sweeps": 0, "asymmetry": 0.0},
    SslcOptions: {"sparsity": 0.5, "kappa": 0.2, "protect": 0.01, "damping": 0.1, "refit": 10},
    SvdLlmOptions: {"ratio": 0.8, "damping": 0.01, "update": 0.0, "multiple_of": 1},
    WandaOptions: {"sparsity": 0.5, "per_row": True},
}


@pytest.mark.parametrize("options", DEFAULTS)
def test_defaults_are_those_that_steps_have_where_a_recipe_says_nothing(options: type) -> None:
    made = options()
    for name, value in DEFAULTS[options].items():
        assert getattr(made, name) == value, name
    with pytest.raises(AttributeError):
        made.damping = 0.5  # frozen
