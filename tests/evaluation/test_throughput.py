"""Who is timed, when, and what the numbers are made of; with a clock that the test winds."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lmpress.errors import RequestError
from lmpress.evaluation import Timing, throughput, throughput_many
from tests.tiny import tiny_model


class Clock:
    """Forwards take `seconds(tokens)`; nothing else takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def attach(self, name: str, model: nn.Module, prefill: float, step: float) -> nn.Module:
        def before(module: nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
            tokens = kwargs["input_ids"].shape[1]
            self.calls.append((name, tokens))
            self.now += step if tokens == 1 else prefill

        model.register_forward_pre_hook(before, with_kwargs=True)
        return model


def test_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    models = {
        "dense": clock.attach("dense", tiny_model("llama"), prefill=0.5, step=0.02),
        "fast": clock.attach("fast", tiny_model("llama"), prefill=0.4, step=0.01),
    }
    result = throughput_many(models, "dense", Timing(prefill_tokens=100, decode_tokens=5, runs=3))
    dense, fast = result["dense"], result["fast"]
    assert dense.prefill_tokens_per_s == pytest.approx(200)
    assert dense.decode_tokens_per_s == pytest.approx(50)
    assert (dense.prefill_ratio, dense.decode_ratio) == (1, 1)
    assert fast.prefill_ratio == pytest.approx(1.25)
    assert fast.decode_ratio == pytest.approx(2)
    assert (fast.prompt_tokens, fast.decode_tokens, fast.runs, fast.baseline) == (128, 5, 3, "dense")
    assert (fast.dtype, fast.device, fast.threads) == ("float32", "cpu", torch.get_num_threads())
    json.dumps(fast.to_json())

    run = [100, 128, 1, 1, 1, 1, 1]
    warm_up = [100, 128, 1, 1]
    order = ["dense", "fast", "dense", "fast", "fast", "dense", "dense", "fast"]
    lengths = [warm_up] * 2 + [run] * 6
    assert clock.calls == [(name, n) for name, ns in zip(order, lengths, strict=True) for n in ns]


def test_medians_pass_over_one_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = clock.attach("m", tiny_model("llama"), prefill=1.0, step=0.1)

    def stumble(*_: object) -> None:
        if len(clock.calls) in (5, 6, 7):  # the first run's prefill, prompt and first step
            clock.now += 50

    model.register_forward_pre_hook(stumble)
    speed = throughput(model, Timing(prefill_tokens=64, decode_tokens=4, runs=3))
    assert speed.prefill_tokens_per_s == pytest.approx(64)
    assert speed.decode_tokens_per_s == pytest.approx(10)
    assert speed.prefill_ratio is None


def test_decoding_is_greedy_and_cached() -> None:
    from lmpress.evaluation.throughput import _Timer

    model = tiny_model("qwen3")
    timer = _Timer("m", model, Timing(decode_tokens=6))
    steps: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: steps.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    with torch.no_grad():
        assert len(timer._decode_steps(6)) == 6
    expected = model.generate(timer.prompt_ids, do_sample=False, max_new_tokens=6, eos_token_id=None)[0]
    assert steps[: 128 + 6] == expected.tolist()


def test_a_short_context_shortens() -> None:
    speed = throughput(tiny_model("opt"), Timing(prefill_tokens=4096, decode_tokens=200, runs=1))
    assert (speed.prefill_tokens, speed.prompt_tokens) == (256, 56)
    assert speed.prefill_tokens_per_s > 0
    with pytest.raises(RequestError, match="256 tokens to decode do not fit its context of 256"):
        throughput(tiny_model("opt"), Timing(decode_tokens=256))


def test_requests_that_make_no_sense() -> None:
    model = tiny_model("llama")
    with pytest.raises(RequestError, match="2 to decode"):
        throughput(model, Timing(decode_tokens=1))
    with pytest.raises(RequestError, match="'x' is none of the models: m"):
        throughput_many({"m": model}, "x")
    assert throughput_many({}) == {}
