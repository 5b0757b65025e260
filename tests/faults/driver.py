"""Calls of a store under a plan of faults, each compared with a dictionary of tensors, each failure judged and repeated."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch

from tests.faults.plan import FaultyFiles, Plan, block_of, put_under
from tests.helpers import check_invariants
from tests.quiet import assert_quiet, tensor_of
from tierstore import CommitHandle, TierStore
from tierstore.catalog import PAGE
from tierstore.errors import ShardError, TierFullError, TierstoreError, TransferError

T = TypeVar("T")

PATIENCE_S = 30.0
"""A lease that takes longer hangs."""

TIER_OF = {"h2d": {"gpu"}, "d2h": {"ram"}, "host": {"gpu", "ram", "nvme"}}
"""The tier that an error names, by the kind of operation; all others are of the drive."""

MAKES_ROOM = {"put", "use", "hold", "flush", "commit", "evict"}
"""Calls that may depend on the transfer of a block they do not name."""


def pages(value: float, num_pages: int) -> torch.Tensor:
    return torch.arange(num_pages * PAGE // 4, dtype=torch.float32) * 1e-3 + value


class Driver:
    """A store far smaller than its data, and what it should hold.

    Attributes:
        values: By block.
        committed: `values` as of the last commit.
        errors: What calls raised, and was judged right.
    """

    def __init__(self, store: TierStore, plan: Plan) -> None:
        self.store = store
        self.plan = plan
        self.values: dict[str, torch.Tensor] = {}
        self.committed: dict[str, torch.Tensor] = {}
        self.errors: list[TierstoreError] = []
        self._next = 0.0

    # -- calls ---------------------------------------------------------------------------------------------------------------

    def put(self, name: str, num_pages: int = 2, tier: str = "ram") -> None:
        value = self._new(num_pages)
        self._do("put", [name], lambda: self.store.put(name, value, tier=tier))
        self.values[name] = value

    def use(self, *names: str, write: Collection[str] = ()) -> None:
        def lease() -> None:
            with self.store.use(*names, write=list(write), timeout=PATIENCE_S) as leased:
                for name, tensor in zip(names, leased if len(names) > 1 else (leased,), strict=True):
                    assert torch.equal(tensor, self.values[name]), f"a lease yields old or torn values of {name!r}"
                    if name in write:
                        value = self._new(tensor.numel() * 4 // PAGE)
                        tensor.copy_(value)
                        self.values[name] = value

        self._do("use", names, lease)

    def write(self, name: str) -> None:
        value = self._new(self.values[name].numel() * 4 // PAGE)
        self._do("write", [name], lambda: self.store.write(name, value))
        self.values[name] = value

    def read(self, name: str) -> None:
        found = self._do("read", [name], lambda: tensor_of(self.store, name))
        assert torch.equal(found, self.values[name]), f"read() returned old or torn values of {name!r}"

    def prefetch(self, *names: str) -> None:
        self.store.prefetch(*names)  # may never raise

    def hold(self, name: str, tier: str) -> None:
        self._do("hold", [name], lambda: self.store.hold(name, tier))
        assert self.store.info(name).hold == tier

    def unhold(self, name: str) -> None:
        self.store.unhold(name)

    def evict(self, name: str) -> None:
        self._do("evict", [name], lambda: self.store.evict(name))

    def delete(self, name: str) -> None:
        self._do("delete", [name], lambda: self.store.delete(name))
        del self.values[name]

    def flush(self) -> None:
        self._do("flush", [], self.store.flush)

    def commit(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Commit; with `meanwhile`, by a handle, and that happens before it is asked."""
        present = dict(self.values)
        if meanwhile is None:
            self._do("commit", [], self.store.commit)
        else:
            handle = self.store.commit(wait=False)
            assert isinstance(handle, CommitHandle)
            meanwhile()
            try:
                handle.result(PATIENCE_S)
            except TierstoreError as error:
                self._judge(error, "commit", [])
                self.plan.heal()
                present = dict(self.values)
                self.store.commit()
        self.committed = present

    # -- failures ------------------------------------------------------------------------------------------------------------

    def _do(self, call: str, names: Collection[str], act: Callable[[], T]) -> T:
        before = {name: self.values.get(name) for name in names}
        try:
            return act()
        except TierstoreError as error:
            self._judge(error, call, names)
        self.plan.heal()
        check_invariants(self.store.engine)
        for name, value in before.items():
            if value is None:
                assert name not in self.store, "a block whose put() failed is there"
            else:
                assert torch.equal(tensor_of(self.store, name), value), f"{name!r} lost its newest values as {call}() failed"
        return act()

    def _judge(self, error: TierstoreError, call: str, names: Collection[str]) -> None:
        """The error is one that this call may raise for what was struck, and says all there is to say."""
        strike, struck = self.plan.strike or self.plan.healed, self.plan.struck
        assert strike is not None, f"{call}() failed though nothing was struck: {error!r}"
        assert struck, f"{call}() failed before anything was struck: {error!r}"
        self.errors.append(error)
        assert isinstance(error, TransferError | TierFullError | ShardError), repr(error)
        assert isinstance(error, TierFullError) == (strike.fault == "ENOSPC"), repr(error)
        assert error.remedy, str(error)
        assert error.tier in TIER_OF.get(strike.kind, {"nvme"}), repr(error.details)
        blocks = {block_of(name) for name in struck}
        if strike.kind == "host":
            blocks = set(names)
        assert error.block in blocks, f"{error} names {error.block!r}, struck were {blocks}"
        if error.block is not None:
            assert repr(error.block) in str(error), str(error)
            assert error.block in names or call in MAKES_ROOM, f"{call}({names}) does not depend on {error.block!r}: {error}"
        else:
            assert call == "commit", str(error)
        if strike.kind not in TIER_OF:
            assert os.path.isabs(error.path), error.path
            assert error.path in str(error), str(error)

    def _new(self, num_pages: int) -> torch.Tensor:
        self._next += 1
        return pages(self._next, num_pages)

    def check(self) -> None:
        """Everything is what it should be, and nothing is left over."""
        for name, value in self.values.items():
            assert torch.equal(tensor_of(self.store, name), value), f"{name!r} is not what it should be"
        assert sorted(self.store) == sorted(self.values)
        assert_quiet(self.store)
        check_invariants(self.store.engine)


@contextmanager
def opened(path: Path, plan: Plan, *, gpu: int, ram: int, portable: bool = False, policy: str = "lookahead") -> Iterator[TierStore]:
    """A store of so many pages on each memory tier, whose files and copies follow the plan."""
    strike, plan.strike = plan.strike, None  # opening a directory has tests of its own
    with mock.patch("tierstore.nvme.directory.LocalFiles", return_value=FaultyFiles(plan, portable=portable)):
        store = TierStore(gpu=gpu * PAGE, ram=(ram + 4) * PAGE, nvme=path / "swap", device="cpu", policy=policy)
    put_under(plan, store.engine)
    plan.counts.clear()
    plan.strike = strike
    try:
        yield store
    finally:
        plan.heal()
        store.close()


def reopened(path: Path) -> dict[str, torch.Tensor]:
    """What another store finds in the directory."""
    with TierStore(gpu=64 * PAGE, ram=128 * PAGE, nvme=path / "swap", device="cpu") as store:
        return {name: tensor_of(store, name) for name in store}
