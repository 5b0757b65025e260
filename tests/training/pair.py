"""A streamed training and the same in plain torch, side by side, step for step: for tests of what goes wrong in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.quiet import assert_quiet
from tests.training.harness import layers_of, same
from tests.training.models import WIDTH, Mlp, Stack, batches
from tierstore import TierStore
from tierstore.testing.reference import Reference, ReferenceOptimizer, resident_reference
from tierstore.training import Tiered, TieredOptimizer, attach

LAYERS = 3
ROOMY = "4MB"
TIGHT = 144 << 10
"""A layer with gradients and a chunk of its state, and little else."""

Make = Callable[[], nn.Module]


def stack() -> nn.Module:
    torch.manual_seed(0)
    return Stack(LAYERS)


class Pair:
    """Both trainings. What is done to one is done to the other.

    Attributes:
        model, tiered, optimizer, store: The streamed one.
        plain, reference, other: The resident one: model, reference, optimizer.
    """

    def __init__(
        self,
        store: TierStore,
        make: Make = stack,
        *,
        when: str = "deferred",
        factory: Any = torch.optim.AdamW,
        master: bool = False,
        micro_batch: int | None = None,
        activations: str = "device",
        options: dict[str, Any] | None = None,
        batches_of: str = "stack",
    ) -> None:
        dtype = torch.bfloat16 if master else torch.float32
        masters = torch.float32 if master else None
        options = options or {"lr": 1e-2}
        self.store = store
        self.model = make().to(dtype)
        self.plain = make().to(dtype)
        self.tiered: Tiered = attach(
            self.model,
            store,
            layers_of(self.model),
            micro_batch=micro_batch,
            activations=activations,  # type: ignore[arg-type]
        )
        self.optimizer = TieredOptimizer(self.tiered, factory, when=when, master_dtype=masters, **options)  # type: ignore[arg-type]
        self.reference: Reference = resident_reference(self.plain, layers_of(self.plain), micro_batch=micro_batch)
        self.other: ReferenceOptimizer = self.reference.optimizer(factory, master_dtype=masters, **options)
        self.dtype = dtype
        self._batches = batches(batches_of, 1000, 4)

    @property
    def both(self) -> list[tuple[nn.Module, Any]]:
        return [(self.model, self.optimizer), (self.plain, self.other)]

    def batch(self) -> tuple[Tensor, Tensor]:
        inputs, targets = next(self._batches)
        return (inputs.to(self.dtype) if inputs.is_floating_point() else inputs), targets

    def losses(self, batch: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """A forward pass of each."""
        inputs, targets = batch or self.batch()
        losses = []
        for model in (self.model, self.plain):
            torch.manual_seed(5)
            losses.append(model(inputs, targets))
        assert same(losses[0].detach(), losses[1].detach())
        return losses

    def backward(self) -> None:
        for loss in self.losses():
            loss.backward()

    def clip(self, max_norm: float = 0.05) -> None:
        norms = [optimizer.clip_grad_norm_(max_norm) for _, optimizer in self.both]
        assert same(norms[0], norms[1])

    def step(self) -> None:
        for _, optimizer in self.both:
            optimizer.step()

    def zero_grad(self) -> None:
        for _, optimizer in self.both:
            optimizer.zero_grad()

    def advance(self, steps: int = 1, *, clip: bool = False) -> None:
        for _ in range(steps):
            self.backward()
            if clip:
                self.clip()
            self.step()
            self.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for block in self.tiered.structure.blocks:
            values = self.store.read(block.name)
            assert isinstance(values, dict)
            found.update(values)
        return found

    def assert_same_gradients(self) -> None:
        for name, parameter in self.plain.named_parameters():
            if parameter.requires_grad:
                mine = self.tiered.gradient(name)
                assert (mine is None) == (parameter.grad is None), name
                assert mine is None or same(mine, parameter.grad), name

    def assert_same(self) -> None:
        """Weights and state are equal to the bit."""
        weights = self.weights()
        for name, parameter in self.plain.named_parameters():
            assert same(weights[name], parameter.detach()), name
            if not parameter.requires_grad:
                continue
            state = dict(self.other.state_of(parameter))
            master = self.other.master_of(parameter)
            mine = self.optimizer.state_of(name)
            if master is not None:
                mine.setdefault("master", parameter.detach().float())  # none before the first step
                state["master"] = master.detach()
            assert mine.keys() == state.keys(), name
            assert all(same(mine[key], value) for key, value in state.items()), name
        for name, buffer in self.plain.named_buffers():
            assert same(dict(self.model.named_buffers())[name], buffer), name

    def assert_usable(self, steps: int = 2) -> None:
        """Nothing is leaked, and training goes on as if nothing had been."""
        assert_clean(self)
        self.zero_grad()
        self.assert_same()
        self.advance(steps)
        self.assert_same()
        assert_clean(self)


def assert_clean(pair: Pair) -> None:
    """Nothing is leased, nothing awaited of passes that are over, and every block is one that should be."""
    tiered = pair.tiered
    tiered.finish()
    tiered._copies.clear()
    assert_quiet(pair.store)
    assert not any(tiered._awaited.values()), "backward passes are awaited that will never come"
    assert tiered._num_uses == 0
    for module in pair.model.modules():
        assert not any(value is not None and type(value) is torch.Tensor for value in module._parameters.values()), "values in a place"
    known = {block.name for block in tiered.structure.blocks}
    known |= {name for chunk in pair.optimizer.chunks for name in chunk.blocks}
    known |= {part.name for total in tiered.gradients.of.values() for part in total.parts}
    known |= {part.name for partial in tiered.gradients._partials.values() for part in partial.sum.parts}
    known |= {"training/state"}
    strange = {name for name in pair.store if name not in known and not name.startswith("activations/")}
    assert not strange, strange
    waiting = [name for name in pair.store if name.startswith("activations/") and pair.store.info(name).tiers]
    if tiered.activations is not None:
        tiered.activations.settle()
        waiting = [name for name in pair.store if name.startswith("activations/") and pair.store.info(name).tiers]
    assert not waiting, f"inputs of layers wait for nothing: {waiting}"


@contextmanager
def opened(directory: Path | None = None, gpu: int | str = ROOMY, ram: int | str = "16MB") -> Iterator[TierStore]:
    with TierStore(gpu, ram, directory, device="cpu") as store:
        yield store


__all__ = ["LAYERS", "ROOMY", "TIGHT", "WIDTH", "Mlp", "Pair", "assert_clean", "opened", "stack"]
