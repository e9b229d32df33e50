"""How much was compressed, how much was kept, and both in one number: TCr, Sr, SrCr.

From "joint pruning and quantization under SrCr" (arXiv 2505.07289). The paper gives TCr and Sr, and says that
SrCr joins them through a square root of the sparsity and a logarithm of the bit-width; the exact form of
SrCr below is this project's. None of the three knows about masks, scales and indices: show real bytes beside.
"""

from __future__ import annotations

import math

BASE_BITS = 16


def tcr(sparsity: float, bits: float) -> float:
    """Theoretical compression: 1 - (1 - s) q/16, the share of a 16-bit model that is saved on paper.

    Args:
        sparsity: share of the weights that are removed, in [0, 1].
        bits: bits a remaining weight, in (0, 16].
    """
    _check(sparsity, bits)
    return 1 - (1 - sparsity) * bits / BASE_BITS


def sr(score: float, baseline: float) -> float:
    """Score retention: the compressed model's score over the dense one's; for scores where more is better."""
    if baseline == 0:
        raise ValueError("the dense model's score is 0: nothing can be retained of it")
    return score / baseline


def sr_from_perplexity(perplexity: float, dense_perplexity: float) -> float:
    """Score retention from perplexities: dense / compressed, for there less is better."""
    if perplexity <= 0 or dense_perplexity <= 0:
        raise ValueError(f"a perplexity is above 0, not {min(perplexity, dense_perplexity)}")
    return dense_perplexity / perplexity


def gain(sparsity: float, bits: float) -> float:
    """What SrCr multiplies Sr by: g = 1 - (1 - sqrt(s)) (1 - log2(16/q)/4), this project's form.

    0 for a dense 16-bit model, 1 where nothing is left (s = 1) or one bit is (q = 1).
    """
    _check(sparsity, bits)
    return 1 - (1 - math.sqrt(sparsity)) * (1 - math.log2(BASE_BITS / bits) / 4)


def srcr(retention: float, sparsity: float, bits: float) -> float:
    """SrCr = Sr * g(s, q): retention weighed by how much was compressed."""
    return retention * gain(sparsity, bits)


def _check(sparsity: float, bits: float) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity is between 0 and 1, not {sparsity}")
    if not 0 < bits <= BASE_BITS:
        raise ValueError(f"bits a weight are above 0 and at most {BASE_BITS}, not {bits}")
