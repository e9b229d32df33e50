"""What the steps make of the parts of a form: statistics and sensitivities that follow them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmpress.forms import Dense, Form, LowRank, Pivoted, Sum
from lmpress.methods.gptq import GptqOptions, gptq
from lmpress.methods.result import Rewritten
from lmpress.recipes import LeafContext, LeafStep, Pivot, Quantize, Svd, parse_recipe
from tests.recipes.steps.data import GENERATOR, INPUTS, WEIGHT, after, statistics


def test_the_coefficients_are_fitted_to_what_the_basis_gives() -> None:
    pivoted = after(Pivot(), after(Svd(ratio=0.8)))
    assert isinstance(pivoted, Pivoted)
    form = after(Quantize(bits=4, solver="gptq"), pivoted)
    assert isinstance(form, Pivoted)
    behind = statistics().through(form.basis.dense())
    options = GptqOptions(bits=4, granularity="channel", damping=0.03, clip=False)
    alone = gptq(pivoted.coefficients.dense(), behind, options).form
    assert torch.equal(form.coefficients.dense(), alone.dense())


def expected_square(sensitivity: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
    """E[g_k^2] at hidden values that reach the outputs by `through`, by autograd on each output alone.

    Gradients of the outputs that are independent, of mean square s_i: the squares of what each gives add up.
    """
    hidden = torch.zeros(through.shape[1], dtype=torch.float64, requires_grad=True)
    total = torch.zeros_like(hidden)
    for i, s in enumerate(sensitivity.double()):
        loss = s.sqrt() * (through.double() @ hidden)[i]
        (gradient,) = torch.autograd.grad(loss, hidden)
        total += gradient.square()
    return total.detach().float()


class Spy(LeafStep):
    """Leaves every leaf as it is, and notes what it came with."""

    kind = "spy"

    def rewrite_leaf(self, leaf: Form, statistics: Any, context: LeafContext) -> Any:
        SEEN.append((leaf, statistics, context))
        return Rewritten(leaf, {})


SEEN: list[tuple[Form, Any, LeafContext]] = []


def seen_by_leaves(form: Form, context: LeafContext) -> list[LeafContext]:
    SEEN.clear()
    Spy().rewrite(form, statistics(), context)
    return [context for _, _, context in SEEN]


def test_sensitivity_goes_behind_a_factor() -> None:
    left, sensitivity = torch.randn(24, 5, generator=GENERATOR), torch.rand(24, generator=GENERATOR)
    context = LeafContext(seed=4, share=0.1, sensitivity=sensitivity).behind(left)
    assert (context.seed, context.share) == (4, 0.1)
    assert context.sensitivity is not None
    torch.testing.assert_close(context.sensitivity, expected_square(sensitivity, left))
    assert LeafContext(share=3).behind(left) == LeafContext(share=3)


def test_sensitivity_of_pivoted_rows() -> None:
    form = after(Pivot(), after(Svd(ratio=0.8)))
    assert isinstance(form, Pivoted)
    sensitivity = torch.rand(24, generator=GENERATOR)
    inner, outer = seen_by_leaves(form, LeafContext(sensitivity=sensitivity))
    # every output of the module in terms of the basis outputs: dense() = through @ basis
    through = form.dense().double() @ torch.linalg.pinv(form.basis.dense().double())
    expected = expected_square(sensitivity, through)
    assert inner.sensitivity is not None
    assert outer.sensitivity is not None
    torch.testing.assert_close(inner.sensitivity, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(outer.sensitivity, sensitivity[~form.pivots()])
    assert outer.sensitivity.shape[0] == form.coefficients.shape[0]
    plain = LeafContext(share=4)
    assert seen_by_leaves(form, plain) == [plain, plain]


def test_every_leaf_gets_a_sensitivity_an_output() -> None:
    sensitivity = torch.rand(24, generator=GENERATOR)
    factors = after(Svd(ratio=0.8))
    for form in (factors, after(Pivot(), factors), Sum((Dense(WEIGHT), factors))):
        assert len(seen_by_leaves(form, LeafContext(sensitivity=sensitivity))) >= 2
        for leaf, _, context in SEEN:
            assert context.sensitivity is not None
            assert context.sensitivity.shape == (leaf.shape[0],)


def test_what_strays_is_told_to_the_leaves_that_read_the_input_of_the_module() -> None:
    """Behind a factor nobody knows it; statistics there are those of what the factor gives."""
    cross = torch.rand(32, 32, generator=GENERATOR)
    factors = after(Svd(ratio=0.8))
    assert isinstance(factors, LowRank)
    terms = Sum((Dense(WEIGHT), factors))
    right, left = factors.right, factors.left
    told = [context.cross for context in seen_by_leaves(terms, LeafContext(cross=cross))]
    assert [leaf for leaf, _, _ in SEEN] == [terms.terms[0], right, left]
    assert told[0] is cross
    assert told[1] is cross
    assert told[2] is None
    inner = INPUTS @ right.dense().T
    known = SEEN[2][1].require_hessian()
    torch.testing.assert_close(known, inner.T @ inner / len(inner), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "steps",
    [
        [{"sparsify": {"sparsity": 0.5, "targets": "mlp"}}, {"quantize": {"targets": "attention"}}],
        [{"sparsify": {"sparsity": 0.5}}, {"quantize": {"targets": "embeddings"}}],
        [{"sparsify": {"sparsity": 0.5}}, {"correct": {}}, {"recover": {"keep": "term"}}],
        [{"quantize": {"targets": "*.q_proj"}}, {"correct": {"targets": "attention"}}],  # names decide
        [{"prune_neurons": {}}, {"svd": {"ratio": 0.9}}, {"sparsify": {"sparsity": 0.5}}],
        [{"svd": {"ratio": 0.9}}, {"pivot": {"targets": "attention"}}, {"entropy_quantize": {"bits": 3.3}}],
        [{"entropy_quantize": {}}, {"correct": {"rank": 4}}, {"recover": {"keep": "term"}}],
        [{"entropy_quantize": {"targets": "embeddings"}}, {"quantize": {}}, {"recover": {}}],
        [{"quantize": {"bits": 4.25, "allocation": "mixed"}}, {"recover": {"keep": "merge"}}],
        [{"sparsify": {"sparsity": 0.5, "targets": "mlp"}}, {"recover": {"targets": "attention"}}],
        [{"sparsify": {"sparsity": 0.5, "targets": "*.q_proj"}}, {"recover": {}}],  # the plan looks at names
    ],
)
def test_what_can_follow_is_let_through(steps: list[dict[str, object]]) -> None:
    assert len(parse_recipe({"steps": steps}, "r").steps) == len(steps)
