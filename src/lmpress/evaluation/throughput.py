"""Tokens a second, prefill and decode, of models that take turns so that noise hits all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmpress.errors import RequestError
from lmpress.evaluation.logits import evaluating
from lmpress.progress import track

PROMPT_TOKENS = 128
"""Tokens in the cache when decoding starts."""


@dataclass(frozen=True)
class Throughput:
    """How fast a model is, at batch 1; medians over the runs.

    Attributes:
        prefill_tokens_per_s: one forward over `prefill_tokens` tokens that gives the last logits.
        decode_tokens_per_s: greedy steps of one token, with a cache; 1 / the median step.
        prefill_tokens: tokens of the prefill.
        prompt_tokens: tokens in the cache when decoding starts.
        decode_tokens: steps of a run, the first of which is not timed.
        runs: how many runs the medians are over.
        threads: of torch.
        device: where it ran.
        dtype: of the activations.
        baseline: the model that the ratios are relative to; None where there is none.
        prefill_ratio: median over the runs of this model's speed over the baseline's in the same run.
        decode_ratio: the same of decoding.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_tokens: int
    prompt_tokens: int
    decode_tokens: int
    runs: int
    threads: int
    device: str
    dtype: str
    baseline: str | None = None
    prefill_ratio: float | None = None
    decode_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The attributes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """How to time models.

    Attributes:
        prefill_tokens: tokens of one prefill; fewer where the context is shorter.
        decode_tokens: greedy steps of one decoding, two at least.
        runs: timed runs, after one that warms up.
        seed: of the random token ids; speed does not depend on what they say.
    """

    prefill_tokens: int = 512
    decode_tokens: int = 64
    runs: int = 5
    seed: int = 0


def throughput(model: PreTrainedModel, timing: Timing | None = None) -> Throughput:
    """The speed of one model; see `throughput_many`."""
    return throughput_many({"model": model}, None, timing)["model"]


def throughput_many(
    models: Mapping[str, PreTrainedModel], baseline: str | None = None, timing: Timing | None = None
) -> dict[str, Throughput]:
    """The speed of several models: every run times each of them once, in an order that turns.

    Args:
        models: loaded models by name.
        baseline: the name of the model that the ratios are relative to, or None for no ratios.
        timing: how; the defaults of `Timing` if None.

    Raises:
        RequestError: if the numbers make no sense, or a context is too short to decode in.
    """
    timing = timing or Timing()
    if baseline is not None and baseline not in models:
        raise RequestError(f"the baseline {baseline!r} is none of the models: {', '.join(models)}")
    if timing.prefill_tokens < 1 or timing.decode_tokens < 2 or timing.runs < 1:
        raise RequestError("a throughput needs 1 token to prefill, 2 to decode and 1 run, or more of each")
    timers = {name: _Timer(name, model, timing) for name, model in models.items()}
    with evaluating(models):
        for timer in timers.values():
            timer.warm_up()
        names = list(timers)
        for run in track(range(timing.runs), "timing"):
            turn = run % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                timers[name].run()
    against = timers[baseline] if baseline is not None else None
    return {name: timer.result(baseline, against) for name, timer in timers.items()}


class _Timer:
    """The timings of one model; a run appends to `prefill` and `decode`, both in tokens a second."""

    def __init__(self, name: str, model: PreTrainedModel, timing: Timing) -> None:
        prefill_tokens, decode_tokens = timing.prefill_tokens, timing.decode_tokens
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or prefill_tokens + decode_tokens
        prompt_tokens = min(PROMPT_TOKENS, context - decode_tokens)
        if prompt_tokens < 1:
            raise RequestError(
                f"{name}: {decode_tokens} tokens to decode do not fit its context of {context}"
            )
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        generator = torch.Generator().manual_seed(timing.seed)
        ids = torch.randint(config.vocab_size, (1, max(prefill_tokens, prompt_tokens)), generator=generator)
        self.prefill_ids = ids[:, : min(prefill_tokens, context)].to(self.device)
        self.prompt_ids = ids[:, :prompt_tokens].to(self.device)
        self.decode_tokens = decode_tokens
        self.dtype = ""
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def warm_up(self) -> None:
        """Let kernels pack and caches fill, and see the dtype."""
        logits = self._forward(self.prefill_ids).logits
        self.dtype = str(logits.dtype).removeprefix("torch.")
        self._decode_steps(2)

    def run(self) -> None:
        start = self._now()
        self._forward(self.prefill_ids)
        self.prefill.append(self.prefill_ids.numel() / (self._now() - start))
        self.decode.append(1 / median(self._decode_steps(self.decode_tokens)[1:]))

    def _forward(self, ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=ids, logits_to_keep=1, **{"use_cache": False, **options})

    def _decode_steps(self, steps: int) -> list[float]:
        """Seconds of each greedy step after the prompt."""
        seconds: list[float] = []
        out = self._forward(self.prompt_ids, use_cache=True)
        for _ in range(steps):
            token = out.logits[:, -1].argmax(-1, keepdim=True)  # (1, 1)
            start = self._now()
            out = self._forward(token, use_cache=True, past_key_values=out.past_key_values)
            seconds.append(self._now() - start)
        return seconds

    def _now(self) -> float:
        """Seconds on a clock, once the device has done all that was asked of it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def result(self, baseline: str | None, against: _Timer | None) -> Throughput:
        def ratio(own: list[float], other: list[float] | None) -> float | None:
            return None if other is None else median(a / b for a, b in zip(own, other, strict=True))

        return Throughput(
            prefill_tokens_per_s=median(self.prefill),
            decode_tokens_per_s=median(self.decode),
            prefill_tokens=self.prefill_ids.numel(),
            prompt_tokens=self.prompt_ids.numel(),
            decode_tokens=self.decode_tokens,
            runs=len(self.prefill),
            threads=torch.get_num_threads(),
            device=self.device.type,
            dtype=self.dtype,
            baseline=baseline,
            prefill_ratio=ratio(self.prefill, against.prefill if against else None),
            decode_ratio=ratio(self.decode, against.decode if against else None),
        )
