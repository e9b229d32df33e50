"""The tools of the tests themselves: models that are neither flat nor certain, text that round-trips."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import BOS, TINY, save_tiny, tiny_model, tiny_text


@pytest.mark.parametrize("name", TINY)
def test_a_saved_tiny_model_is_a_real_checkpoint(name, tmp_path):
    directory = save_tiny(name, tmp_path, seed=3, bos=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Naïve — 日本,\n\n  two  spaces .\ttab it 's"
    ids = tokenizer(text)["input_ids"]
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 256

    model = tiny_model(name, seed=3)
    batch = torch.tensor([ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory)(batch).logits
        assert torch.equal(logits, model(batch).logits)
        assert not torch.allclose(logits, tiny_model(name, seed=4)(batch).logits, atol=0.1)
    assert 0.5 < logits.std() < 3
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 2 < entropy < 5.4  # of at most log(256) = 5.55


def test_tiny_text_is_as_long_as_asked_and_the_same_for_a_seed():
    assert len(tiny_text(1234)) == 1234
    assert tiny_text(500, seed=1) == tiny_text(600, seed=1)[:500]
    assert tiny_text(500, seed=1) != tiny_text(500, seed=2)
