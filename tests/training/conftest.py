"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.training.pair import opened
from tierstore import TierStore


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of torch wait for one another on a busy machine, and these tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store() -> Iterator[TierStore]:
    with opened() as store:
        yield store
