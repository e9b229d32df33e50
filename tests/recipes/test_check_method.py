"""Every step of a recipe, in all its methods, held to what `check_method` asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmpress.forms import Dense, Form, LowRank
from lmpress.methods.rtn import RoundOptions, round_to_nearest
from lmpress.methods.wanda import WandaOptions, wanda
from lmpress.recipes import FormStep
from lmpress.recipes.steps import STEPS
from tests.recipes.check_method import check_method


def factored(weight: Tensor) -> Form:
    """Factors of rank min(4, out, in)."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(Dense(left[:, :4] * values[:4]), Dense(right[:4]))


def rounded(weight: Tensor) -> Form:
    return round_to_nearest(weight, None, RoundOptions(bits=3)).form


def pruned(weight: Tensor) -> Form:
    return wanda(weight, None, WandaOptions(score="magnitude")).form


GPTQ: dict[str, Any] = {"solver": "gptq", "bits": 3}
SSLC: dict[str, Any] = {"sparsity": 0.5, "iterations": 20}

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("quantize", {"bits": 8}, {}),
    ("quantize", {"bits": 4, "granularity": "group:8", "symmetric": False, "clip": True}, {}),
    ("quantize", {"bits": 5, "granularity": "tensor"}, {}),
    ("quantize", {"bits": 4, "granularity": "group:32"}, {}),  # as wide as the weight
    ("quantize", {"bits": 4, "granularity": "group:32", "solver": "gptq"}, {}),
    ("quantize", GPTQ, {}),
    ("quantize", GPTQ | {"granularity": "group:8", "sweeps": 1, "clip": True, "symmetric": False}, {}),
    ("quantize", GPTQ | {"asymmetry": 0.5, "order": "activation"}, {}),
    ("quantize", GPTQ | {"bits": 4, "granularity": "tensor", "order": "none"}, {"start": pruned}),
    ("quantize", {"bits": 4.25, "allocation": "mixed", "granularity": "group:8"}, {}),
    ("entropy_quantize", {"bits": 4}, {}),
    ("entropy_quantize", {"bits": 3, "asymmetry": 1.0, "largest_code": 7}, {}),
    # the step of a table is found by what its codes take, which depends on their order
    ("entropy_quantize", {"bits": 5, "targets": "embeddings"}, {"row_wise": False}),
    ("entropy_quantize", {"bits": 5, "targets": "embeddings", "token_weight": 0}, {"row_wise": False}),
    ("svd", {"keep_variance": 0.9}, {}),
    ("svd", {"ratio": 0.6, "whiten": False}, {}),
    ("svd", {"max_error": 0.3, "multiple_of": 4}, {}),
    ("svd", {"ratio": 0.6, "method": "asvd"}, {}),
    ("svd", {"ratio": 0.6, "method": "svd_llm"}, {}),
    ("svd", {"ratio": 0.6, "method": "svd_llm", "update": 1.0}, {}),
    ("svd", {"ratio": 0.6, "method": "svd_llm", "allocation": "sensitivity"}, {}),
    ("pivot", {}, {"start": factored}),
    ("correct", {"rank": 3}, {"start": rounded}),
    ("correct", {"rank": 3, "metric": "diagonal"}, {"start": rounded}),
    ("correct", {"rank": 3, "bits": 4}, {"start": rounded}),
    ("sparsify", {"sparsity": 0.5}, {}),
    ("sparsify", {"pattern": "2:4", "bits": 4, "sweeps": 1}, {}),
    ("sparsify", {"sparsity": 0.25, "bits": 3, "case": "all", "granularity": "group:8"}, {}),
    ("sparsify", {"sparsity": 0.5, "asymmetry": 0.5, "allocation": "sensitivity"}, {}),
    ("sparsify", {"sparsity": 0.5, "method": "wanda"}, {}),
    ("sparsify", {"sparsity": 0.5, "method": "magnitude"}, {}),
    ("sparsify", {"pattern": "2:4", "method": "alps", "asymmetry": 1.0}, {}),
    ("sparsify", {"sparsity": 0.7, "method": "alps", "damping": 0.0, "allocation": "sensitivity"}, {}),
    # the first directions of the low-rank term are drawn, a number for every row
    ("sparse_low_rank", SSLC, {"row_wise": False}),
    ("sparse_low_rank", SSLC | {"metric": "diagonal", "protect": 0.9}, {"row_wise": False}),
    ("sparse_low_rank", SSLC | {"kappa": None, "asymmetry": 0.5}, {"row_wise": False}),
    ("sparse_low_rank", SSLC | {"bits": 4, "factor_bits": 4, "kappa": 0.5}, {"row_wise": False}),
    ("sparse_low_rank", {"pattern": "2:4", "iterations": 20, "damping": 0.0}, {"row_wise": False}),
]

NO_FORM = {"rotate", "awq", "prune_neurons", "recover"}
"""Steps that rewrite no form: of the whole model before it is read, of sites, and those that train."""


@pytest.mark.parametrize(("kind", "options", "how"), CASES, ids=lambda value: str(value)[:60])
def test_the_step_holds_to_what_all_steps_hold_to(
    kind: str, options: dict[str, Any], how: dict[str, Any]
) -> None:
    step = STEPS[kind].model_validate(options)
    assert isinstance(step, FormStep)
    check_method(step, **how)


def test_no_step_is_left_out() -> None:
    assert {kind for kind, _, _ in CASES} | NO_FORM == STEPS.keys()
    assert not any(issubclass(STEPS[kind], FormStep) for kind in NO_FORM)
