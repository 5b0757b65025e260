"""Every choice a run makes, so that a run can be repeated, and made duller until only what matters is left."""

from __future__ import annotations

import random
from collections.abc import Mapping


class Decisions:
    """Choices, drawn from a seed or replayed from a recording.

    A choice is a small whole number; 0 is always the dull one: go on with the same thread, no delay, no fault. What a script does
    not name is 0, so a failing run is shrunk by deleting entries from its script.

    Args:
        seed: Draws from this when there is no script.
        script: The choices that are not 0, by their position in the run.

    Attributes:
        taken: The choices that were not 0, by position.
    """

    def __init__(self, seed: int, script: Mapping[int, int] | None = None) -> None:
        self._random = random.Random(f"decisions {seed}")
        self._script = script
        self._count = 0
        self.taken: dict[int, int] = {}

    @property
    def count(self) -> int:
        """Choices made so far."""
        return self._count

    def draw(self, number: int) -> int:
        """One of 0 ... number - 1, all alike."""
        if number <= 1:
            return 0
        if self._script is None:
            return self._note(int(self._random.random() * number))
        return self._note(min(self._script.get(self._count, 0), number - 1))

    def chance(self, probability: float) -> bool:
        """True as often as `probability` says."""
        if self._script is not None:
            return bool(self._note(min(1, self._script.get(self._count, 0))))
        return bool(self._note(int(self._random.random() < probability)))

    def _note(self, choice: int) -> int:
        if choice:
            self.taken[self._count] = choice
        self._count += 1
        return choice
