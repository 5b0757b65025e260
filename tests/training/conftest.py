"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.torch_threads import torch_threads
from tests.training.pair import opened
from tierstore import TierStore


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another on a busy machine, and these tensors are small."""
    with torch_threads(1):
        yield


@pytest.fixture
def store() -> Iterator[TierStore]:
    with opened() as store:
        yield store
