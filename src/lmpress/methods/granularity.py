"""SPQ's hybrid granularities: one scale a tensor for some linears, one a channel for the others.

SPQ (arXiv 2602.18420, section 3.3) quantizes where it pays per channel, and per tensor elsewhere:

    percentile (PBH):  per channel where out_features >= the p-th percentile of all out_features, p = 50
    name (LNH):        per channel in the MLP; per tensor in attention, embeddings and head
    meanstd (MSH):     per channel where out_features >= mean + k * std of all out_features, k = 0.5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

RULES = ("percentile", "name", "meanstd")
"""The hybrids by their names in a recipe."""

MLP_PATTERNS = ("*mlp*", "*gate_proj*", "*up_proj*", "*down_proj*", "*fc1*", "*fc2*")
"""Names that belong to an MLP, in any of the families."""


def hybrid_granularities(
    shapes: Mapping[str, tuple[int, int]],
    rule: str,
    *,
    percentile: float = 50.0,
    k: float = 0.5,
    channel_patterns: Sequence[str] = MLP_PATTERNS,
) -> dict[str, str]:
    """Choose `tensor` or `channel` for every linear.

    Args:
        shapes: (out, in) of every linear by name; the statistics of `percentile` and `meanstd` are taken
            over exactly these.
        rule: `percentile`, `name` or `meanstd`.
        percentile: of the out_features, 0 to 100, linearly interpolated.
        k: standard deviations (of the population) above the mean.
        channel_patterns: globs on the names; `name` quantizes what matches one per channel.

    Returns:
        `tensor` or `channel` by name, in the order of `shapes`.

    Raises:
        ValueError: for an unknown rule or a percentile outside 0..100.
    """
    if rule == "name":
        return {
            name: "channel" if any(fnmatchcase(name, p) for p in channel_patterns) else "tensor"
            for name in shapes
        }
    if rule not in RULES:
        raise ValueError(f"unknown hybrid {rule!r}; known: {', '.join(RULES)}")
    if not 0 <= percentile <= 100:
        raise ValueError(f"a percentile lies between 0 and 100, not at {percentile}")
    if not shapes:
        return {}
    widths = torch.tensor([shape[0] for shape in shapes.values()], dtype=torch.float64)
    if rule == "percentile":
        threshold = float(torch.quantile(widths, percentile / 100))
    else:
        threshold = float(widths.mean() + k * widths.std(correction=0))
    return {name: "channel" if shape[0] >= threshold else "tensor" for name, shape in shapes.items()}
