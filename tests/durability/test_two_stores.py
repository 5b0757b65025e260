"""Two stores on one directory: the second is kept out, whatever it calls the directory and whatever lies about in it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.durability.processes import Child, Say
from tests.quiet import tensor_of
from tierstore import TierStore
from tierstore.errors import BusyError
from tierstore.nvme import names
from tierstore.nvme.directory import Directory
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.locks import describe_holder, living_holder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
]


def open_store(path: str | Path) -> TierStore:
    return TierStore(1 << 18, 1 << 20, path, device="cpu")


def begin(path: Path) -> TierStore:
    store = open_store(path)
    store.put("a", torch.arange(2000.0))
    store.commit()
    return store


def holder_of(path: str | Path) -> int | None:
    """The process that is said to have it; fails if a second store gets in."""
    with pytest.raises(BusyError) as caught:
        open_store(path)
    pid = caught.value.pid
    assert (f"process {pid}" if pid is not None else "another process") in str(caught.value)
    return pid


def in_child(work: Callable[[], object]) -> None:
    assert Child(lambda say: work()).wait() == 0


@pytest.fixture
def swap(tmp_path: Path) -> Path:
    return tmp_path / "swap"


@pytest.fixture
def store(swap: Path) -> Iterator[TierStore]:
    with begin(swap) as store:
        yield store
        with store.use("a", write=True) as a:
            a.add_(1)
        store.commit()


# -- the same directory by other names ------------------------------------------------------------------------------------


def alias_of(kind: str, swap: Path) -> str:
    if kind == "itself":
        return str(swap)
    if kind == "relative":
        return os.path.relpath(swap)
    if kind == "roundabout":
        return f"{swap}/../{swap.name}/."
    way = swap.parent / "way"
    if kind == "link":
        way.symlink_to(swap)
        return str(way)
    if kind == "link above":
        way.symlink_to(swap.parent)
        return str(way / swap.name)
    way.mkdir()
    done = subprocess.run(["mount", "--bind", str(swap), str(way)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is refused here: {done.stderr.strip()}")
    return str(way)


@pytest.mark.parametrize("kind", ["itself", "relative", "roundabout", "link", "link above", "bind mount"])
def test_whatever_it_is_called(kind: str, store: TierStore, swap: Path) -> None:
    alias = alias_of(kind, swap)

    def second() -> None:
        assert holder_of(alias) == os.getppid()

    try:
        assert holder_of(alias) == os.getpid()
        in_child(second)
    finally:
        if kind == "bind mount":
            subprocess.run(["umount", alias], check=True)
    assert tensor_of(store, "a")[5] == 5


def test_many_at_once(swap: Path) -> None:
    """Of processes that open a directory at the same moment one gets it, also while it is being made."""

    def one(say: Say) -> None:
        try:
            with open_store(swap) as store:
                say("in", len(store))
                store.put(f"b{os.getpid()}", torch.ones(5))
                store.commit()
        except BusyError as error:
            say("busy", error.pid)

    for _ in range(4):
        children = [Child(one) for _ in range(4)]
        assert [child.wait() for child in children] == [0] * 4
        said = [line for child in children for line in child.heard]
        assert any(words[0] == "in" for words in said)
        pids = {str(child.pid) for child in children}
        assert all(words[1] in pids | {"None"} for words in said if words[0] == "busy")
    with open_store(swap) as store:
        assert 4 <= len(store) <= 16, "nobody's commit is lost"


# -- what is left behind --------------------------------------------------------------------------------------------------


def killed(swap: Path) -> int:
    """The id of a process that had it, and is gone."""

    def live(say: Say) -> None:
        store = begin(swap)
        assert len(store) == 1  # it lives until here, or dropping it would close it
        os.kill(os.getpid(), signal.SIGKILL)

    child = Child(live)
    assert child.wait() == -9
    return child.pid


def test_a_killed_process_holds_nothing(swap: Path) -> None:
    pid = killed(swap)
    assert (swap / names.HOLDER).read_text().split()[0] == str(pid)
    assert (swap / names.LOCK).exists()
    with open_store(swap) as store:
        assert tensor_of(store, "a")[5] == 5
        assert holder_of(swap) == os.getpid()
    assert not (swap / names.HOLDER).exists()


LIES = {
    "nothing": b"",
    "rubbish": b"\xff\xfe\0\0",
    "much rubbish": b"7" * 100_000,
    "words": b"a b c",
    "an id alone": b"1\n",
    "this process, alone": f"{os.getpid()}\n".encode(),
    "an id that cannot be": b"99999999999999999999\n" + describe_holder().split(b"\n", 1)[1],
    "a negative id": b"-1\n" + describe_holder().split(b"\n", 1)[1],
    "another process of this id": describe_holder().rsplit(b" ", 1)[0] + b" 1.0\n",
    "another machine": f"{os.getpid()}\nelsewhere/{describe_holder().decode().split()[1].split('/')[1]} ".encode()
    + describe_holder().rsplit(b" ", 1)[1],
    "not a time": describe_holder().rsplit(b" ", 1)[0] + b" nan\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_process_id_is_believed_only_if_it_can_be_true(lie: str, store: TierStore, swap: Path) -> None:
    (swap / names.HOLDER).write_bytes(LIES[lie])
    assert holder_of(swap) is None
    (swap / names.HOLDER).unlink()
    assert holder_of(swap) is None


def test_what_a_process_says_of_itself_holds_while_it_lives(swap: Path) -> None:
    assert living_holder(describe_holder()) == os.getpid()
    child = Child(lambda say: say("said", describe_holder().decode().replace("\n", " ")))
    child.wait_for("said")
    said = " ".join(child.heard[0][1:]).encode()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert living_holder(said) is None, "it has ended, though nobody has taken note of it yet"
    assert child.wait() == 0
    assert living_holder(said) is None


def test_a_stale_process_id_is_not_reported_as_the_holder(swap: Path) -> None:
    """A store that has the lock and has not said so yet: what its killed predecessor said must not be believed."""
    stale = (killed(swap), (swap / names.HOLDER).read_bytes())
    lock = LocalFiles().lock(str(swap / names.LOCK))
    assert lock is not None
    assert (swap / names.HOLDER).read_bytes() == stale[1]
    assert holder_of(swap) is None
    lock.release()


# -- forks ----------------------------------------------------------------------------------------------------------------


def grandchild(work: Callable[[], object]) -> int:
    """A child that outlives its parent. Forked bare: what Python runs at a fork is what is tested."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            signal.pause()
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize("when", ["open", "opening"])
def test_a_forked_child_does_not_keep_the_lock(when: str, swap: Path) -> None:
    """It inherits descriptors whose lock would last as long as it lives."""

    def live(say: Say) -> None:
        if when == "open":
            store = begin(swap)
            say("child", grandchild(lambda: None))
            assert len(store) == 1
        else:  # between the lock and the engine that would tell the directory of forks
            directory = Directory.open(swap)
            say("child", grandchild(lambda: None))
            assert not directory.closed
        os.kill(os.getpid(), signal.SIGKILL)

    child = Child(live)
    child.wait_for("child")
    left = int(child.heard[-1][1])
    try:
        os.waitpid(child.pid, 0)
        os.kill(left, 0)  # it lives
        with open_store(swap) as store:
            assert len(store) == (when == "open")
    finally:
        os.kill(left, signal.SIGKILL)


def test_a_directory_that_is_dropped_unclosed_is_free(swap: Path) -> None:
    Directory.open(swap)
    gc.collect()
    open_store(swap).close()


def test_a_forked_child_does_not_unlock_either(store: TierStore, swap: Path) -> None:
    def child() -> None:
        assert holder_of(swap) == os.getppid()
        store.close()
        assert holder_of(swap) == os.getppid()

    in_child(child)
    assert holder_of(swap) == os.getpid()


# -- files deleted under a running store ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="the lock file is all there is")
@pytest.mark.parametrize("gone", [[names.LOCK], [names.LOCK, names.HOLDER]])
def test_a_deleted_lock_file_lets_nobody_in(gone: list[str], store: TierStore, swap: Path) -> None:
    for name in gone:
        (swap / name).unlink()
    for _ in range(2):  # the first makes a new lock file
        pid = holder_of(swap)
        assert pid == (os.getpid() if names.HOLDER not in gone else None)

    def second() -> None:
        holder_of(swap)

    in_child(second)
    assert tensor_of(store, "a")[5] == 5


def test_a_lock_file_that_was_replaced_lets_nobody_in(store: TierStore, swap: Path) -> None:
    (swap / "new").touch()
    os.replace(swap / "new", swap / names.LOCK)
    assert holder_of(swap) == os.getpid()


def test_a_copy_of_a_directory_in_use_is_another_directory(store: TierStore, swap: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(swap), str(tmp_path / "copy")], check=True)
    with open_store(tmp_path / "copy") as copy:
        assert tensor_of(copy, "a")[5] == 5


def test_a_second_store_changes_nothing(store: TierStore, swap: Path) -> None:
    def look() -> Any:
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in swap.iterdir()}

    before = look()
    assert holder_of(swap) == os.getpid()
    assert look() == before
