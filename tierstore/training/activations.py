"""What the backward pass needs of the forward pass: the inputs of each unit, on the device or in blocks of the store."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tierstore.catalog import PAGE
from tierstore.errors import CapacityError
from tierstore.tiers.device import NAMES
from tierstore.training.leasing import Buffers, chunk_bytes
from tierstore.training.packing import is_dense

PREFIX = "activations/"

SMALL = 1 << 16
"""Tensors of fewer bytes stay on the device: to move them would cost more than they take."""

PLACES = 256
"""Kernels choose by where a tensor begins, and then add in another order; none looks beyond multiples of so many bytes."""

Key = tuple[torch.dtype, int]
"""Of blocks that are alike: dtype and number of elements."""

Place = tuple[Any, Any, int, torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(eq=False, slots=True)
class Kept:
    """A tensor that is in the store.

    Attributes:
        pieces: The blocks and what they are like: the tensor's elements, in the order in which they lie in memory.
        shape, stride: Of the tensor.
        here: Where it lay on the device, and with which content.
        memory: Tells whether that memory is still the tensor's: what was let go is soon another's.
        place: How far behind a multiple of `PLACES` bytes it began.
        uses: How many calls still need it.
    """

    pieces: list[tuple[str, Key]]
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
        self._piece_bytes = max(PAGE, chunk_bytes(buffers.device_bytes, buffers.ram_bytes) // PAGE * PAGE)
        self._free: dict[Key, list[str]] = {}
        self._count = 0
        self._here: dict[Place, Kept] = {}
        self._dropped: deque[Kept] = deque()

    def suits(self, tensor: Tensor) -> bool:
        """Whether a tensor is moved to the store rather than kept on the device."""
        if tensor.layout is not torch.strided or tensor.dtype not in NAMES or tensor.numel() * tensor.element_size() < SMALL:
            return False
        return _in_memory_order(tensor) is not None

    def keep(self, tensor: Tensor) -> Kept:
        """Copy a tensor that suits into the store. One that several units take is kept once, while any of them needs it.

        Raises:
            CapacityError: The tier has no room for it.
        """
        self._collect()
        memory = StorageWeakRef(tensor.untyped_storage())
        here = (int(memory.cdata), int(tensor.storage_offset()), tensor._version, tensor.dtype, tensor.shape, tensor.stride())
        kept = self._here.get(here)
        if kept is not None and not kept.memory.expired():
            kept.uses += 1
            return kept
        flat = _in_memory_order(tensor)
        assert flat is not None
        kept = Kept([], tensor.shape, tensor.stride(), here, memory, tensor.data_ptr() % PLACES)
        try:
            for piece in flat.split(self._piece_bytes // flat.element_size()):
                key = (piece.dtype, piece.numel())
                name = self._block(key)
                kept.pieces.append((name, key))
                with self._buffers.lease(name, write=[name], fresh=[name]) as block:
                    block["x"].copy_(piece)
        except BaseException:
            self.drop(kept)
            raise
        self._here[here] = kept
        return kept

    def _block(self, key: Key) -> str:
        """One that nobody needs, or a new one."""
        free = self._free.setdefault(key, [])
        if free:
            return free.pop()
        name = f"{PREFIX}{self._count}"
        self._count += 1
        dtype, numel = key
        try:
            self._buffers.declare(name, [("x", dtype, (numel,))], hold=self._tier)
        except CapacityError as error:
            other = "activations='nvme', " if self._tier == "ram" else ""
            raise CapacityError(
                f"the inputs of layers do not fit tier {self._tier!r}, where activations={self._tier!r} keeps them for the backward pass",
                need=error.need,
                have=error.have,
                remedy=f"raise {self._tier}=, or use {other}activations='device' or a smaller batch",
                block=name,
                tier=self._tier,
            ) from error
        return name

    def look_at(self, kept: Kept) -> Tensor:
        """A copy on the device, which will be needed again."""
        return self._copy(kept, spend=False)

    def take(self, kept: Kept) -> Tensor:
        """A copy on the device, and no more need for this use of it."""
        try:
            return self._copy(kept, spend=kept.uses == 1)
        finally:
            self.drop(kept)

    def _copy(self, kept: Kept, *, spend: bool) -> Tensor:
        """A copy that begins at such a place as the tensor did."""
        dtype = kept.pieces[0][1][0]
        numel = sum(length for _, (_, length) in kept.pieces)
        memory = torch.empty(numel + PLACES // dtype.itemsize, dtype=dtype, device=self._buffers.store.device)
        skip = (kept.place - memory.data_ptr()) % PLACES // dtype.itemsize
        start = skip
        for name, (_, length) in kept.pieces:
            spent = [name] if spend else []
            with self._buffers.lease(name, write=spent, spent=spent) as block:
                memory[start : start + length].copy_(block["x"])
            start += length
        return memory.as_strided(kept.shape, kept.stride, skip)

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
                for name, key in kept.pieces:
                    self._free[key].append(name)
                    unneeded.append(name)
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


def _in_memory_order(tensor: Tensor) -> Tensor | None:
    """A view of a dense tensor's elements in the order in which they lie in memory, in one dimension; None where they overlap or gap."""
    if not is_dense(tensor.shape, tensor.stride()):
        return None
    return tensor.as_strided((tensor.numel(),), (1,))
