"""What the backward pass needs of the forward pass: the inputs of each unit, on the device or in blocks of the store."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tierstore.tiers.device import NAMES
from tierstore.training.leasing import Buffers
from tierstore.training.packing import is_dense

PREFIX = "activations/"

SMALL = 1 << 16
"""Tensors of fewer bytes stay on the device: to move them would cost more than they take."""

PLACES = 256
"""Kernels choose by where a tensor begins, and then add in another order; none looks beyond multiples of so many bytes."""

Key = tuple[torch.dtype, tuple[int, ...]]
Place = tuple[Any, Any, int, torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(eq=False, slots=True)
class Kept:
    """A tensor that is in the store.

    Attributes:
        name: The block.
        shape, stride: Of the tensor; the block has the same elements in the order in which they lie in memory.
        here: Where it lay on the device, and with which content.
        memory: Tells whether that memory is still the tensor's: what was let go is soon another's.
        place: How far behind a multiple of `PLACES` bytes it began.
        uses: How many calls still need it.
    """

    name: str
    key: Key
    shape: torch.Size
    stride: tuple[int, ...]
    here: Place
    memory: StorageWeakRef
    place: int
    uses: int = 1


class Activations:
    """Blocks for inputs of units, used again from step to step."""

    def __init__(self, buffers: Buffers, tier: str) -> None:
        self._buffers = buffers
        self._tier = tier
        self._free: dict[Key, list[str]] = {}
        self._count = 0
        self._here: dict[Place, Kept] = {}
        self._dropped: deque[Kept] = deque()

    def suits(self, tensor: Tensor) -> bool:
        """Whether a tensor is moved to the store rather than kept on the device."""
        if tensor.dtype not in NAMES or tensor.numel() * tensor.element_size() < SMALL:
            return False
        return _in_memory_order(tensor) is not None

    def keep(self, tensor: Tensor) -> Kept:
        """Copy a tensor that suits into the store. One that several units take is kept once, while any of them needs it."""
        self._collect()
        memory = StorageWeakRef(tensor.untyped_storage())
        here = (int(memory.cdata), int(tensor.storage_offset()), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
        kept = self._here.get(here)
        if kept is not None and not kept.memory.expired():
            kept.uses += 1
            return kept
        flat = _in_memory_order(tensor)
        assert flat is not None
        key = (tensor.dtype, tuple(flat.shape))
        free = self._free.setdefault(key, [])
        if free:
            name = free.pop()
        else:
            name = f"{PREFIX}{self._count}"
            self._count += 1
            self._buffers.declare(name, [("x", tensor.dtype, tuple(flat.shape))], hold=self._tier)
        with self._buffers.lease(name, write=[name], fresh=[name]) as block:
            block["x"].copy_(flat)
        self._here[here] = kept = Kept(name, key, tensor.shape, tensor.stride(), here, memory, tensor.data_ptr() % PLACES)
        return kept

    def look_at(self, kept: Kept) -> Tensor:
        """A copy on the device, which will be needed again."""
        with self._buffers.lease(kept.name) as block:
            return _copy(block["x"], kept)

    def take(self, kept: Kept) -> Tensor:
        """A copy on the device, and no more need for this use of it."""
        last = kept.uses == 1
        with self._buffers.lease(kept.name, write=[kept.name] if last else [], spent=[kept.name] if last else []) as block:
            found = _copy(block["x"], kept)
        self.drop(kept)
        return found

    def drop(self, kept: Kept) -> None:
        """One use less. Any thread, also from a finaliser: what it means is seen to later."""
        self._dropped.append(kept)

    def _collect(self) -> None:
        unneeded: list[str] = []
        while self._dropped:
            kept = self._dropped.popleft()
            kept.uses -= 1
            if not kept.uses:
                if self._here.get(kept.here) is kept:
                    del self._here[kept.here]
                self._free[kept.key].append(kept.name)
                unneeded.append(kept.name)
        if unneeded:
            self._buffers.give_up(unneeded)

    def settle(self) -> None:
        """Before a commit: what nobody needs has no content."""
        self._collect()

    def forget(self) -> None:
        """Delete the blocks."""
        self._dropped.clear()
        for number in range(self._count):
            self._buffers.delete(f"{PREFIX}{number}")
        self._free.clear()
        self._here.clear()
        self._count = 0


def _copy(flat: Tensor, kept: Kept) -> Tensor:
    """A copy that begins at such a place as the tensor did."""
    memory = torch.empty(flat.numel() + PLACES // flat.element_size(), dtype=flat.dtype, device=flat.device)
    skip = (kept.place - memory.data_ptr()) % PLACES // flat.element_size()
    memory[skip : skip + flat.numel()].copy_(flat)
    return memory.as_strided(kept.shape, kept.stride, skip)


def _in_memory_order(tensor: Tensor) -> Tensor | None:
    """A view of a dense tensor's elements in the order in which they lie in memory, in one dimension; None where they overlap or gap."""
    if not is_dense(tensor.shape, tensor.stride()):
        return None
    return tensor.as_strided((tensor.numel(),), (1,))
