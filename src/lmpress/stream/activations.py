"""The hidden states between two blocks, in memory or, past a budget, in a file."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 24
"""Bytes that are written at once where room is taken by writing zeros."""


class Activations:
    """Hidden states (samples, seq_len, width) in float32, read and overwritten batch by batch.

    Args:
        shape: (samples, seq_len, width).
        budget: bytes that may be kept in memory; larger ones are mapped from a file.
        directory: where that file is made; it is deleted when the object goes.
    """

    def __init__(self, shape: tuple[int, int, int], budget: int | None, directory: Path) -> None:
        size = 4 * shape[0] * shape[1] * shape[2]
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None
        if budget is None or size <= budget:
            self._data = torch.empty(shape)
        else:
            self._file = tempfile.NamedTemporaryFile(dir=directory, prefix="activations-")  # noqa: SIM115
            _reserve(self._file, size)
            self._data = torch.from_file(self._file.name, shared=True, size=size // 4).view(shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(samples, seq_len, width)."""
        samples, tokens, width = self._data.shape
        return samples, tokens, width

    def close(self) -> None:
        """Delete the file, if there is one; nothing can be read later."""
        if self._file is not None:
            self._file.close()

    @property
    def on_disk(self) -> bool:
        """Whether the states are mapped from a file."""
        return self._file is not None

    def __getitem__(self, rows: slice) -> Tensor:
        return self._data[rows]

    def __setitem__(self, rows: slice, states: Tensor) -> None:
        self._data[rows] = states.to(self._data)


class Spooled:
    """Hidden states (samples, seq_len, width) that are written once and read in parts; none stay in memory.

    Args:
        states: to be copied, `batch` samples at a time.
        directory: where the file is made; `close` deletes it.
    """

    def __init__(self, states: Activations, batch: int, directory: Path) -> None:
        self.shape = states.shape
        self._file = tempfile.NamedTemporaryFile(dir=directory, prefix="spooled-")  # noqa: SIM115
        for start in range(0, self.shape[0], batch):
            self._file.write(states[slice(start, start + batch)].contiguous().numpy().data)
        self._file.flush()

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        size = self.shape[1] * self.shape[2]
        data = np.fromfile(self._file.name, np.float32, (stop - start) * size, offset=4 * start * size)
        return torch.from_numpy(data).view(stop - start, *self.shape[1:])

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room on the disk now: a mapped file that finds none later kills the process without a word.

    Raises:
        OSError: there is no room.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
        return
    except AttributeError:  # not on this system
        pass
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not on this file system
            raise
    zeros = bytes(min(size, CHUNK))
    for start in range(0, size, CHUNK):
        file.write(zeros[: size - start])
    file.flush()
