"""A small training by hand over the public calls, and the same with everything resident: what each step must leave, bit for bit.

Four layers and the AdamW state of each are eight blocks, three times of what the device holds and more than twice of what RAM does,
so every step reads from the drive and spills to it. Gradients are written out, since autograd does not survive a fork.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tierstore import TierStore

LAYERS = 4
WIDTH = 48
ROWS = 16
NUM_ROWS = 512
GPU, RAM = 11 * 4096, 17 * 4096
"""One layer with its state; transfer space and five blocks of eight."""

Tensors = dict[str, torch.Tensor]


class Keeper(Protocol):
    """What a training needs of a store."""

    def put(self, name: str, tensors: Tensors) -> None: ...
    def use(self, *names: str, write: bool = False) -> Any: ...


class Resident:
    """Everything in memory, in place of a store."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensors] = {}

    def put(self, name: str, tensors: Tensors) -> None:
        self.blocks[name] = {key: tensor.clone() for key, tensor in tensors.items()}

    @contextmanager
    def use(self, *names: str, write: bool = False) -> Iterator[Any]:
        found = tuple(self.blocks[name] for name in names)
        yield found if len(found) > 1 else found[0]


class Training:
    """The loop's own state: the step, where it is in the data, and its random numbers."""

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        self.step = 0
        self.position = 0
        self.generator = torch.Generator().manual_seed(7)
        if metadata is not None:
            self.step, self.position = metadata["step"], metadata["position"]
            self.generator.set_state(torch.tensor(metadata["rng"], dtype=torch.uint8))

    def metadata(self) -> dict[str, Any]:
        return {"step": self.step, "position": self.position, "rng": self.generator.get_state().tolist()}

    def begin(self, keeper: Keeper) -> None:
        """Put the blocks of a run that has no commit yet."""
        generator = torch.Generator().manual_seed(1)
        for layer in range(LAYERS):
            weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
            keeper.put(f"layer{layer}", {"weight": weight, "bias": torch.zeros(WIDTH)})
            keeper.put(f"state{layer}", {f"{moment}.{key}": torch.zeros(shape) for moment in "mv" for key, shape in SHAPES.items()})

    def advance(self, keeper: Keeper) -> None:
        """One step: forward with each layer's input kept, then backward, where each layer is updated as soon as its gradient is there."""
        rows = torch.arange(self.position, self.position + ROWS) % NUM_ROWS
        inputs = DATA[rows] + 0.01 * torch.randn(ROWS, WIDTH, generator=self.generator)
        targets = DATA[(rows + 1) % NUM_ROWS].tanh()
        kept = [inputs]
        for layer in range(LAYERS):
            with keeper.use(f"layer{layer}") as block:
                kept.append((kept[-1] @ block["weight"] + block["bias"]).tanh())
        gradient = (kept[-1] - targets) * (2 / ROWS)
        self.step += 1
        for layer in reversed(range(LAYERS)):
            gradient = gradient * (1 - kept[layer + 1] ** 2)
            with keeper.use(f"layer{layer}", f"state{layer}", write=True) as (block, state):
                below = gradient @ block["weight"].T
                update(block, state, {"weight": kept[layer].T @ gradient, "bias": gradient.sum(0)}, self.step)
            gradient = below
        self.position = (self.position + ROWS) % NUM_ROWS


SHAPES = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}
DATA = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


def update(block: Tensors, state: Tensors, gradients: Tensors, step: int) -> None:
    """AdamW."""
    for key, gradient in gradients.items():
        mean, square = state[f"m.{key}"], state[f"v.{key}"]
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        denominator = (square / (1 - 0.99**step)).sqrt_().add_(1e-8)
        block[key].mul_(1 - 1e-4).addcdiv_(mean, denominator, value=-3e-3 / (1 - 0.9**step))


def digest_of(blocks: Mapping[str, Mapping[str, torch.Tensor]], metadata: Mapping[str, Any]) -> str:
    """Of every bit of a state, metadata included."""
    running = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(blocks):
        for key, tensor in sorted(blocks[name].items()):
            running.update(f"{name}/{key}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            running.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


def digest_of_store(store: TierStore, metadata: Mapping[str, Any]) -> str:
    blocks = {}
    for name in store:
        value = store.read(name)
        assert not isinstance(value, torch.Tensor)
        blocks[name] = value
    return digest_of(blocks, metadata)


class Reference:
    """The digest of each step of an undisturbed run, as far as anybody asked."""

    def __init__(self) -> None:
        self._resident = Resident()
        self._training = Training()
        self._training.begin(self._resident)
        self._digests = [self._digest()]

    def digest(self, step: int) -> str:
        while len(self._digests) <= step:
            self._training.advance(self._resident)
            self._digests.append(self._digest())
        return self._digests[step]

    def _digest(self) -> str:
        return digest_of(self._resident.blocks, self._training.metadata())
