"""How fast a demo learns."""

from __future__ import annotations

import time


class Speed:
    """Tokens learnt per second, over the last few steps; evaluations and commits between steps do not count."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._seconds_per_step = 0.0
        self._entered_s = 0.0

    def __enter__(self) -> None:
        self._entered_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        last = time.monotonic() - self._entered_s
        self._seconds_per_step = 0.8 * self._seconds_per_step + 0.2 * last if self._seconds_per_step else last

    @property
    def tokens_per_s(self) -> float:
        return self._tokens_per_step / self._seconds_per_step if self._seconds_per_step else 0.0

    def left_s(self, steps: int) -> float:
        return steps * self._seconds_per_step
