"""Training on a GPU keeps its thread free of synchronisation, and computes while it copies."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tierstore import TierStore
from tierstore.mover.streams import CudaCopies
from tierstore.training import TieredOptimizer, attach

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.step_parts.model import batches

pytestmark = pytest.mark.cuda

WIDTH, LAYERS, ROWS = 4096, 12, 8192
LAYER_BYTES = WIDTH * WIDTH * 4
WARM_UP, MEASURED = 24, 8


class Stack(nn.Module):
    """Layers whose products take about as long as the copies of their weights and of their optimizer's state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def train(steps: int, after_warm_up: Callable[[], None] = lambda: None) -> tuple[list[float], list[torch.Tensor]]:
    """Take steps with a device budget below half of the parameters. Returns their seconds and the weights."""
    torch.manual_seed(0)
    model = Stack()
    seconds = []
    with TierStore(gpu=5 * LAYER_BYTES, ram=6 * LAYERS * LAYER_BYTES, device="cuda") as store:
        tiered = attach(model, store, layers=model.layers)
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-4, when="backward", fused=True)
        x = torch.randn(ROWS, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                torch.cuda.synchronize()
                after_warm_up()
            begun = time.perf_counter()
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= WARM_UP:
                if torch.cuda.get_sync_debug_mode():
                    continue
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
        if torch.cuda.get_sync_debug_mode():  # the first call ever warns
            torch.cuda.set_sync_debug_mode("default")
        weights = [store.read(block.name) for block in tiered.structure.blocks]
        stats = store.stats()
        assert stats.tiers["gpu"].evictions > LAYERS * MEASURED
        assert stats.links["h2d"].bytes > MEASURED * 3 * LAYERS * LAYER_BYTES
    return seconds, [tensor for block in weights for tensor in (block.values() if isinstance(block, dict) else [block])]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_loop_synchronises_nowhere() -> None:
    try:
        train(MEASURED, lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_data_of_benchmarks_keep_the_host_from_nothing() -> None:
    """Each step's tokens came from pageable memory, and so the host began each step when the device was done with the last."""
    data = batches(4, 16, torch.device("cuda"))
    next(data)
    try:
        torch.cuda.set_sync_debug_mode("error")
        next(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_overlap_and_equal_those_of_a_store_that_waits_for_every_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    overlapped, weights = train(MEASURED)
    start = CudaCopies.start

    def wait(self: CudaCopies, *arguments: object) -> None:
        torch.cuda.synchronize()  # what the copy has to wait for
        start(self, *arguments)  # type: ignore[arg-type]
        torch.cuda.synchronize()

    monkeypatch.setattr(CudaCopies, "start", wait)
    serial, serial_weights = train(MEASURED)
    assert all(torch.equal(one, other) for one, other in zip(weights, serial_weights, strict=True))
    ratio = statistics.median(overlapped) / statistics.median(serial)
    print(f"overlapped / serial: {ratio:.3f}")
    assert ratio < 0.85
