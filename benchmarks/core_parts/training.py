"""What training through a store costs where everything would have fitted: every step beside the same step in plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.core_parts.measure import MIB, PAGE, Plan, Row
from tierstore import TierStore
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer, attach


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    """Layers of about `width` squared parameters each."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


@dataclass
class Loop:
    """One of the loops that are compared.

    Attributes:
        seconds: Of each step.
    """

    name: str
    model: nn.Module
    optimizer: Any
    seconds: list[float]

    def step(self, batch: Tensor, plan: Plan, *, clip: bool) -> float:
        start = time.perf_counter()
        loss = self.model(batch)
        loss.backward()
        if clip:
            self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        plan.settle()
        self.seconds.append(time.perf_counter() - start)
        return float(loss.detach())


def _loops(plan: Plan, store: TierStore, layers: int, width: int, rows: int, when: str) -> list[Loop]:
    def resident(micro_batch: int | None) -> tuple[nn.Module, Any]:
        model = Model(layers, width).to(plan.device)
        reference = resident_reference(model, model.layers if micro_batch else None, micro_batch=micro_batch)
        return model, reference.optimizer(torch.optim.AdamW, lr=1e-4)

    streamed = Model(layers, width)
    tiered = attach(streamed, store, streamed.layers, micro_batch=rows)
    optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-4, when=when)  # type: ignore[arg-type]
    return [
        Loop("tierstore", streamed, optimizer, []),
        Loop("reference, recomputing", *resident(rows), []),
        Loop("plain loop", *resident(None), []),
    ]


def _measured(when: str, *, clip: bool) -> Callable[[Plan], list[Row]]:
    def part(plan: Plan) -> list[Row]:
        layers, width = plan.scaled(100, 6), plan.scaled(1024, 64)
        rows, steps = plan.scaled(64, 8), plan.scaled(9, 3)
        parameters = sum(parameter.numel() for parameter in Model(layers, width).parameters())
        state = 4 * 4 * parameters
        generator = torch.Generator().manual_seed(1)
        with TierStore(state + state // 8 + layers * 16 * PAGE, 256 * MIB + state + state // 8, device=plan.device) as store:
            loops = _loops(plan, store, layers, width, rows, when)
            for number in range(steps + 3):
                batch = torch.randn(rows, width, generator=generator).to(plan.device)
                order = loops[number % len(loops) :] + loops[: number % len(loops)]  # whoever comes first finds other caches
                losses = {loop.name: loop.step(batch, plan, clip=clip) for loop in order}
                assert losses["tierstore"] == losses["reference, recomputing"], losses
            assert store.stats().tiers["gpu"].evictions == 0, "everything is to be resident"
        for loop in loops:
            del loop.seconds[:3]  # state is made, the period learnt
        mine, reference, plain = loops
        detail = {"layers": layers, "parameters": parameters, "rows": rows, "when": when, "clip": clip}
        return [
            Row("step over the reference's, which recomputes too", "x", _ratios(mine, reference), "<= 1.10", detail),
            Row("step over the plain loop's, which does not recompute", "x", _ratios(mine, plain), "", detail),
            *(Row(f"step: {loop.name}", "s", loop.seconds, "", detail) for loop in loops),
        ]

    return part


def _ratios(one: Loop, other: Loop) -> list[float]:
    """Step by step: both ran within the same second or two."""
    return [mine / theirs for mine, theirs in zip(one.seconds, other.seconds, strict=True)]


at_step = _measured("step", clip=True)
deferred = _measured("deferred", clip=True)
in_backward = _measured("backward", clip=False)
