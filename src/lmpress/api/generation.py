"""Text that a model goes on with: the likeliest token each time, and nothing else."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from lmpress.api.loading import load_any
from lmpress.checkpoint import read_json
from lmpress.errors import LmpressError, RequestError
from lmpress.progress import note

Loaded = tuple[Any, Any, Path | None]
"""What `load_any` gives: model, tokenizer, where the files are."""


def generate(
    model: str | Path, prompt: str, *, max_new_tokens: int = 64, dtype: str = "auto", device: str = "auto"
) -> str:
    """Continue a prompt with the likeliest token each time: the new text alone.

    Raises:
        RequestError: no text, or one that leaves no room in the model's context.
        LmpressError: the model's logits are not finite.
    """
    _check_request(prompt, max_new_tokens)
    return continuation(load_any(model, dtype, device), prompt, max_new_tokens)


def continuation(loaded: Loaded, prompt: str, max_new_tokens: int) -> str:
    """What a loaded model goes on with, until an end token, or until its context is full.

    Of generation_config.json the end tokens count, and nothing else: penalties, beams and the like would act
    on some models of a comparison and not on others.

    Raises:
        As `generate`.
    """
    _check_request(prompt, max_new_tokens)
    model, tokenizer, directory = loaded
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)  # (1, tokens)
    room = _room(model, ids)
    ends = end_tokens(model, tokenizer, directory)
    new = _likeliest(
        model, ids.to(model.device), max_new_tokens if room is None else min(max_new_tokens, room), ends
    )
    if len(new) == room and room < max_new_tokens and new[-1] not in ends:
        note(f"the model's context is full after {room} new tokens")
    return str(tokenizer.decode(new, skip_special_tokens=True))


def end_tokens(model: Any, tokenizer: Any, directory: Path | None) -> Set[int]:
    """The ids at which a text ends: as generation_config.json, else the config, else the tokenizer says."""
    file = None if directory is None else directory / "generation_config.json"
    told = read_json(file) if file is not None and file.is_file() else {}
    stated = told.get("eos_token_id") if isinstance(told, dict) else None
    if stated is not None and not _are_tokens(stated):
        raise RequestError(f"{file}: eos_token_id is {short(stated)}, which is no token; mend or remove it")
    for ends in (stated, model.config.get_text_config().eos_token_id, tokenizer.eos_token_id):
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _are_tokens(value: Any) -> bool:
    """Whether a value of a JSON file is a token or a list of them; a bool is none."""
    return all(type(token) is int for token in (value if isinstance(value, list) else [value]))


def _likeliest(model: Any, ids: Tensor, steps: int, ends: Set[int]) -> list[int]:
    """The likeliest tokens after `ids` (1, tokens), the end token included."""
    new: list[int] = []
    cache = None
    while len(new) < steps and not (new and new[-1] in ends):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        value, token = output.logits[0, -1].max(dim=-1)  # NaN, if one is there
        if not bool(torch.isfinite(value)):
            raise LmpressError(
                f"the model's logits are not finite after {len(new)} new tokens, so that no token is the "
                "likeliest: try --dtype float32; if that is no help, a weight is broken"
            )
        cache, ids = output.past_key_values, token.view(1, 1)
        new.append(int(token))
    return new


def _room(model: Any, ids: Tensor) -> int | None:
    """How many tokens fit behind `ids` (1, tokens); None for no limit. RequestError where none do."""
    count = ids.shape[1]
    if not count:
        raise RequestError("the prompt is empty: give a few words to go on from")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= vocabulary:
        raise RequestError(
            f"token {int(ids.max())} of the prompt is outside the model's vocabulary of {vocabulary}: "
            "the tokenizer is that of another model"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and count >= context:
        raise RequestError(f"the prompt has {count} tokens, and the model's context is {context}: shorten it")
    return None if context is None else context - count


def _check_request(prompt: str, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is at least 1, not {max_new_tokens}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is no text in UTF-8, from character {error.start + 1} on") from None
