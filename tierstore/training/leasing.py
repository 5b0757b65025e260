"""Leases of training: on behalf of one owner, whichever thread acts for it, and with blocks that need no loading or no saving.

[Note: Lengths]
Gradients and state take turns in the same room. Where the state of a chunk is one page shorter than that of the next, or six gradients are
four pages longer than the state of as many parameters, an extent that has come free does not take what comes next, and blocks are moved
together: 20 times a step were seen, and twice with the same blocks of fitting lengths. So blocks of about one length get one length, and
state takes as much as a whole number of gradients.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch

from tierstore.catalog import PAGE, Block, lay_out, round_up
from tierstore.mover import operations
from tierstore.residency import Tier
from tierstore.store import Leased
from tierstore.sync import TierStore, Use
from tierstore.tiers.device import NAMES

Tensors = Mapping[str, torch.Tensor]

CHUNK_BYTES = 64_000_000
"""What may be cut moves in chunks of about so many bytes: large enough for a link's full rate, small enough that a few fit anywhere."""

SHARE = 8
"""On a small device, a chunk takes at most one part in so many of it."""

LARGE_CHUNK_BYTES = 210_000_000
RAM_SHARE = 32
"""Chunks may be larger, each costs the host as much as any other, if RAM holds so many of them: a few are always passing through."""


def chunk_bytes(device_bytes: int, ram_bytes: int) -> int:
    """The most that a chunk takes, with so much room on the device and in RAM."""
    return min(device_bytes // SHARE, max(CHUNK_BYTES, min(LARGE_CHUNK_BYTES, ram_bytes // RAM_SHARE)))


SAME = 9
WHOLE = 8
"""See [Note: Lengths]: blocks are made longer by at most one part in 2**SAME, or in 2**WHOLE."""


def rounded(nbytes: int, part: int = 0) -> int:
    """How long a block is made that has to take so many bytes. See [Note: Lengths].

    Args:
        nbytes: At least so many, whole pages.
        part: The length of blocks of which a whole number is to lie in the extent of this one, where that takes little. 0: of none.
    """
    whole = round_up(nbytes, part) if part else 0
    if 0 < whole <= nbytes + (nbytes >> WHOLE):
        return whole
    return round_up(nbytes, max(PAGE, 1 << max(0, nbytes.bit_length() - 1 - SAME)))


class _Lease(Use):
    """A lease that keeps what was to be spent when an exception leaves it: whoever was to use it up has not."""

    def __enter__(self) -> Leased:
        if not torch.is_inference_mode_enabled():
            return super().__enter__()
        with torch.inference_mode(False):  # its tensors could never be trained, nor their changes be watched
            return super().__enter__()

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None and self._ticket is not None and self._ticket.lease is not None:
            self._ticket.lease.spent = frozenset()
        super().__exit__(kind, *rest)


class Buffers:
    """The blocks of one attached model.

    Attributes:
        held_on: The tier on which gradients and state are held; None: wherever there is room.

    Leases belong to the thread that runs the user's loop, also those that autograd's threads take in its stead while it waits for
    them: what that thread leases itself does not stand in their way.
    """

    def __init__(self, store: TierStore) -> None:
        self.store = store
        self.device = store.device
        self._owner = threading.local()
        self._unwanted: set[str] = set()
        self.held_on: str | None = None

    def acting_for(self, owner: int) -> int | None:
        """From here on this thread acts for `owner`. Returns for whom it acted before, to be set again."""
        before = getattr(self._owner, "ident", None)
        self._owner.ident = owner
        return before

    def back_to(self, before: int | None) -> None:
        self._owner.ident = before

    @property
    def device_bytes(self) -> int:
        """Room for blocks on the device."""
        return self.store.engine.placement.arenas[Tier.GPU].capacity_bytes

    @property
    def ram_bytes(self) -> int:
        """Room for blocks in RAM."""
        return self.store.engine.placement.arenas[Tier.RAM].capacity_bytes

    @property
    def owner(self) -> int:
        ident: int | None = getattr(self._owner, "ident", None)
        return threading.get_ident() if ident is None else ident

    def lease(
        self, *names: str, write: Collection[str] = (), fresh: Collection[str] = (), spent: Collection[str] = (), plain: bool = True
    ) -> Use:
        """Lease blocks. One yields its mapping of names to tensors, several a tuple of these.

        Args:
            names: The blocks.
            write: Those that may be written.
            fresh: Those of `write` whose content does not matter on entering.
            spent: Those of `write` whose content does not matter after leaving, unless by an exception.
            plain: Autograd saves none of the tensors.
        """
        if fresh and self._unwanted:
            self._unwanted.difference_update(fresh)
        return _Lease(self.store.engine, names, write, None, fresh=fresh, spent=spent, owner=self.owner, plain=plain)

    @contextlib.contextmanager
    def lease_all(
        self, names: list[str], *, write: Collection[str] = (), fresh: Collection[str] = (), spent: Collection[str] = ()
    ) -> Iterator[dict[str, Tensors]]:
        """As `lease`, of any number of blocks, by their names."""
        if not names:
            yield {}
            return
        with self.lease(*names, write=write, fresh=fresh, spent=spent) as leased:
            yield dict(zip(names, (leased,) if len(names) == 1 else leased, strict=True))

    def declare(
        self, name: str, tensors: Collection[tuple[str, torch.dtype, tuple[int, ...]]], hold: str | None = None, *, part: int = 0
    ) -> None:
        """Add a block without content, of (name, dtype, shape)s; one of that name and layout that is there already is taken over.

        Args:
            name: Its name.
            tensors: What it is made of.
            hold: The tier it is held on; None: `held_on`.
            part: As for `rounded`.
        """
        engine = self.store.engine
        layout = [(tensor, NAMES[dtype], tuple(shape)) for tensor, dtype, shape in tensors]
        block = lay_out(name, layout)
        block = replace(block, nbytes=rounded(block.nbytes, part))
        if name in self.store:
            with engine.lock:
                present = engine.scheduler.find(name).block
            if _same(present, block):
                return
            self.store.delete(name)
        self.store._run(operations.declare(engine, block, self.owner))
        hold = hold or self.held_on
        if hold is not None:
            try:
                with engine.lock:
                    record = engine.scheduler.find(name)
                    engine.placement.check_hold(record, Tier(hold))
                    engine.scheduler.set_hold(record, Tier(hold))
            except BaseException:
                self.store.delete(name)
                raise

    def give_up(self, names: Collection[str] = ()) -> None:
        """Drop the content of blocks, without waiting: what cannot be dropped now is tried again with the next call."""
        engine = self.store.engine
        self._unwanted.update(names)
        with engine.lock:
            for name in list(self._unwanted):
                record = engine.scheduler.names.get(name)
                if record is None or record.blank or engine.scheduler.try_blank(record):
                    self._unwanted.discard(name)
            engine.wanted = True

    def delete(self, name: str) -> None:
        if name in self.store:
            self.store.delete(name)

    def bytes_of(self, name: str) -> int:
        return self.store.info(name).nbytes


def _same(present: Block, wanted: Block) -> bool:
    return present.tensors == wanted.tensors and not present.frozen
