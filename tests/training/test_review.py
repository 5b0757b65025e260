"""What a review found and did not mend."""

from __future__ import annotations

import torch

from tests.training.pair import Pair
from tierstore import TierStore


def test_values_written_into_the_store_are_not_lost_to_masters(store: TierStore) -> None:
    """Errors advise store.write() for new values of an attached model; with masters the next step narrows the old ones over them."""
    pair = Pair(store, master=True)
    pair.advance(2)
    value = torch.full((32,), 0.25, dtype=pair.dtype)
    pair.store.write("into", {"into.bias": value})
    pair.model(*pair.batch()).backward()
    pair.optimizer.step()
    pair.optimizer.zero_grad()
    assert (pair.weights()["into.bias"].float() - 0.25).abs().max() < 0.05
