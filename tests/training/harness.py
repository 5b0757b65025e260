"""One training, streamed and resident, compared bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.models import MODELS, batches, build
from tierstore import TierStore
from tierstore.counters import Stats
from tierstore.mover.budget import NUM_SLOTS, slot_bytes
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer, attach

PAGE = 4096


@dataclass(frozen=True)
class Case:
    """The settings of one training.

    Attributes:
        model: A key of `MODELS`.
        optimizer: Name of a class of torch.optim.
        options: Its options.
        clip: None, "global" or "layer".
        share: The device's budget as a share of the parameters' bytes; 0: the least that fits.
        precision: "fp32", "bf16", "master" (bf16 with fp32 masters) or "autocast".
    """

    model: str = "language"
    optimizer: str = "AdamW"
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 1e-2})
    when: str = "deferred"
    accumulation: int = 1
    clip: str | None = None
    micro_batch: int | None = None
    policy: str = "lookahead"
    share: float = 0.5
    precision: str = "fp32"
    activations: str = "device"
    steps: int = 4
    rows: int = 4
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision in ("bf16", "master") else torch.float32

    @property
    def master_dtype(self) -> torch.dtype | None:
        return torch.float32 if self.precision == "master" else None

    def autocast(self) -> AbstractContextManager[Any]:
        # With the cache, one cast of a weight that is used twice is kept, and its gradients are added in bf16.
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False) if self.precision == "autocast" else nullcontext()


MAX_NORM = 0.05
"""Small enough that clipping does something in every step."""


@dataclass
class Outcome:
    """What came out of one training."""

    losses: list[float]
    norms: list[Tensor]
    parameters: dict[str, Tensor]
    state: dict[tuple[str, str], Any]
    stats: Stats | None = None


def train(case: Case, model: nn.Module, optimizer: Any) -> tuple[list[float], list[Tensor]]:
    """The loop: the same for both."""
    losses: list[float] = []
    norms: list[Tensor] = []
    data = batches(case.model, case.steps * case.accumulation, case.rows)
    torch.manual_seed(7)
    for _ in range(case.steps):
        for _ in range(case.accumulation):
            inputs, targets = (tensor.to(case.device) for tensor in next(data))
            if inputs.is_floating_point():
                inputs, targets = inputs.to(case.dtype), targets.float() if targets.is_floating_point() else targets
            with case.autocast():
                loss = model(inputs, targets)
            loss.backward()
            losses.append(loss.item())
        if case.clip is not None:
            norms.append(optimizer.clip_grad_norm_(MAX_NORM, scope=case.clip).clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for child in model.children() if isinstance(child, nn.ModuleList) for layer in child]


def run_resident(case: Case) -> Outcome:
    model = build(case.model).to(case.dtype).to(case.device)
    reference = resident_reference(model, layers_of(model), micro_batch=case.micro_batch)
    optimizer = reference.optimizer(getattr(torch.optim, case.optimizer), master_dtype=case.master_dtype, **case.options)
    losses, norms = train(case, model, optimizer)
    state: dict[tuple[str, str], Any] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state.update({(name, key): value for key, value in optimizer.state_of(parameter).items()})
            master = optimizer.master_of(parameter)
            if master is not None:
                state[name, "master"] = master.detach()
    parameters = {name: tensor.detach().cpu() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return Outcome(losses, norms, parameters, {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()})


def budgets(case: Case, model: nn.Module) -> tuple[int, int]:
    """Bytes for the device and for RAM: so little that state moves through both."""
    sizes = [sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters()) for layer in model.modules()]
    total = sizes[0]
    largest = max(sum(p.numel() * p.element_size() for p in unit.parameters()) for unit in _units(model))
    single = max(parameter.numel() * 4 for parameter in model.parameters())
    least = largest + 3 * single + 8 * PAGE
    gpu = max(least, int(case.share * total)) // PAGE * PAGE
    ram = max(gpu, total // 3)
    return gpu, ram + NUM_SLOTS * slot_bytes(ram)


def _units(model: nn.Module) -> list[nn.Module]:
    return [*layers_of(model), *[child for child in model.children() if not isinstance(child, nn.ModuleList)]]


def run_streamed(case: Case, directory: Path) -> Outcome:
    model = build(case.model).to(case.dtype)
    gpu, ram = budgets(case, model)
    with TierStore(gpu=gpu, ram=ram, nvme=directory, device=case.device, policy=case.policy) as store:
        tiered = attach(model, store, layers_of(model), micro_batch=case.micro_batch, activations=case.activations)  # type: ignore[arg-type]
        optimizer = TieredOptimizer(
            tiered,
            getattr(torch.optim, case.optimizer),
            when=case.when,  # type: ignore[arg-type]
            master_dtype=case.master_dtype,
            **case.options,
        )
        losses, norms = train(case, model, optimizer)
        stats = store.stats()
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        state = {(name, key): value for name in names for key, value in optimizer.state_of(name).items()}
        tiered.detach()
        store.commit()
    parameters = {name: tensor.detach().cpu() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return Outcome(losses, norms, parameters, state, stats)


def same(one: Any, other: Any) -> bool:
    """To the bit; NaN is equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
    return bool(one == other)


def assert_same(streamed: Outcome, resident: Outcome) -> None:
    assert streamed.losses == resident.losses
    assert len(streamed.norms) == len(resident.norms)
    assert all(same(one.cpu(), other.cpu()) for one, other in zip(streamed.norms, resident.norms, strict=True)), "norms differ"
    assert streamed.parameters.keys() == resident.parameters.keys()
    different = [name for name, value in resident.parameters.items() if not same(streamed.parameters[name], value)]
    assert not different, f"parameters differ: {different}"
    assert streamed.state.keys() == resident.state.keys()
    different_state = [key for key, value in resident.state.items() if not same(streamed.state[key], value)]
    assert not different_state, f"state differs: {different_state}"


def assert_streamed(case: Case, outcome: Outcome) -> None:
    """That bytes moved through all tiers: equality with everything resident would prove nothing."""
    stats = outcome.stats
    assert stats is not None
    assert stats.tiers["gpu"].evictions > 0
    assert stats.tiers["ram"].evictions > 0
    for link in ("h2d", "d2h", "nvme_read", "nvme_write"):
        assert stats.links[link].bytes > 0, link
    trained = sum(value.numel() * value.element_size() for name, value in outcome.parameters.items())
    assert stats.tiers["gpu"].peak_bytes <= stats.tiers["gpu"].capacity_bytes
    assert trained > 0


def compare(case: Case, directory: Path) -> tuple[Outcome, Outcome]:
    """Run both and assert that nothing differs."""
    resident = run_resident(case)
    streamed = run_streamed(case, directory)
    assert_same(streamed, resident)
    assert_streamed(case, streamed)
    return streamed, resident


__all__ = ["MODELS", "Case", "Outcome", "assert_same", "assert_streamed", "compare", "copy", "run_resident", "run_streamed"]
