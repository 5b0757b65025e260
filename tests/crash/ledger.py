"""What was committed, as far as its caller knows, and what a drive may hold after a crash."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tierstore.catalog import PAGE, Block, lay_out
from tierstore.nvme.adopted import gaps


@functools.lru_cache(4096)
def payload_of(value: int, nbytes: int) -> bytes:
    """The bytes of a block that has this value: no two agree anywhere, so a mixture is neither."""
    return hashlib.shake_128(b"%d" % value).digest(nbytes)


@functools.lru_cache(256)
def block_of(name: str, pages: int) -> Block:
    return lay_out(name, [(f"{name}.weight", "F32", (pages * PAGE // 4 - 128,)), (f"{name}.bias", "F32", (64,))])


@dataclass(frozen=True)
class Value:
    """What a block holds.

    Attributes:
        number, pages: Decide its bytes.
        adopted: It lies in the model file, as there, with zeros between tensors.
    """

    number: int
    pages: int
    adopted: bool = False

    def payload(self, name: str) -> bytes:
        """Of a block of that name."""
        found = payload_of(self.number, self.pages * PAGE)
        for low, high in gaps(block_of(name, self.pages)) if self.adopted else ():
            found = found[:low] + bytes(high - low) + found[high:]
        return found


State = Mapping[str, Value]
"""What each block holds."""


@dataclass(frozen=True)
class Ledger:
    """The commits of all lives on one drive, by the number in their metadata, from 1 on; 0 is the empty directory.

    Attributes:
        asked: What each commit holds that somebody asked for.
        acknowledged: The last one that returned, or that a store was opened at.
        least: The oldest that may be found after a crash now.
        kept: Those that must still be there, ascending, as far as they were not dropped for being too many.
        keep: How many stay, for the store that has it open now or had it last.
    """

    asked: Mapping[int, State] = field(default_factory=lambda: {0: {}})
    acknowledged: int = 0
    least: int = 0
    kept: tuple[int, ...] = ()
    keep: int = 1

    @property
    def newest(self) -> int:
        return max(self.asked)

    def ask(self, state: State) -> Ledger:
        return replace(self, asked={**self.asked, self.newest + 1: dict(state)})

    def acknowledge(self, number: int, *, certain: bool = True) -> Ledger:
        """A commit has returned.

        Args:
            number: Which.
            certain: It is durable, not only named; else the one before may be found instead.
        """
        kept = (*self.kept, number)[-self.keep - (not certain) :]
        return replace(self, acknowledged=number, least=number if certain else self.acknowledged, kept=kept)

    def found(self, number: int, keep: int) -> Ledger:
        """A store was opened and goes on from this one: nothing later can be there any more, and it is there for good."""
        asked = {each: state for each, state in self.asked.items() if each <= number}
        kept = sorted(self.must_have(number))  # as who had it last kept them, which is no more than he did
        return replace(self, asked=asked, acknowledged=number, least=number, kept=tuple(kept), keep=keep)

    def must_have(self, found: int) -> set[int]:
        """The generations that must be there beside the one that was found."""
        return set(sorted({*(number for number in self.kept if number <= found), found} - {0})[-self.keep :])
