"""Training keeps the best state that was watched, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmpress.recipes import Recover
from lmpress.recovery.lora import held_out_loss, train_lora
from tests.tiny import tiny_model, tiny_text, tiny_tokenizer

MODULES = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]


def windows(different: int) -> Tensor:
    """16 windows, half of them to watch; so many of the others are different: one is learnt by heart."""
    ids = tiny_tokenizer()(tiny_text(1000, seed=5), return_tensors="pt").input_ids[0]
    text = ids[: 16 * 32].view(16, 32)
    return torch.cat([text[:8], text[8 : 8 + different].repeat(8 // different, 1)])


@pytest.mark.parametrize(("different", "worsens"), [(8, False), (1, True)])
def test_the_updates_are_those_of_the_best_state(different: int, worsens: bool) -> None:
    model, text = tiny_model("llama"), windows(different)
    before = [parameter.clone() for parameter in model.parameters()]
    step = Recover(steps=20, learning_rate=0.02, seq_len=32, batch_size=4, rank=4, held_out=0.5)
    recovered = train_lora(model, MODULES, text, step, seed=0)
    assert all(map(torch.equal, before, model.parameters()))
    report, watched = recovered.report, text[:8]
    history = dict(report["history"])
    assert report["held_out_windows"] == 8
    assert (
        history[0] == report["held_out_loss_before"] == pytest.approx(held_out_loss(model, watched), abs=1e-5)
    )
    assert min(history.values()) == report["held_out_loss"] == history[report["best_step"]]
    assert (0 < report["best_step"] < 20 and history[20] > report["held_out_loss"] + 0.1) is worsens
    with torch.no_grad():
        for name, (left, right) in recovered.updates.items():
            model.get_submodule(name).weight.add_(left @ right)
    assert held_out_loss(model, watched) == pytest.approx(report["held_out_loss"], abs=1e-4)
