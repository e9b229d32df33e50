"""The whole dense model in memory, for what cannot be streamed, such as writing text."""

from __future__ import annotations

from typing import Any

import torch

from lmpress.families import skeleton
from lmpress.source.model import ModelSource


def load_dense(source: ModelSource, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The dense model, computing in `dtype`.

    Each tensor is converted as it is read: of the type that it is stored in there is one at a time.
    """
    model = skeleton(source.config, dtype)
    blocks = range(source.layout.num_blocks)
    for names in (source.outer_names, *(source.block_names(index) for index in blocks)):
        state = {name: source.read([name])[name].to(device, dtype) for name in names}
        model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.to(device).eval()
