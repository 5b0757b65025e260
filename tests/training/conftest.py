"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.torch_threads import torch_threads
from tests.training.pair import opened
from tierstore import TierStore
from tierstore.training import TieredOptimizer


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another on a busy machine, and these tensors are small."""
    with torch_threads(1):
        yield


@pytest.fixture
def store() -> Iterator[TierStore]:
    with opened() as store:
        yield store


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of each update: which block, and how many of its chunks."""
    made: list[tuple[str, int]] = []
    update = TieredOptimizer._update

    def counted(self: Any, block: Any, job: Any, count: int | None) -> None:
        before = len(job.begun)
        update(self, block, job, count)
        made.append((block.name, len(job.begun) - before))

    monkeypatch.setattr(TieredOptimizer, "_update", counted)
    return made
