"""Text that the model writes, against sampling without a cache and against the true distribution."""

import pytest
import torch
from tokenizers import processors

from lmpress.corpora import generate_text
from lmpress.corpora.generate import _pick
from lmpress.errors import LmpressError, RequestError
from tests.tiny import BOS, EOS, PAD, TINY, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("name", TINY)
def test_the_cache_changes_nothing(name):
    """Every token is the one that the same chance picks from the logits of a full pass without a cache."""
    model = tiny_model(name)
    ids = generate_text(model, tiny_tokenizer(), samples=3, seq_len=40, seed=5, batch_size=2)
    assert ids.shape == (3, 40)
    assert ids.dtype == torch.int64
    chance = torch.rand(3, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    cumulated = logits.double().softmax(-1).cumsum(-1)
    below = torch.cat([torch.zeros_like(cumulated[..., :1]), cumulated[..., :-1]], dim=-1)
    token = ids[:, 1:, None]
    slack = 1e-4  # rounding differs between the two ways
    assert (below.gather(-1, token)[..., 0] <= chance[:, 1:] + slack).all()
    assert (cumulated.gather(-1, token)[..., 0] >= chance[:, 1:] - slack).all()


def test_the_seed_decides_and_the_batch_size_does_not():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first = generate_text(model, tokenizer, 5, 24, seed=1, batch_size=2)
    assert torch.equal(first, generate_text(model, tokenizer, 5, 24, seed=1, batch_size=2))
    assert not torch.equal(first, generate_text(model, tokenizer, 5, 24, seed=2, batch_size=2))
    other = generate_text(model, tokenizer, 5, 24, seed=1, batch_size=5)
    assert (first == other).float().mean() > 0.9
    assert len({tuple(row) for row in first.tolist()}) == 5
    state = torch.get_rng_state()
    generate_text(model, tokenizer, 1, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the generator is its own


def test_a_sequence_starts_with_bos_or_with_an_ordinary_token():
    model = tiny_model("llama")
    assert (generate_text(model, tiny_tokenizer(bos=True), 4, 2, seed=0)[:, 0] == BOS).all()
    starts = generate_text(model, tiny_tokenizer(), 400, 2, seed=0, batch_size=400)[:, 0]
    assert not set(starts.tolist()) & {PAD, BOS, EOS}
    assert len(starts.unique()) > 150


def test_a_row_that_the_tokenizer_lacks_is_never_written():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[PAD:] = 0
    bias = torch.zeros(256)
    bias[PAD:] = 100.0  # certain to be picked, were it allowed
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + bias)

    class Shorter:
        bos_token_id, all_special_ids = None, ()

        def __len__(self):
            return PAD

    assert generate_text(model, Shorter(), 4, 16, seed=0).max() < PAD
    assert (
        generate_text(model, tiny_tokenizer(), 4, 16, seed=0)[:, 1:] >= PAD
    ).all()  # and goes on after EOS


def test_pick_follows_the_distribution():
    logits = torch.tensor([[0.5, -1.0, 2.0, float("-inf")]], dtype=torch.float64)
    count = 20_000
    chance = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picked = _pick(logits.expand(count, -1), chance).bincount(minlength=4) / count
    torch.testing.assert_close(picked.double(), logits.softmax(-1)[0], atol=0.015, rtol=0)
    assert picked[3] == 0
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    head = torch.tensor([[float("-inf"), 1.0, 1.0]], dtype=torch.float64)
    assert _pick(head.expand(2, -1), edges).tolist() == [1, 2]


def test_a_low_temperature_is_greedy():
    model = tiny_model("llama")
    ids = generate_text(model, tiny_tokenizer(), 2, 12, seed=0, temperature=1e-4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :-1, :].argmax(-1), ids[:, 1:])


def test_bad_requests():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(RequestError, match=r"texts of 257 tokens .* context of 256"):
        generate_text(model, tokenizer, 1, 257, seed=0)
    for options in ({"samples": 0}, {"seq_len": 1}, {"batch_size": 0}, {"temperature": 0.0}):
        with pytest.raises(RequestError, match="above 0"):
            generate_text(model, tokenizer, **{"samples": 1, "seq_len": 8, "seed": 0, **options})


def test_a_broken_model_is_told_and_not_sampled():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(LmpressError, match="not finite"):
        generate_text(model, tiny_tokenizer(), 1, 8, seed=0)


def test_the_tokenizer_has_to_be_the_models():
    model = tiny_model("llama")
    empty = tiny_tokenizer()
    empty.__class__ = type("Empty", (type(empty),), {"__len__": lambda self: 0})
    with pytest.raises(RequestError, match="no tokens but special ones"):
        generate_text(model, empty, 1, 8, seed=0)
    larger = tiny_tokenizer()
    larger.__class__ = type("Larger", (type(larger),), {"__len__": lambda self: 300})
    assert generate_text(model, larger, 64, 2, seed=0).max() < 256
    larger.add_special_tokens({"bos_token": "<begin>"})
    larger.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<begin> $A", None, [("<begin>", 256)]
    )
    with pytest.raises(RequestError, match=r"the token 256 .* has 256 rows"):
        generate_text(model, larger, 1, 8, seed=0)
