"""Hidden states in a file: its room is taken at once, and what cannot be written is told as what it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lmpress.stream import Activations, Spooled

SHAPE = (3, 4, 5)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        Activations(SHAPE, 0, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    Activations(SHAPE, None, tmp_path)  # in memory


@pytest.mark.parametrize("missing", [True, False])
def test_room_is_taken_where_the_system_cannot_reserve_it(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    if missing:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    states = Activations(SHAPE, 0, tmp_path)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [4 * 60]
    values = torch.arange(60.0).view(SHAPE)
    states[slice(0, 3)] = values
    spooled = Spooled(states, 2, tmp_path)
    assert torch.equal(states[slice(1, 3)], values[1:])
    assert torch.equal(spooled[slice(1, 3)], values[1:])
