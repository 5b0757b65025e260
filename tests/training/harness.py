"""One training, streamed and resident, compared bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.models import MODELS, batches, build
from tierstore import TierStore
from tierstore.catalog import PAGE
from tierstore.counters import Stats
from tierstore.errors import CapacityError
from tierstore.mover.budget import NUM_SLOTS, slot_bytes
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer, activations, attach

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """The settings of one training.

    Attributes:
        model: A key of `MODELS`.
        optimizer: Name of a class of torch.optim. "Muon" has the matrices, and AdamW the rest.
        options: Its options.
        groups: "one"; "two", by name patterns, with other options for the second; or "optimizers": two of the class, which share the model.
        schedule: None, "lambda", or "cycle", which changes betas or the momentum as well.
        clip: None, "global" or "layer".
        share: The device's budget as a share of the parameters' bytes; 0: the least that fits.
        ram: That of RAM, as a share of what the parameters, their state and their gradients take.
        precision: "fp32", "bf16", "master" (bf16 with fp32 masters) or "autocast".
    """

    model: str = "language"
    optimizer: str = "AdamW"
    options: Options = field(default_factory=lambda: {"lr": 1e-2})
    groups: str = "one"
    schedule: str | None = None
    when: str = "deferred"
    deferred_layers: int = 0
    accumulation: int = 1
    clip: str | None = None
    micro_batch: int | None = None
    policy: str = "lookahead"
    share: float = 0.5
    ram: float = 0.2
    precision: str = "fp32"
    activations: str = "device"
    steps: int = 3
    rows: int = 4
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision in ("bf16", "master") else torch.float32

    def build(self) -> nn.Module:
        zoo = MODELS[self.model]
        return build(self.model, zoo.layers_of_16_bits if self.dtype.itemsize < 4 else zoo.layers).to(self.dtype)

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


# -- what both runs are made of ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One optimizer of a case.

    Attributes:
        params: None for all, or group dicts with names as "params".
    """

    factory: type[torch.optim.Optimizer]
    options: Options
    params: list[dict[str, Any]] | None = None


def recipes(case: Case, model: nn.Module) -> list[Recipe]:
    """The optimizers of a case."""
    factory = getattr(torch.optim, case.optimizer)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    options = copy.deepcopy(dict(case.options))
    if case.optimizer == "Muon":
        matrices = [name for name, parameter in names.items() if parameter.dim() == 2]
        rest = [name for name in names if name not in matrices]
        return [Recipe(factory, options, [{"params": matrices}]), Recipe(torch.optim.AdamW, {"lr": 1e-2}, [{"params": rest}])]
    if case.groups == "one":
        return [Recipe(factory, options)]
    chosen = [name for name in names if "bias" in name or "norm" in name]
    rest = [name for name in names if name not in chosen]
    other = {"lr": options.get("lr", 1e-3) * 0.3}
    if case.groups == "two":
        return [Recipe(factory, options, [{"params": rest}, {"params": chosen, **other}])]
    return [Recipe(factory, options, [{"params": rest}]), Recipe(factory, {**copy.deepcopy(options), **other}, [{"params": chosen}])]


def schedulers(case: Case, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.lr_scheduler.LRScheduler]:
    if case.schedule is None:
        return []
    made: list[torch.optim.lr_scheduler.LRScheduler] = []
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        if case.schedule == "cycle" and ("betas" in group or group.get("momentum")):
            high = [float(group["lr"]) * 2 for group in optimizer.param_groups]
            made.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, high, total_steps=case.steps + 1))
        else:
            made.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step))
    return made


def train(case: Case, model: nn.Module, optimizers: list[Any], schedules: list[Any]) -> tuple[list[float], list[Tensor]]:
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
        for optimizer in optimizers:
            if case.clip is not None:
                norms.append(optimizer.clip_grad_norm_(MAX_NORM, scope=case.clip).clone())
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return losses, norms


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for child in model.children() if isinstance(child, nn.ModuleList) for layer in child]


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


# -- resident ------------------------------------------------------------------------------------------------------------


def run_resident(case: Case) -> Outcome:
    model = case.build().to(case.device)
    reference = resident_reference(model, layers_of(model), micro_batch=case.micro_batch)
    parameters = dict(model.named_parameters())
    optimizers = [
        reference.optimizer(
            recipe.factory,
            params=None if recipe.params is None else [{**g, "params": [parameters[name] for name in g["params"]]} for g in recipe.params],
            master_dtype=case.master_dtype,
            **recipe.options,
        )
        for recipe in recipes(case, model)
    ]
    losses, norms = train(case, model, optimizers, schedulers(case, [optimizer.inner for optimizer in optimizers]))
    state: dict[tuple[str, str], Any] = {}
    for name, parameter in parameters.items():
        for optimizer in optimizers:
            if any(parameter is mine for mine in optimizer.parameters):
                state.update({(name, key): value for key, value in optimizer.state_of(parameter).items()})
                master = optimizer.master_of(parameter)
                if master is not None:
                    state[name, "master"] = master.detach()
    state = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
    return Outcome(losses, norms, values_of(model), state)


# -- streamed ------------------------------------------------------------------------------------------------------------


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def moved_bytes(case: Case) -> int:
    """What the parameters, their state and, where they are kept for step(), their gradients take: by a step of plain torch."""
    model = case.build()
    parameters = dict(model.named_parameters())
    total = parameter_bytes(model) * (1 if case.when == "backward" else 2)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(case.master_dtype or parameter.dtype)
        parameter.grad = torch.zeros_like(parameter)
        total += parameter.nbytes if case.master_dtype is not None else 0
    for recipe in recipes(case, model):
        names = parameters if recipe.params is None else [name for group in recipe.params for name in group["params"]]
        optimizer = recipe.factory([parameters[name] for name in names if parameters[name].requires_grad], **recipe.options)
        optimizer.step()
        total += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return total


def ram_bytes(case: Case, model: nn.Module, gpu: int, moved: int) -> int:
    """So little that not all that moves stays off the drive."""
    ram = max(gpu, int(case.ram * moved) // PAGE * PAGE)
    if case.activations == "ram":
        ram += (len(layers_of(model)) + 4) * (4 if case.model == "vision" else 2) * PAGE  # held there
    return ram + NUM_SLOTS * slot_bytes(ram)


@contextlib.contextmanager
def attached(case: Case, directory: Path, gpu: int, moved: int) -> Iterator[tuple[nn.Module, TierStore, Any, list[TieredOptimizer]]]:
    """A model and its optimizers on a store with so much device memory, of a case that moves so many bytes."""
    model = case.build()
    params = recipes(case, model)
    with TierStore(gpu=gpu, ram=ram_bytes(case, model, gpu, moved), nvme=directory, device=case.device, policy=case.policy) as store:
        tiered = attach(model, store, layers_of(model), micro_batch=case.micro_batch, activations=case.activations)  # type: ignore[arg-type]
        optimizers = [
            TieredOptimizer(
                tiered,
                recipe.factory,
                params=recipe.params,
                when=case.when,  # type: ignore[arg-type]
                deferred_layers=case.deferred_layers,
                master_dtype=case.master_dtype,
                **recipe.options,
            )
            for recipe in params
        ]
        yield model, store, tiered, optimizers


def run_streamed(case: Case, directory: Path) -> Outcome:
    """Train with `share` of the parameters' bytes on the device, or the least above that does not raise, and never more than half.

    What `attach` and `TieredOptimizer` do not refuse must do: an error later fails the test.
    """
    total, moved = parameter_bytes(case.build()), moved_bytes(case)
    most = total // 2 // PAGE * PAGE
    for gpu in range(max(PAGE, int(case.share * total) // PAGE * PAGE), most + 1, PAGE):
        try:
            with attached(case, directory / str(gpu), gpu, moved):
                pass
        except CapacityError:
            continue
        return _run_streamed(case, directory / "run", gpu, moved)
    raise AssertionError(f"half of {total} bytes of parameters is not room for a layer and its update: give the model more layers")


def _run_streamed(case: Case, directory: Path, gpu: int, moved: int) -> Outcome:
    small, activations.SMALL = activations.SMALL, 0 if case.activations != "device" else activations.SMALL
    try:
        with attached(case, directory, gpu, moved) as (model, store, tiered, optimizers):
            losses, norms = train(case, model, optimizers, schedulers(case, list(optimizers)))
            stats = store.stats()
            state = {
                (weight, key): value
                for optimizer in optimizers
                for weight in [name for name, parameter in model.named_parameters() if any(parameter is p for p in _members(optimizer))]
                for key, value in optimizer.state_of(weight).items()
            }
            if case.activations != "device":
                assert any(name.startswith(activations.PREFIX) for name in store), "no activations in the store"
            # Not by detach(): of so many so small chunks a commit says more than so little device memory has room for.
            parameters = {name: tensor for block in tiered.structure.blocks for name, tensor in store.read(block.name).items()}  # type: ignore[union-attr]
            parameters.update((name, buffer.detach().to("cpu", copy=True)) for name, buffer in model.named_buffers())
    finally:
        activations.SMALL = small
    if case.master_dtype is not None:  # what never had a gradient has no master yet; there is one in the reference
        for weight in [name for name, parameter in model.named_parameters() if parameter.requires_grad]:
            state.setdefault((weight, "master"), parameters[weight].to(case.master_dtype))
    return Outcome(losses, norms, parameters, state, stats)


def _members(optimizer: TieredOptimizer) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# -- comparison ----------------------------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """To the bit; NaN is equal to NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
    return type(one) is type(other) and bool(one == other)


def assert_same(streamed: Outcome, resident: Outcome) -> None:
    assert torch.tensor(streamed.losses).isfinite().all(), "a loss that is not finite proves nothing"
    assert streamed.losses == resident.losses
    assert len(streamed.norms) == len(resident.norms)
    assert all(same(one.cpu(), other.cpu()) for one, other in zip(streamed.norms, resident.norms, strict=True)), "norms differ"
    assert streamed.parameters.keys() == resident.parameters.keys()
    different = [name for name, value in resident.parameters.items() if not same(streamed.parameters[name], value)]
    assert not different, f"parameters differ: {different}"
    assert streamed.state.keys() == resident.state.keys()
    different_state = [key for key, value in resident.state.items() if not same(streamed.state[key], value)]
    assert not different_state, f"state differs: {different_state}"


def assert_streamed(outcome: Outcome) -> None:
    """That bytes moved through all tiers: equality with everything resident would prove nothing."""
    stats = outcome.stats
    assert stats is not None
    assert stats.tiers["gpu"].evictions > 0
    assert stats.tiers["ram"].evictions > 0
    for link in ("h2d", "d2h", "nvme_read", "nvme_write"):
        assert stats.links[link].bytes > 0, link
    assert stats.tiers["gpu"].peak_bytes <= stats.tiers["gpu"].capacity_bytes


def compare(case: Case, directory: Path) -> tuple[Outcome, Outcome]:
    """Run both and assert that nothing differs."""
    resident = run_resident(case)
    streamed = run_streamed(case, directory)
    assert_same(streamed, resident)
    assert_streamed(streamed)
    return streamed, resident


__all__ = ["MODELS", "Case", "Outcome", "assert_same", "assert_streamed", "compare", "run_resident", "run_streamed"]
