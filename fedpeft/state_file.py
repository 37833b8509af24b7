"""Adapter states on the disk while a round gathers them: a sum over many then takes no more memory than over one.

The file has no name, so that nothing of it outlives the process: what a killed one had gathered is asked for anew, and
counts once. It is read by mapping it, and the system takes back the memory of what was read when it needs it.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = StateFile(folder)
    ...     form = file.put(AdapterState({"layer/A": torch.ones(2, 3)}))
    ...     form["layer/A"].is_meta, file.get(form)["layer/A"].sum().item()
    (True, 6.0)
"""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpeft.state import AdapterState

ALIGNED = 64  # bytes: what any dtype's values may begin at


class StateFile:
    """States that are all written before the first is read.

    Args:
        folder: on the disk that has the room; without one, states stay in memory as they are.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.file = tempfile.TemporaryFile(dir=folder) if folder else None  # noqa: SIM115 - as long as this object
        self.starts: dict[int, int] = {}  # of values in the file, by the ids of their forms
        self.forms: list[AdapterState] = []  # so that no other object gets their ids

    def put(self, state: AdapterState) -> AdapterState:
        """Write a state; its form, whose tensors have no values (torch's meta device), and with which it is read.

        Raises:
            OSError: there is no room.
        """
        if self.file is None:
            return state
        form = state.map(lambda value: value.to("meta"))
        form = replace(form, extra={key: value.to("meta") for key, value in state.extra.items()})
        self.starts[id(form)] = self.file.tell()
        self.forms.append(form)
        for value in state.payload:
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self.file.write(data.data)
            self.file.write(bytes(-len(data) % ALIGNED))
        return form

    def get(self, form: AdapterState) -> AdapterState:
        """A state that was put, bit for bit; its tensors are views of the file, and what is written to them is not."""
        if self.file is None:
            return form
        start = self.starts[id(form)]

        def read(value: Tensor) -> Tensor:
            nonlocal start
            begin, start = start, start + -(-value.nbytes // ALIGNED) * ALIGNED
            return self.mapped[begin : begin + value.nbytes].view(value.dtype).reshape(value.shape)

        return replace(form.map(read), extra={key: read(value) for key, value in form.extra.items()})

    @cached_property
    def mapped(self) -> Tensor:
        """All bytes of the file."""
        assert self.file is not None
        self.file.flush()
        if not self.file.tell():
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_numpy(np.frombuffer(mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8))
