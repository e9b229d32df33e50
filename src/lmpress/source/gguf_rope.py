"""Rotary frequencies of a GGUF file, as transformers writes them in a config.

llama.cpp divides position i's angle by `factor` (linear), by YaRN's mixture, or by one number per frequency,
which stands in a tensor: rope_freqs (Llama 3) or rope_factors_long and rope_factors_short (LongRoPE).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import numpy.typing

from lmpress.errors import RequestError
from lmpress.source.gguf_file import GgufFile

Array = numpy.typing.NDArray[numpy.float64]

EXACT = 1e-5
"""The largest relative error of a frequency in float32 whose parameters are found again."""


def rope_parameters(file: GgufFile, head_dim: int, context: int) -> dict[str, Any]:
    """The `rope_parameters` of a model whose layers all turn alike.

    Args:
        file: what is read; keys and tensors that are used are asked for.
        head_dim: the width of a head, all of which is turned.
        context: the longest text, in tokens.

    Raises:
        RequestError: a scaling that lmpress does not read, or one that does not fit the model.
    """
    theta = float(file.own("rope.freq_base", 10000.0))
    kind = file.own("rope.scaling.type", "linear")  # what llama.cpp takes where only a factor is given
    factor = float(file.own("rope.scaling.factor", 0) or file.own("rope.scale_linear", 0) or 1.0)
    original = int(file.own("rope.scaling.original_context_length", context))
    file.own("rope.scaling.finetuned", None)  # tells of training, and changes nothing
    base = {"rope_type": "default", "rope_theta": theta}
    divisors = _divisors(file, "rope_freqs.weight", head_dim)
    if divisors is not None:
        if kind != "none" and factor != 1.0:
            raise RequestError(f"{file.path} scales its rotary frequencies twice: by a key and by rope_freqs")
        return base | from_divisors(divisors, theta, context)
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return base
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return base | _yarn(file, factor, original)
    if kind == "longrope":
        return base | _longrope(file, head_dim, context, original)
    raise RequestError(f"{file.path} scales its rotary frequencies by {kind!r}, which lmpress does not read")


def _yarn(file: GgufFile, factor: float, original: int) -> dict[str, Any]:
    file.require("rope.scaling.yarn_ext_factor", 1.0)
    file.require("rope.scaling.yarn_attn_factor", 1.0)
    file.require("rope.scaling.attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": float(file.own("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(file.own("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _longrope(file: GgufFile, head_dim: int, context: int, original: int) -> dict[str, Any]:
    long, short = (_divisors(file, f"rope_factors_{which}.weight", head_dim) for which in ("long", "short"))
    if long is None or short is None:
        raise RequestError(f"{file.path} lacks the tensors rope_factors_long and rope_factors_short")
    return {
        "rope_type": "longrope",
        "factor": context / original,
        "original_max_position_embeddings": original,
        "attention_factor": float(file.own("rope.scaling.attn_factor", 1.0)),
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
    }


def _divisors(file: GgufFile, name: str, head_dim: int) -> Array | None:
    """What the frequencies are divided by, (head_dim / 2,), or None."""
    held = file.array(name)
    if held is None:
        return None
    if held.shape != (head_dim // 2,) or not bool(numpy.isfinite(held).all()) or not bool((held > 0).all()):
        raise RequestError(f"{file.path}: {name} does not hold {head_dim // 2} positive numbers")
    return held.astype(numpy.float64)


def from_divisors(divisors: Array, theta: float, context: int) -> dict[str, Any]:
    """The scaling that divides the frequencies by these numbers, (head_dim / 2,).

    Equal ones are a linear scaling. Others are looked for among Llama 3's, which more programs read; what
    is none of these is written number by number, as a LongRoPE that is the same for short and long texts.
    """
    if numpy.allclose(divisors, divisors[0], rtol=EXACT):
        factor = float(divisors[0])
        return {} if abs(factor - 1) < EXACT else {"rope_type": "linear", "factor": factor}
    for found in _candidates(divisors, theta):
        if numpy.allclose(llama3_divisors(found, theta, len(divisors)), divisors, rtol=EXACT):
            return {"rope_type": "llama3", **found}
    numbers = divisors.tolist()
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
        "long_factor": numbers,
        "short_factor": numbers,
    }


def llama3_divisors(parameters: dict[str, Any], theta: float, count: int) -> Array:
    """Llama 3's divisors: 1 for short waves, `factor` for long ones, and between them
    1 / ((1 - s) / factor + s) with s = (original / wavelength - low) / (high - low), clipped to 0..1.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    cycles = parameters["original_max_position_embeddings"] / _wavelengths(theta, count)
    share = numpy.clip((cycles - low) / (high - low), 0, 1)
    return numpy.asarray(1 / ((1 - share) / parameters["factor"] + share), dtype=numpy.float64)


def _wavelengths(theta: float, count: int) -> Array:
    return numpy.asarray(2 * math.pi * theta ** (numpy.arange(count) / count), dtype=numpy.float64)


def _candidates(divisors: Array, theta: float) -> Iterator[dict[str, Any]]:
    """Parameters of Llama 3's scaling that may give these divisors.

    Only the ratios of `original`, `low` and `high` count, so low = 1. With high = 4, as in every model of
    Llama's own, a single wave between short and long tells the rest; otherwise the line through two does.
    """
    factor = float(divisors.max())
    if factor <= 1:
        return
    waves = _wavelengths(theta, len(divisors))
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # 1 for short waves, 0 for long ones
    between = numpy.flatnonzero((share > EXACT) & (share < 1 - EXACT))
    if len(between):
        originals = waves[between] * (3 * share[between] + 1)
        yield _llama3(factor, 4.0, float(numpy.median(originals)))
    short, long = numpy.flatnonzero(share >= 1 - EXACT), numpy.flatnonzero(share <= EXACT)
    if len(between) < 2 and not len(short):
        return
    first, last = (between[0], between[-1]) if len(between) > 1 else (short[-1], long[0])
    slope = float((share[first] - share[last]) / (1 / waves[first] - 1 / waves[last]))
    offset = slope / float(waves[last]) - float(share[last])
    if slope > 0 and offset > 0:
        yield _llama3(factor, 1 + 1 / offset, slope / offset)


def _llama3(factor: float, high: float, original: float) -> dict[str, Any]:
    """The numbers as they were before they went through float32."""
    return {
        "factor": float(f"{factor:.5g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(f"{high:.5g}"),
        "original_max_position_embeddings": round(original),
    }
