"""What is compared: each makes the same model from the same values, and gives back one step of it.

Each is set up as its own documentation says. Where it leaves a choice, the faster one that fits under the cap is taken, and named here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from benchmarks.step_parts.model import SHAPES, Draws, Gpt, Shape
from benchmarks.step_parts.regimes import Regime, opened
from benchmarks.step_parts.resident import Checkpointed
from tierstore.training import TieredOptimizer

LEARNING_RATE = 1e-4

TakeStep = Callable[[Tensor, Tensor], Tensor]
"""From tokens and targets to the loss; trains in between, if the regime does."""


@dataclass(frozen=True)
class Ready:
    """A model that can take steps.

    Attributes:
        step: One of them.
        page_locked_bytes: What is page-locked beside torch's own allocator of such memory.
    """

    step: TakeStep
    page_locked_bytes: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        title: What it is.
        regime: Of `benchmarks/step.py`: model, batch, and whether it trains.
        lacks: What of the others it does not have or do.
        ready: Sets it up for as long as the context lasts.
        package: Without which it cannot be measured.
        mark: What the picture must not leave out.
    """

    title: str
    regime: str
    lacks: str
    ready: Callable[[Regime, Path, torch.device], AbstractContextManager[Ready]]
    package: str | None = None
    mark: str = ""

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def filled(shape: Shape, device: torch.device) -> Gpt:
    """The model in 16 bits, with the values that `tierstore.training.attach` would draw."""
    with torch.device("meta"):
        model = Gpt(shape).to(torch.bfloat16)
    model.to_empty(device=device)
    model.head.weight = model.embedding.weight  # to_empty() gives memory to each of the two
    draws = Draws(shape.layers)
    for name, module in model.named_modules():
        draws(name, module)
    return model


def training_step(model: nn.Module, optimizer: Any) -> TakeStep:
    """The loop that every tutorial has."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        detached: Tensor = loss.detach()
        return detached

    return step


def forward_step(model: nn.Module) -> TakeStep:
    @torch.no_grad()
    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(inputs, targets)
        return loss

    return step


@contextmanager
def tierstore(regime: Regime, directory: Path, device: torch.device) -> Iterator[Ready]:
    with opened(regime, directory, device) as (store, model, tiered):
        if not regime.trains:
            yield Ready(forward_step(model), lambda: store.stats().page_locked_bytes)
            return
        optimizer = TieredOptimizer(
            tiered, torch.optim.AdamW, lr=LEARNING_RATE, master_dtype=torch.float32, when="backward", fused=device.type == "cuda"
        )
        yield Ready(training_step(model, optimizer), lambda: store.stats().page_locked_bytes)


@contextmanager
def fsdp2(regime: Regime, directory: Path, device: torch.device) -> Iterator[Ready]:
    """One process that has all shards. Its fp32 shards in RAM are what the others call masters.

    Gradients are reduced in 16 bits, as they are computed: among one process nothing is added up, so fp32 would only take room and time.
    """
    on_gpu = device.type == "cuda"
    backend, bound = ("nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, store=dist.FileStore(str(directory / "rendezvous"), 1), rank=0, world_size=1, device_id=bound)
    try:
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (1,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu),
        }
        model = filled(SHAPES[regime.model], torch.device("cpu"))
        for number, layer in enumerate(model.layers):
            model.layers[number] = fully_shard(Checkpointed(layer.float(), regime.micro_batch), **options)
        for module in (model.embedding, model.position, model.norm):
            module.float()
        fully_shard(model, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        yield Ready(training_step(model, optimizer))
    finally:
        dist.destroy_process_group()


@contextmanager
def torchao(regime: Regime, directory: Path, device: torch.device) -> Iterator[Ready]:
    """Gradients leave the device as they come: kept until the step, they would take a third of the cap."""
    from torchao.optim import CPUOffloadOptimizer  # type: ignore[import-not-found]  # noqa: PLC0415 - an optional package

    model = filled(SHAPES[regime.model], device)
    for number, layer in enumerate(model.layers):
        model.layers[number] = Checkpointed(layer, regime.micro_batch)
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=LEARNING_RATE, fused=True)
    yield Ready(training_step(model, optimizer))


@contextmanager
def accelerate_all(regime: Regime, directory: Path, device: torch.device) -> Iterator[Ready]:
    """All weights in RAM; each module's come to the device for its forward pass."""
    from accelerate import cpu_offload  # type: ignore[import-not-found]  # noqa: PLC0415 - an optional package

    yield Ready(forward_step(cpu_offload(filled(SHAPES[regime.model], torch.device("cpu")), device)))


@contextmanager
def accelerate_locked(regime: Regime, directory: Path, device: torch.device) -> Iterator[Ready]:
    """The same with weights that were page-locked by hand before, which accelerate does not do."""
    from accelerate import cpu_offload  # noqa: PLC0415

    model = filled(SHAPES[regime.model], torch.device("cpu"))
    if device.type == "cuda":
        for parameter in model.parameters():  # one after the other: the old bytes go as the new ones come
            parameter.data = parameter.data.pin_memory()
    yield Ready(forward_step(cpu_offload(model, device)))


@contextmanager
def accelerate_some(regime: Regime, directory: Path, device: torch.device) -> Iterator[Ready]:
    """As `device_map="auto"` does: what fits the same budget as the store's stays on the device, the rest comes from RAM."""
    from accelerate import dispatch_model, infer_auto_device_map  # noqa: PLC0415

    model = filled(SHAPES[regime.model], torch.device("cpu"))
    on_device = {device.index: regime.gpu} if device.type == "cuda" else {}
    budgets: dict[Any, int] = {**on_device, "cpu": regime.ram}
    places = infer_auto_device_map(model, max_memory=budgets, no_split_module_classes=["Block"])
    yield Ready(forward_step(dispatch_model(model, places)))


TRAINING = "weights-resident-4k"
CONTENDERS = {
    "tierstore": Contender("tierstore: AdamW on the GPU, state in RAM, updates in backward", TRAINING, "", tierstore),
    "fsdp2": Contender(
        "FSDP2 with CPUOffloadPolicy: AdamW on the CPU, everything in RAM",
        TRAINING,
        "16-bit weights that stay on the device; updates beside the backward pass",
        fsdp2,
    ),
    "torchao": Contender(
        "torchao's CPUOffloadOptimizer: AdamW on the CPU, weights on the device",
        TRAINING,
        "fp32 masters: weights, gradients and moments have 16 bits only; weights larger than the device",
        torchao,
        package="torchao",
        mark="no fp32 masters",
    ),
    "tierstore-inference": Contender("tierstore: weights streamed from RAM", "inference", "", tierstore),
    "accelerate": Contender(
        "accelerate's cpu_offload: weights from RAM, module by module",
        "inference",
        "copies beside the computing; training",
        accelerate_all,
        package="accelerate",
    ),
    "accelerate-locked": Contender(
        "the same, weights page-locked by hand",
        "inference",
        "copies beside the computing; training",
        accelerate_locked,
        package="accelerate",
    ),
    "accelerate-dispatch": Contender(
        'accelerate\'s dispatch_model, as device_map="auto": some weights stay on the device',
        "inference",
        "copies beside the computing; training",
        accelerate_some,
        package="accelerate",
    ),
}
