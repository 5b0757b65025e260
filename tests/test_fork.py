"""Forked children, above all data-loader workers, touch neither lock nor directory nor arenas, and the parent goes on."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.quiet import assert_quiet, tensor_of
from tierstore import TierStore
from tierstore.errors import BusyError, ForkedError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

GPU, RAM = 1 << 20, 4 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TierStore]:
    with TierStore(gpu=GPU, ram=RAM, nvme=tmp_path / "swap", device="cpu") as store:
        for number in range(6):
            store.put(f"b{number}", torch.full((50_000,), float(number)))
        store.commit()
        yield store


def in_child(work: Callable[[], object]) -> int:
    """Run it in a forked child, which ends without clean-up. Returns the exit status; a signal counts negative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            torch.set_num_threads(1)  # torch's own pool of threads does not survive a fork; data-loader workers do the same
            work()
            code = 0
        except BaseException as error:
            sys.__stderr__.write(f"in the child: {error!r}\n")  # type: ignore[union-attr]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def everything(store: TierStore) -> list[Callable[[], Any]]:
    return [
        lambda: store.put("new", torch.ones(1)),
        lambda: store.use("b0"),
        lambda: store.prefetch("b0"),
        lambda: store.read("b0"),
        lambda: store.write("b0", torch.zeros(3)),
        lambda: store.hold("b0", "ram"),
        lambda: store.unhold("b0"),
        lambda: store.evict("b0"),
        lambda: store.delete("b0"),
        store.commit,
        lambda: store.commit(wait=False),
        store.flush,
        lambda: store.info("b0"),
        store.stats,
        lambda: store.trace,
        lambda: store.timeline,
        lambda: store.committed,
        lambda: len(store),
        lambda: list(store),
        lambda: "b0" in store,
    ]


def still_works(store: TierStore) -> None:
    with store.use("b0", "b5", write="b0") as (zero, five):
        zero.add_(1)
        assert five[0] == 5
    store.commit()
    assert_quiet(store)


def test_every_call_in_a_child_says_what_is_wrong(store: TierStore) -> None:
    entered_late = store.use("b1")

    def child() -> None:
        for call in [*everything(store), entered_late.__enter__]:
            try:
                call()
            except ForkedError as error:
                assert error.remedy  # noqa: PT017
            else:
                raise AssertionError("it did something")
        store.close()  # nothing, and no complaint
        store.close()

    for _ in range(3):
        assert in_child(child) == 0
        still_works(store)


def test_a_fork_inside_a_lease_and_while_others_are_busy(store: TierStore) -> None:
    """The child inherits locks that no thread of its own will ever release."""
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            with store.use("b2", write=True) as block:
                block.add_(0)
            store.read("b3")
            store.evict("b2")

    def child() -> None:
        with pytest.raises(ForkedError):
            store.read("b0")

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            with store.use("b4", write=True) as block:
                status = in_child(child)
                block.fill_(9)
            assert status == 0

            lease = store.use("b5")
            lease.__enter__()
            assert in_child(functools.partial(lease.__exit__, None, None, None)) == 0
            lease.__exit__(None, None, None)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert tensor_of(store, "b4")[0] == 9
    still_works(store)


class Numbers(Dataset[torch.Tensor]):
    def __init__(self, store: TierStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        try:
            self.store.read("b0")
        except ForkedError:
            return torch.tensor([index])
        return torch.tensor([-1])


def test_data_loader_workers(store: TierStore) -> None:
    seen = []
    with store.use("b0"):  # also in the middle of a lease
        loader = DataLoader(Numbers(store), batch_size=4, num_workers=2, multiprocessing_context="fork")
        for batch in loader:
            seen += batch.flatten().tolist()
            with store.use("b1", write=True) as block:
                block.add_(1)
    assert sorted(seen) == list(range(24))
    assert tensor_of(store, "b1")[0] == 7
    del loader
    still_works(store)


def test_the_lock_stays_with_the_parent(store: TierStore, tmp_path: Path) -> None:
    def child() -> None:
        with pytest.raises(BusyError):
            TierStore(gpu=GPU, ram=RAM, nvme=tmp_path / "swap", device="cpu")
        store.close()

    assert in_child(child) == 0
    with pytest.raises(BusyError):
        TierStore(gpu=GPU, ram=RAM, nvme=tmp_path / "swap", device="cpu")
    still_works(store)


def test_a_child_may_open_a_store_of_its_own(store: TierStore, tmp_path: Path) -> None:
    def child() -> None:
        with TierStore(gpu=GPU, ram=RAM, nvme=tmp_path / "other", device="cpu") as own:
            own.put("a", torch.ones(5))
            with own.use("a", write=True) as a:
                a.add_(1)
            assert own.commit() == 1

    assert in_child(child) == 0
    with TierStore(gpu=GPU, ram=RAM, nvme=tmp_path / "other", device="cpu") as other:
        assert tensor_of(other, "a").sum() == 10
    still_works(store)


PARENT = """
import os, sys, time
import torch
from tierstore import TierStore
store = TierStore(gpu=1 << 20, ram=4 << 20, nvme=sys.argv[1], device="cpu")
store.put("a", torch.ones(100))
store.commit()
pid = os.fork()
if pid == 0:
    if sys.argv[2] == "exits":
        sys.exit(0)  # with all that an interpreter does at its end
    os.close(1)
    os.close(2)
    time.sleep(60)
    os._exit(0)
if sys.argv[2] == "exits":
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    store.commit()
    store.close()
else:
    print(pid, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    store.close()
"""


@pytest.mark.parametrize("how", ["killed", "closed", "exits"])
def test_the_lock_is_free_when_the_parent_has_gone_even_if_a_child_lives(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARENT, str(tmp_path / "swap"), how],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=60,
        check=False,
    )
    assert done.stdout, done.stderr
    number = int(done.stdout.split()[0])
    if how == "exits":
        assert (done.returncode, number) == (0, 0), done.stderr
    try:
        if how != "exits":
            os.kill(number, 0)  # the child lives
        deadline = time.monotonic() + 10
        while True:
            try:
                with TierStore(gpu=GPU, ram=RAM, nvme=tmp_path / "swap", device="cpu") as store:
                    assert torch.equal(tensor_of(store, "a"), torch.ones(100))
                break
            except BusyError:
                if time.monotonic() > deadline:
                    raise
    finally:
        if how != "exits":
            os.kill(number, signal.SIGKILL)
