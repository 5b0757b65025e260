"""What training takes on the device beside the budget, by the allocator's own count, against the formula."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch

from tests.training.models import Wide
from tierstore import TierStore
from tierstore.training import TieredOptimizer, attach
from tierstore.training.memory import Shapes, bytes_outside

pytestmark = pytest.mark.cuda

LAYERS = 8
WIDTH = 1024
BUDGET = 192 << 20
ROUNDED = 4 << 20
"""The allocator rounds what it is asked for, and torch keeps small things of its own."""


def peak_of(run: object) -> int:
    """Bytes beyond those before, at most, while it ran."""
    assert callable(run)
    gc.collect()  # what others left behind is not to be freed while it runs
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def alone(rows: int, dtype: torch.dtype) -> int:
    layer, x = Wide.Layer(WIDTH).to("cuda", dtype), torch.randn(rows, WIDTH, device="cuda", dtype=dtype, requires_grad=True)

    def run() -> None:
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    run()  # once without being looked at: cuBLAS takes a workspace, for good
    return peak_of(run)


CASES = list(itertools.product([(64, None), (4096, 256)], ["step", "deferred", "backward"], ["device", "ram"], [False, True]))


@pytest.mark.parametrize(("batch", "when", "activations", "masters"), CASES, ids=str)
def test_what_is_taken_beside_the_budget(batch: tuple[int, int | None], when: str, activations: str, masters: bool, tmp_path: Path) -> None:
    rows, micro_batch = batch
    dtype = torch.bfloat16 if masters else torch.float32
    parameter = 4 * WIDTH * WIDTH
    by_itself = alone(micro_batch or rows, dtype)
    model = Wide(LAYERS, WIDTH).to(dtype)
    before = torch.cuda.memory_allocated()  # cuBLAS keeps its workspaces
    with TierStore(BUDGET, 3 << 30, tmp_path / "swap") as store:
        tiered = attach(model, store, model.layers, micro_batch=micro_batch, activations=activations)  # type: ignore[arg-type]
        optimizer = TieredOptimizer(
            tiered,
            torch.optim.AdamW,
            lr=1e-3,
            when=when,  # type: ignore[arg-type]
            master_dtype=torch.float32 if masters else None,
        )
        held = torch.cuda.memory_allocated() - before

        def run() -> None:
            x = torch.randn(rows, WIDTH, device="cuda", dtype=dtype)
            model(x).backward()
            if when != "backward":
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

        peak = max(peak_of(run) for _ in range(3))
        state = max(store.info(name).nbytes for name in store if name.startswith("optimizer/"))
        shapes = Shapes(
            alone=by_itself,
            gradients=2 * parameter * dtype.itemsize,
            gradient=parameter * dtype.itemsize,
            inputs=rows * WIDTH * dtype.itemsize,
            layers=LAYERS,
            when=when,  # type: ignore[arg-type]
            activations=activations,  # type: ignore[arg-type]
            chunk=state // (3 if masters else 2),  # two moments and the master, each as large as the gradient that goes with them
            widened=parameter * 4 if masters and when != "backward" else 0,
            made=state,  # the first of the steps makes it
            temporaries=2.0,  # `foreach` makes its own for all of a chunk at once
        )
        assert store.stats().tiers["gpu"].evictions > 0
        assert held <= BUDGET + ROUNDED, "the arena is the budget"
    assert peak <= bytes_outside(shapes) + ROUNDED
    assert peak > 0.4 * bytes_outside(shapes), "the formula promises nothing"
