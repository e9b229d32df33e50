"""LoRA on a compressed model (arXiv 2106.09685) with PEFT: only the adapters train.

y = form(x) + (alpha / r) B A x,     A: (r, in),  B: (out, r)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lmpress.progress import track
from lmpress.recipes import Recover

CHECKS = 10
"""How often the held-out loss is looked at in a run."""


@dataclass(frozen=True)
class Recovered:
    """What training found.

    Attributes:
        updates: by module name, (left (out, r), right (r, in)), with the scale alpha / r in left.
        report: losses on the held-out windows (nats a token), before and after, and where the best was.
    """

    updates: dict[str, tuple[Tensor, Tensor]]
    report: dict[str, Any] = field(default_factory=dict)


def train_lora(model: Any, modules: Sequence[str], windows: Tensor, step: Recover, seed: int) -> Recovered:
    """Train adapters on the named modules of `model`; the model is as before afterwards.

    Args:
        model: a loaded compressed model.
        modules: full names of the linears that get an adapter.
        windows: token ids (samples, seq_len); a share of `step.held_out` is only watched.
        step: the options.

    Returns:
        The updates of the best state by held-out loss; zero updates if no state beat the beginning.
    """
    from peft import LoraConfig, get_peft_model

    held = max(1, round(step.held_out * windows.shape[0]))
    watched, train = windows[:held], windows[held:]
    if not len(train):
        train = watched
    config = LoraConfig(
        r=step.rank,
        lora_alpha=step.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = get_peft_model(model, config)
        try:
            report = _train(peft, train, watched, step, seed)
            updates = _updates(peft, modules, step)
        finally:
            peft.unload()
    return Recovered(updates, report)


def held_out_loss(model: Any, windows: Tensor, batch: int = 8) -> float:
    """Mean cross-entropy of the predicted tokens, nats."""
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in torch.split(windows, batch):
            ids = rows.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total += float(loss)
            count += ids[:, 1:].numel()
    return total / max(1, count)


def _train(peft: Any, train: Tensor, watched: Tensor, step: Recover, seed: int) -> dict[str, Any]:
    adapters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=step.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    best = start = held_out_loss(peft, watched)
    best_state, best_step = [p.detach().clone() for p in adapters], 0
    every = max(1, step.steps // CHECKS)
    history = [[0, round(start, 6)]]
    peft.train()
    for number in track(range(1, step.steps + 1), f"Recovery: {step.steps} steps of LoRA"):
        while order.numel() < step.batch_size:
            order = torch.cat([order, torch.randperm(train.shape[0], generator=generator)])
        ids, order = train[order[: step.batch_size]].to(peft.device), order[step.batch_size :]
        loss = peft(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number % every == 0 or number == step.steps:
            peft.eval()
            now = held_out_loss(peft, watched)
            peft.train()
            history.append([number, round(now, 6)])
            if math.isfinite(now) and now < best:
                best, best_step = now, number
                best_state = [p.detach().clone() for p in adapters]
    peft.eval()
    with torch.no_grad():
        for parameter, kept in zip(adapters, best_state, strict=True):
            parameter.copy_(kept)
    return {
        "held_out_loss_before": round(start, 6),
        "held_out_loss": round(best, 6),
        "best_step": best_step,
        "history": history,
        "trained_windows": train.shape[0],
        "held_out_windows": watched.shape[0],
    }


def _updates(peft: Any, modules: Sequence[str], step: Recover) -> dict[str, tuple[Tensor, Tensor]]:
    scale = step.alpha / step.rank
    updates = {}
    for name in modules:
        layer = peft.base_model.model.get_submodule(name)
        left = layer.lora_B["default"].weight.detach().float().cpu() * scale  # (out, r)
        right = layer.lora_A["default"].weight.detach().float().cpu()  # (r, in)
        updates[name] = (left, right)
    return updates
