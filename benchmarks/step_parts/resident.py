"""The same step with everything resident, in plain torch: what computing alone takes."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.step_parts.floor import Compute
from benchmarks.step_parts.model import VOCABULARY, Draws, Gpt, Shape, batches

BYTES_EACH = 2 + 2 + 12 + 4
"""Of a parameter: weight, gradient, master and moments, and the gradient widened."""


class Checkpointed(nn.Module):
    """A layer that is computed again in the backward pass, on `micro_batch` rows at a time as the streamed one."""

    def __init__(self, layer: nn.Module, micro_batch: int | None) -> None:
        super().__init__()
        self.layer = layer
        self.micro_batch = micro_batch

    def forward(self, x: Tensor) -> Tensor:
        if self.micro_batch is None or self.micro_batch >= x.shape[0]:
            return _again(self.layer, x)
        return torch.cat([_again(self.layer, rows) for rows in x.split(self.micro_batch)])


def _again(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(layer, x, use_reentrant=False)
    return result


def measure(shape: Shape, rows: int, tokens: int, micro_batch: int | None, device: torch.device, *, trains: bool = True) -> Compute:
    """Seconds of forward, backward and update. What does not fit the device is measured with fewer layers, and extended to all."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 40
    kept = rows * tokens * shape.width * 2
    # beside what is kept of each layer: logits of a chunk of tokens, their gradients, and a layer at work on a micro-batch
    work = 40 * min(rows, micro_batch or rows) * tokens * shape.width * 2 + 16 * 1024 * VOCABULARY + 8 * kept
    each = BYTES_EACH if trains else 2

    def fits(layers: int) -> bool:
        return each * Shape(layers, shape.width, shape.heads).parameters + layers * kept + work < 0.9 * free

    if fits(shape.layers):
        return _measure(shape, rows, tokens, micro_batch, device, trains=trains)
    few, more = max(1, shape.layers // 16), max(2, shape.layers // 8)
    one, other = (
        _measure(Shape(layers, shape.width, shape.heads), rows, tokens, micro_batch, device, trains=trains) for layers in (few, more)
    )

    def extended(few_s: float, more_s: float) -> float:
        return few_s + (more_s - few_s) / (more - few) * (shape.layers - few)

    return Compute(extended(one.forward, other.forward), extended(one.backward, other.backward), extended(one.update, other.update))


def _measure(shape: Shape, rows: int, tokens: int, micro_batch: int | None, device: torch.device, *, trains: bool) -> Compute:
    with torch.device(device):
        model = Gpt(shape).to(torch.bfloat16)
    draws = Draws(shape.layers)
    for name, module in model.named_modules():
        draws(name, module)
    if not trains:
        with torch.no_grad():
            forward = _median(device, [lambda batch=batch: model(*batch) for batch in itertools.islice(batches(rows, tokens, device), 6)])
        return Compute(forward, 0.0, 0.0)
    for number, layer in enumerate(model.layers):
        model.layers[number] = Checkpointed(layer, micro_batch)
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=device.type == "cuda")
    parts: list[list[float]] = [[], [], []]
    for number, batch in enumerate(itertools.islice(batches(rows, tokens, device), 6)):
        marks = [_Mark(device)]
        loss = model(*batch)
        marks.append(_Mark(device))
        loss.backward()
        marks.append(_Mark(device))
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for master in masters:
            master.grad = None
        marks.append(_Mark(device))
        if number >= 2:
            for part, (begin, end) in zip(parts, itertools.pairwise(marks), strict=True):
                part.append(end.since(begin))
    return Compute(*map(statistics.median, parts))


class _Mark:
    """A moment on the device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._seconds = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def since(self, earlier: _Mark) -> float:
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def _median(device: torch.device, calls: list[Callable[[], object]]) -> float:
    seconds = []
    for call in calls:
        begin = _Mark(device)
        call()
        seconds.append(_Mark(device).since(begin))
    return statistics.median(seconds[2:])
