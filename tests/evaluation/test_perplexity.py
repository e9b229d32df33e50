"""One shared pass over windows against plain loops in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lmpress.errors import RequestError
from lmpress.evaluation import measure
from tests.tiny import tiny_model


def windows_of(lengths: list[int], vocabulary: int = 256, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def full_logits(model: nn.Module, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=w[None]).logits[0, :-1].double() for w in windows]


def nudged(model: nn.Module, size: float, seed: int = 1) -> nn.Module:
    """`model` with noise on its matrices, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * parameter.std() * noise)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "opt-post-norm"])
def test_matches_a_loop_in_float64(name: str) -> None:
    dense, other = tiny_model(name), nudged(tiny_model(name), 0.1)
    windows = windows_of([40, 40, 40, 17])  # two batches of 40s, and a remainder
    scores = measure({"other": other, "dense": dense}, windows, "dense", batch_tokens=80, chunk=7)

    p, q = full_logits(dense, windows), full_logits(other, windows)
    loss = kl = agreed = 0.0
    for window, a, b in zip(windows, p, q, strict=True):
        loss += float(nn.functional.cross_entropy(b, window[1:], reduction="sum"))
        probability = a.softmax(-1)
        kl += float((probability * (probability.log() - b.softmax(-1).log())).sum())
        agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
    tokens = 3 * 39 + 16
    score = scores["other"]
    assert score.tokens == tokens
    assert score.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert kl / tokens > 1e-3
    assert score.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert score.top1_agreement == pytest.approx(agreed / tokens)
    assert score.dtype == "float32"
    assert (scores["dense"].kl, scores["dense"].top1_agreement) == (0.0, 1.0)


def test_a_shared_pass_equals_separate_ones() -> None:
    models = {"dense": tiny_model("qwen3"), "a": nudged(tiny_model("qwen3"), 0.05)}
    models["b"] = nudged(tiny_model("qwen3"), 0.3)
    windows = windows_of([32, 32, 9])
    together = measure(models, windows, "dense")
    for name in ("a", "b"):
        alone = measure({"dense": models["dense"], name: models[name]}, windows, "dense")[name]
        assert alone == together[name]
    unreferenced = measure({"a": models["a"]}, windows)["a"]
    assert unreferenced.loss == together["a"].loss
    assert unreferenced.kl is None
    assert unreferenced.top1_agreement is None
    assert 0 < together["a"].kl < together["b"].kl  # type: ignore[operator]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_and_chunks_change_nothing(batch_tokens: int) -> None:
    model = tiny_model("llama")
    windows = windows_of([32, 32, 32, 32, 5, 1])  # the last has nothing to predict
    plain = measure({"m": model}, windows[:5], batch_tokens=1, chunk=10_000)["m"]
    score = measure({"m": model}, windows, batch_tokens=batch_tokens, chunk=3)["m"]
    assert score.tokens == plain.tokens == 4 * 31 + 4
    assert score.loss == pytest.approx(plain.loss, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_model("llama-untied")
    nn.init.zeros_(model.lm_head.weight)
    assert measure({"m": model}, windows_of([50]))["m"].perplexity == pytest.approx(256, rel=1e-6)


def test_the_modes_of_the_models_come_back() -> None:
    training, resting = tiny_model("llama").train(), tiny_model("llama")
    measure({"a": training, "b": resting}, windows_of([8]))
    assert training.training
    assert training.model.layers[0].training
    assert not resting.training


def test_logits_that_are_not_finite_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama-untied")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    scores = measure({"good": tiny_model("llama-untied"), "broken": model}, windows_of([8]), "good")
    assert math.isnan(scores["broken"].perplexity)
    assert math.isfinite(scores["good"].perplexity)
    assert "broken: its loss is nan" in capsys.readouterr().err


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    other = tiny_model("llama-untied")
    other.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(RequestError, match="vocabulary of 300 tokens, the reference dense one of 256"):
        measure({"dense": model, "other": other}, windows_of([8]), "dense")
    with pytest.raises(RequestError, match="token 299 of the text is outside its vocabulary of 256"):
        measure({"dense": model}, [torch.tensor([1, 299])])
    with pytest.raises(RequestError, match="no token to predict"):
        measure({"dense": model}, windows_of([1, 1]))
    with pytest.raises(RequestError, match="'x' is none of the models: dense"):
        measure({"dense": model}, windows_of([8]), "x")


def test_only_a_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-untied")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *a: seen.append(a[2][..., 0].numel()))
    measure({"m": model}, windows_of([100, 100]), chunk=16)
    assert max(seen) == 16
    assert sum(seen) == 2 * 99 + 2 * 8  # and the probe's eight positions, twice


def test_peft_models_are_taken() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    windows = windows_of([30])
    plain = measure({"m": base}, windows)["m"]
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert measure({"m": wrapped}, windows)["m"] == plain  # a fresh adapter adds zero


def test_the_probe_sees_a_head_that_is_not_known() -> None:
    from lmpress.evaluation.logits import ChunkedLogits

    model = tiny_model("llama")
    forward = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        return SimpleNamespace(logits=0.5 * forward(*args, **kwargs).logits)

    windows = windows_of([20])
    expected = 0.5 * full_logits(model, windows)[0]
    model.forward = scaled
    with torch.no_grad():
        runner = ChunkedLogits(model, windows[0])
        assert not runner.chunked
        torch.testing.assert_close(runner.logits(runner.states(windows[0][None])[0, :-1]).double(), expected)
    score = measure({"m": model}, windows)["m"]
    assert score.loss == pytest.approx(float(nn.functional.cross_entropy(expected, windows[0][1:])), rel=1e-6)
