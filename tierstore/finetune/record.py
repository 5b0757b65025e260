"""What a run has done: a small record in each commit, and a line per step in a file beside the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierstore.finetune.options import FinetuneError, Recipe

LOG = "training.jsonl"
KIND, VERSION = "finetune", 1


@dataclass(slots=True)
class Record:
    """What a commit tells of the run.

    Attributes:
        step: Steps taken.
        steps: Of the whole run.
        data: Digest of all samples.
        model: The folder of the model.
        by_pieces: How the loss is computed: its last bits depend on it.
        first, last: Losses of the first and the last step that was committed; None before there is one.
        written_to: The directory that has the result; None before it has.
    """

    recipe: dict[str, Any]
    steps: int
    data: str
    model: str
    by_pieces: bool
    step: int = 0
    first: float | None = None
    last: float | None = None
    written_to: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": KIND, "version": VERSION, **{name: getattr(self, name) for name in self.__slots__}}

    @classmethod
    def from_json(cls, found: object) -> Record:
        """Of a commit's metadata.

        Raises:
            FinetuneError: Something else made the commit.
        """
        if not isinstance(found, Mapping) or found.get("kind") != KIND:
            raise FinetuneError("the directory of --nvme holds a store that another program made: give an empty one")
        if found.get("version") != VERSION:
            raise FinetuneError("the directory of --nvme holds a run of another version of tierstore: go on with that one")
        return cls(**{name: found[name] for name in cls.__slots__})


def check_same(record: Record, recipe: Recipe, steps: int, *, data: str, model: str) -> None:
    """Refuse to go on with another run than the one that began.

    Raises:
        FinetuneError: An option, the data or the model differ.
    """
    if record.model != model:
        raise FinetuneError(
            f"this run began with the model {record.model}, and was now given {model}: give the same to go on, or another --nvme"
        )
    different = recipe.differences(record.recipe)
    if different:
        name = different[0]
        was, now = record.recipe[name], getattr(recipe, name)
        option = f"--{name.replace('_', '-')}"
        raise FinetuneError(
            f"this run began with {option} {was}, and was now given {now}: give the same options to go on, or another --nvme for another"
        )
    if record.data != data:
        raise FinetuneError("this run began on other data: give the same to go on, or another --nvme for another run")
    if record.steps != steps:
        raise FinetuneError(f"this run began with {record.steps} steps, and has now {steps}: give the same options to go on")


class StepLog:
    """Lines of JSON, one for each step and each evaluation. What a killed process wrote beyond its last commit is taken out again."""

    def __init__(self, directory: Path, step: int) -> None:
        """Open it, as it was when `step` steps had been taken."""
        self.path = directory / LOG
        directory.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in self.entries() if entry["step"] <= step and step]
        text = "".join(f"{json.dumps(entry)}\n" for entry in kept)
        self.path.write_text(text, encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        self._file.write(f"{json.dumps(entry)}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def entries(self) -> list[dict[str, Any]]:
        """All lines; one that a killed process has left half is passed by."""
        if not self.path.is_file():
            return []
        found: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                found.append(entry)
        return found
