"""Every commit is looked at, on the drive, at the moment at which it becomes the one that counts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from tests.simulation.files import Disk, name_of
from tests.simulation.model import Model, stamp_of
from tests.simulation.world import BrokenPromiseError
from tierstore.nvme import names
from tierstore.nvme.manifest import decode_manifest


@dataclass
class Committed:
    """A commit somebody asked for.

    Attributes:
        number: What its metadata says.
        start: The tick at which it was asked for.
        generation: None: it has not succeeded, as far as who asked knows.
    """

    number: int
    start: int
    generation: int | None = None


State = dict[tuple[str, str], int]
"""The stamp of every tensor, by block and tensor."""


class Commits:
    """All commits of a run.

    Attributes:
        states: What each generation held when its manifest got its name.
    """

    def __init__(self, model: Model, disk: Disk) -> None:
        self.asked: list[Committed] = []
        self.states: dict[int, State] = {}
        self._model = model
        disk.on_replace = self._replaced

    def ask(self) -> Committed:
        committed = Committed(len(self.asked), self._model.tick())
        self.asked.append(committed)
        return committed

    @property
    def newest(self) -> int:
        """The last generation that somebody was told of; 0 for none."""
        return max((commit.generation for commit in self.asked if commit.generation is not None), default=0)

    def _replaced(self, disk: Disk, path: str) -> None:
        generation = names.manifest_generation(name_of(path))
        if generation is None:
            return
        manifest = decode_manifest(bytes(disk.get(path)))
        state: State = {}
        for record in manifest.records:
            content = disk.get(os.path.join(os.path.dirname(path), record.shard.file))
            for index, spec in enumerate(record.block.tensors):
                start = record.shard.data_start + spec.offset
                tensor = torch.frombuffer(bytearray(content[start : start + spec.nbytes]), dtype=torch.int64)
                state[record.block.name, f"t{index}"] = stamp_of(tensor, f"{spec.name} of generation {generation}")
        asked = self.asked[manifest.metadata["commit"]]
        self._model.check_snapshot(state, asked.start, self._model.tick(), f"generation {generation}")
        self.states[generation] = state

    def check_found(self, generation: int, state: State) -> None:
        """The store was opened again, and this is what it holds."""
        if generation < self.newest:
            raise BrokenPromiseError(f"generation {generation} was found, and {self.newest} was acknowledged")
        if state != self.states[generation]:
            raise BrokenPromiseError(f"generation {generation} holds {state}, and was committed as {self.states[generation]}")
