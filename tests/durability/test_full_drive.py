"""A drive that is really full: the loop is told, the last commit opens, and once there is room the same process goes on, bit for bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.durability.drives import Drive, Limited, Mounted, ShortFiles, mounted
from tests.durability.outside import newest_commit
from tests.durability.processes import Child
from tests.durability.training import GPU, LAYERS, RAM, Reference, Tensors, Training, digest_of, digest_of_store
from tests.quiet import assert_quiet
from tierstore import TierStore
from tierstore.errors import TierFullError
from tierstore.nvme.local import LocalFiles

LIMIT = 4 * LAYERS * 12 * 4096
"""Twice what training with `keep=1` takes; the rest is for ballast."""

PATIENCE = 25
"""Failed writes, and calls that find no room, before it is called a storm."""

CLOSER_LOOKS = 1
"""Errors of a story at which a copy of the directory is opened."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


class Loop:
    """A training whose every call may find the drive full, is then judged, and made again.

    Attributes:
        errors: By the call that raised them.
        committed_step: Of the last commit that returned.
    """

    def __init__(self, drive: Drive, reference: Reference, scratch: Path) -> None:
        self.drive = drive
        self.store = self.open()
        self.training = Training()
        self.errors: list[tuple[str, TierFullError]] = []
        self.committed_step: int | None = None
        self._reference = reference
        self._scratch = scratch

    def close(self) -> None:
        self.store.close()

    def open(self) -> TierStore:
        return TierStore(GPU, RAM, self.drive.path, device="cpu", nvme_limit=LIMIT if isinstance(self.drive, Limited) else None)

    # -- what a training calls -------------------------------------------------------------------------------------------

    def put(self, name: str, tensors: Tensors) -> None:
        self.insist("put", lambda: self.store.put(name, tensors))

    @contextlib.contextmanager
    def use(self, *names: str, write: bool = False) -> Iterator[Any]:
        leases = contextlib.ExitStack()
        with leases:
            yield self.insist("use", lambda: leases.enter_context(self.store.use(*names, write=write)))

    def commit(self, *, wait: bool = True) -> int:
        metadata = self.training.metadata()
        call = (lambda: self.store.commit(metadata)) if wait else (lambda: self.store.commit(metadata, wait=False).result())
        generation = self.insist("commit", call)
        self.committed_step = self.training.step
        return generation

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.training.advance(self)
            self.commit()

    # -- what is demanded of it ------------------------------------------------------------------------------------------

    def insist(self, what: str, call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except TierFullError as error:
                self.errors.append((what, error))
                self.judge(what, error)
                self.drive.free(self.store)

    def judge(self, what: str, error: TierFullError) -> None:
        """The error says what to do, nothing spins in the background, and the last commit opens, here in a copy."""
        assert error.tier == "nvme"
        assert error.remedy
        assert len(self.errors) < PATIENCE, f"{what} finds no room though there is some: {error}"
        failures = self.failures()
        assert failures < PATIENCE
        self.check_commit(self.drive.path)
        if len(self.errors) > CLOSER_LOOKS:
            return
        time.sleep(0.1)
        assert self.failures() - failures < 3, "it is tried again and again though nobody asks"
        if self.committed_step is None:
            return
        copy = self._scratch / f"copy{len(self.errors)}"
        with self.drive.elsewhere():
            shutil.copytree(self.drive.path, copy)
            with TierStore(GPU, RAM, copy, device="cpu") as store:
                assert store.committed is not None
                assert digest_of_store(store, store.committed.metadata) == self._reference.digest(self.committed_step)
        shutil.rmtree(copy)

    def failures(self) -> int:
        return self.store.stats().links["nvme_write"].failures

    def check_commit(self, path: Path) -> None:
        seen = newest_commit(path)
        if self.committed_step is None:
            assert seen is None
        else:
            assert seen is not None
            assert digest_of(without_ballast(seen.blocks), seen.metadata) == self._reference.digest(self.committed_step)

    def end(self) -> None:
        """Some more steps; all of it as if nothing had happened, also after closing."""
        self.drive.free(self.store)
        self.steps(2)
        digest = digest_of_store(self.store, self.training.metadata())
        assert digest == self._reference.digest(self.training.step)
        assert_quiet(self.store)
        self.store.close()
        self.check_commit(self.drive.path)
        with self.open() as store:
            assert store.committed is not None
            assert digest_of_store(store, store.committed.metadata) == digest


def without_ballast(blocks: Any) -> Any:
    return {name: tensors for name, tensors in blocks.items() if not name.startswith("ballast")}


# -- how it comes to be full ----------------------------------------------------------------------------------------------


def before_anything(loop: Loop) -> set[str]:
    loop.drive.fill(loop.store)
    loop.training.begin(loop)
    loop.steps(1)
    return {"put"}


def while_spilling(loop: Loop) -> set[str]:
    """A step writes more than RAM holds, and every block needs a second file: the first commit has the first, and freed none."""
    loop.training.begin(loop)
    loop.steps(1)
    loop.drive.fill(loop.store)
    loop.training.advance(loop)
    return {"use"}


def at_a_commit(loop: Loop) -> set[str]:
    loop.training.begin(loop)
    loop.steps(2)
    loop.training.advance(loop)
    loop.drive.fill(loop.store)
    loop.commit()
    return {"commit"}


def at_a_commit_in_the_background(loop: Loop) -> set[str]:
    loop.training.begin(loop)
    loop.steps(2)
    loop.training.advance(loop)
    loop.drive.fill(loop.store)
    loop.commit(wait=False)
    return {"commit"}


def while_flushing(loop: Loop) -> set[str]:
    loop.training.begin(loop)
    loop.steps(1)
    loop.training.advance(loop)
    loop.drive.fill(loop.store)
    loop.insist("flush", loop.store.flush)
    return {"flush"}


def again_and_again(loop: Loop) -> set[str]:
    """Full in every step, at another place in each."""
    loop.training.begin(loop)
    loop.steps(1)
    for _ in range(2):
        loop.drive.fill(loop.store)
        loop.training.advance(loop)
        loop.drive.fill(loop.store)
        loop.commit()
    return {"use", "commit"}


STORIES = [before_anything, while_spilling, at_a_commit, at_a_commit_in_the_background, while_flushing, again_and_again]


@contextlib.contextmanager
def drive_of(kind: str, tmp_path: Path) -> Iterator[Drive]:
    if kind == "nvme_limit":
        yield Limited(tmp_path)
    elif kind == "file size":
        yield ShortFiles(tmp_path)
    else:
        with mounted(kind, tmp_path) as root:
            yield Mounted(root)


def tell(story: Callable[[Loop], set[str]], drive: Drive, reference: Reference, scratch: Path) -> None:
    with contextlib.closing(Loop(drive, reference, scratch)) as loop:
        expected = story(loop)
        assert {what for what, _ in loop.errors} >= expected
        loop.end()


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "file size", "nvme_limit"])
@pytest.mark.parametrize("story", STORIES)
def test_full(kind: str, story: Callable[[Loop], set[str]], tmp_path: Path, reference: Reference) -> None:
    reference.digest(20)
    with drive_of(kind, tmp_path) as drive:
        if kind == "file size":
            if not hasattr(os, "fork"):
                pytest.skip("a limit on file sizes needs a process of its own")
            assert Child(lambda say: tell(story, drive, reference, tmp_path)).wait() == 0
        else:
            tell(story, drive, reference, tmp_path)


@pytest.mark.parametrize(("name", "committed"), [("manifest-", False), ("CURRENT", True)])
def test_full_at_a_file_of_the_commit(name: str, committed: bool, tmp_path: Path, reference: Reference) -> None:
    """The drive runs full between the shards and this file. The manifest is the commit; `CURRENT` only follows it."""
    with mounted("tmpfs", tmp_path) as root, contextlib.closing(Loop(Mounted(root), reference, tmp_path)) as loop:
        loop.training.begin(loop)
        loop.steps(2)
        loop.training.advance(loop)
        save = LocalFiles.save
        full = False

        async def fill_first(files: LocalFiles, path: str, data: bytes, *, sync: bool) -> None:
            nonlocal full
            if os.path.basename(path).startswith(name) and not full:
                full = True
                loop.drive.fill()
            await save(files, path, data, sync=sync)

        with mock.patch.object(LocalFiles, "save", fill_first):
            loop.commit()
        assert full
        assert [what for what, _ in loop.errors] == ([] if committed else ["commit"])
        assert all("manifest" in str(error) for _, error in loop.errors)
        loop.check_commit(loop.drive.path)
        loop.end()


def test_opening_on_a_full_drive(tmp_path: Path, reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    """Not even the process id can be written down; what was committed is there all the same, and can be trained on once there is room."""
    with mounted("tmpfs", tmp_path) as root, contextlib.closing(Loop(Mounted(root), reference, tmp_path)) as loop:
        loop.training.begin(loop)
        loop.steps(2)
        loop.store.close()
        loop.drive.fill()
        loop.store = loop.open()
        assert "process id" in caplog.text
        assert digest_of_store(loop.store, loop.training.metadata()) == reference.digest(2)
        loop.steps(1)
        assert loop.errors
        loop.end()
