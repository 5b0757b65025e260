"""Commits: a consistent state that a new store resumes from, whatever goes on meanwhile and however the process ends."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nvme.common import kept
from tests.quiet import assert_quiet, assert_same, disk_bytes, values
from tierstore import CommitHandle, TierStore
from tierstore.errors import BlockNotFoundError, DirectoryError, LeaseError, NoDirectoryError
from tierstore.nvme import local

PAGE = 4096


def page(value: float) -> torch.Tensor:
    return torch.full((PAGE // 8,), value, dtype=torch.float64)


def open_store(path: Path, **options: Any) -> TierStore:
    return TierStore(**{"gpu": 8 * PAGE, "ram": 24 * PAGE, "nvme": path / "swap", "device": "cpu", **options})


def read(store: TierStore, name: str) -> float:
    value = store.read(name)
    assert isinstance(value, torch.Tensor)
    assert value.min() == value.max()
    return float(value[0])


def fill(store: TierStore, value: float, num_blocks: int = 20) -> None:
    for number in range(num_blocks):
        name = f"b{number}"
        if name not in store:
            store.put(name, page(value))
        else:
            with store.use(name, write=True) as block:
                block.fill_(value)


def test_a_new_store_resumes_from_the_commit(tmp_path: Path) -> None:
    metadata = {"step": 7, "rates": [0.1, 1e-300], "nested": {"é": None, "on": True}, "big": 2**70}
    with open_store(tmp_path) as store:
        assert store.committed is None
        fill(store, 1)
        store.put("mapping", {"w": torch.randn(3, 4), "s": torch.tensor(5)}, frozen=True)
        assert store.commit(metadata) == 1
        before = values(store)
        fill(store, 2)  # never committed
        store.put("late", page(3))
    with open_store(tmp_path) as store:
        assert store.committed is not None
        assert store.committed.generation == 1
        assert store.committed.metadata == metadata
        assert "late" not in store
        assert_same(before, values(store))
        assert store.info("mapping").frozen
        assert not store.info("b0").dirty
        assert store.info("b0").tiers == ("nvme",)
        fill(store, 4)
        store.delete("b3")
        assert store.commit() == 2
    with open_store(tmp_path) as store:
        assert store.committed is not None
        assert store.committed.metadata is None
        assert "b3" not in store
        assert read(store, "b4") == 4
        assert store.commit(["again"]) == 3
        assert_quiet(store)


def test_metadata_is_that_of_the_call(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store, 1)
        metadata = {"step": 1}
        handle = store.commit(metadata, wait=False)
        metadata["step"] = 2
        assert isinstance(handle, CommitHandle)
        handle.result()
        assert store.committed is not None
        assert store.committed.metadata == {"step": 1}


def test_older_generations_can_be_opened(tmp_path: Path) -> None:
    for step in range(1, 6):
        with open_store(tmp_path, keep=2) as store:
            fill(store, step, num_blocks=5)
            assert store.commit(step) == step
    for generation in (4, 5):  # where directories cannot be synced, 3 is there too
        with open_store(tmp_path, keep=2, generation=generation) as store:
            assert store.committed is not None
            assert store.committed.metadata == generation
            assert read(store, "b2") == generation
    with pytest.raises(DirectoryError):
        open_store(tmp_path, keep=2, generation=5 - kept(2))
    with open_store(tmp_path, keep=2, generation=4) as store:  # going on from an older one
        fill(store, 40, num_blocks=5)
        assert store.commit("branch") == 6
    with open_store(tmp_path) as store:
        assert read(store, "b1") == 40
        for _ in range(kept()):
            store.commit()
        assert_quiet(store)
    with pytest.raises(DirectoryError):
        open_store(tmp_path, generation=6)


def test_the_state_is_that_of_the_call_while_writers_go_on(tmp_path: Path) -> None:
    """Each writer moves a unit between two blocks; every commit holds all units, and of each pair the same step."""
    num_pairs = 6
    with open_store(tmp_path, keep=50) as store:
        for pair in range(num_pairs):
            store.put(f"left {pair}", page(0))
            store.put(f"right {pair}", page(0))
        stop, failures, steps = threading.Event(), [], [0] * num_pairs

        def work(pair: int) -> None:
            try:
                while not stop.is_set():
                    with store.use(f"left {pair}", f"right {pair}", write=True) as (left, right):
                        left.add_(1)
                        right.sub_(1)
                        steps[pair] += 1
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(pair,)) for pair in range(num_pairs)]
        for thread in threads:
            thread.start()
        handles = []
        for _ in range(12):
            time.sleep(0.03)
            lower = list(steps)
            handle = store.commit(lower, wait=False)
            assert isinstance(handle, CommitHandle)
            handles.append((handle, lower))
        generations = [handle.result(30) for handle, _ in handles]
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not failures
        assert generations == sorted(generations)
        assert_quiet(store)
    previous = [0.0] * num_pairs
    for generation in generations:
        with open_store(tmp_path, keep=50, generation=generation) as store:
            assert store.committed is not None
            lower = store.committed.metadata
            for pair in range(num_pairs):
                left = read(store, f"left {pair}")
                assert left == -read(store, f"right {pair}")
                assert left >= lower[pair]
                assert left >= previous[pair]
                previous[pair] = left


def test_what_is_written_after_the_call_is_not_in_it(tmp_path: Path) -> None:
    with open_store(tmp_path, keep=30) as store:
        fill(store, 0)
        for step in range(1, 16):
            fill(store, step)
            handle = store.commit(step, wait=False)
            for number in range(20):
                with store.use(f"b{number}", write=True) as block:
                    block.fill_(-step)
            store.write("b0", page(-step))
            store.put(f"new {step}", page(step))
            assert isinstance(handle, CommitHandle)
            assert handle.result() == step
    for step in range(1, 16):
        with open_store(tmp_path, keep=30, generation=step) as store:
            assert all(read(store, f"b{number}") == step for number in range(20))
            assert f"new {step}" not in store
            assert step == 1 or f"new {step - 1}" in store


def test_a_deleted_block_stays_in_the_commit_that_has_it(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store, 5)
        store.commit()
        for number in range(10):
            store.delete(f"b{number}")
            with pytest.raises(BlockNotFoundError):
                store.read(f"b{number}")
        fill(store, 6)  # makes them anew
        store.flush()
    with open_store(tmp_path) as store:
        assert [read(store, f"b{number}") for number in range(20)] == [5] * 20


def test_a_commit_inside_ones_own_write_lease_raises(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store, 1)
        for wait in (True, False):
            with store.use("b0", write=True), pytest.raises(LeaseError) as caught:
                store.commit(wait=wait)
            assert caught.value.remedy
        with store.use("b0"):
            assert store.commit() == 1
        assert_quiet(store)


def test_without_a_directory_there_is_no_commit() -> None:
    with TierStore(gpu=8 * PAGE, ram=24 * PAGE, device="cpu") as store:
        store.put("a", page(1))
        with pytest.raises(NoDirectoryError, match="nvme=") as caught:
            store.commit()
        assert caught.value.remedy


def test_closing_says_what_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        found = [
            record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and record.name.startswith("tierstore")
        ]
        found = [message for message in found if "direct I/O is not available" not in message]
        caplog.clear()
        return found

    with open_store(tmp_path) as store:
        fill(store, 1)
    (warning,) = warnings()
    assert "20 block" in warning
    with open_store(tmp_path) as store:
        assert len(store) == 0
    assert not warnings()
    with open_store(tmp_path) as store:
        fill(store, 1)
        store.commit()
        with store.use("b1"):
            pass
        store.evict("b2")
    assert not warnings()
    with open_store(tmp_path) as store:
        with store.use("b1", "b2", write="b1"):
            pass
        store.write("b3", page(2))
        store.delete("b4")
        store.put("new", page(1))
        store.put("gone", page(1))
        store.delete("gone")
    (warning,) = warnings()
    assert "4 block" in warning
    with open_store(tmp_path) as store:
        assert len(store) == 20
        assert read(store, "b3") == 1


def test_nothing_is_left_behind_over_many_commits(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        sizes = []
        for step in range(30):
            fill(store, step)
            store.commit(step)
            sizes.append(disk_bytes(tmp_path / "swap"))
        settled = kept() + 2
        assert max(sizes[settled:]) <= sizes[settled - 1] + 4 * PAGE
        assert_quiet(store)
    files = os.listdir(tmp_path / "swap")
    assert len([name for name in files if name.endswith(".safetensors")]) == 20 * kept()
    assert len(files) <= 20 * kept() + 3 + kept()


def test_blocks_stay_in_the_order_in_which_they_were_put(tmp_path: Path) -> None:
    """From commit to commit, and over reopening: an export lists tensors in this order."""
    names = [f"b{number}" for number in range(20)]
    with open_store(tmp_path) as store:
        fill(store, 1.0)
        store.commit()
        for name in names[::3]:
            store.write(name, page(2.0))
        store.commit()
        assert list(store) == names
    with open_store(tmp_path) as store:
        assert list(store) == names


def test_commits_from_several_threads(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        fill(store, 1)
        generations: list[int] = []

        def commit() -> None:
            for _ in range(5):
                generation = store.commit()
                assert isinstance(generation, int)
                generations.append(generation)
                with store.use("b0", write=True) as block:
                    block.add_(1)

        threads = [threading.Thread(target=commit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(generations) == list(range(1, 21))
        assert_quiet(store)


TRAINING = """
import os, sys
import torch
from tierstore import TierStore

PAGE = 4096

def train(path, keep):
    with TierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=path, device="cpu", keep=keep) as store:
        step = 0
        if store.committed is None:
            for number in range(20):
                store.put(f"b{number}", torch.zeros(PAGE // 8, dtype=torch.float64))
        else:
            step = store.committed.metadata["step"]
        print("ready", step, flush=True)
        while True:
            step += 1
            for number in range(20):
                with store.use(f"b{number}", write=True) as block:
                    block.fill_(step * 100 + number)
            handle = store.commit({"step": step}, wait=step % 3 != 0)
            print("committed", step if isinstance(handle, int) else 0, flush=True)

# Importing torch takes seconds: do it once, and fork what is to be killed before there is any thread.
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            train(sys.argv[1], int(line))
        finally:
            os._exit(1)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("\\nended", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no SIGKILL there")
def test_a_killed_process_leaves_a_complete_commit(tmp_path: Path) -> None:
    """What survives is never older than the last commit that was waited for, and never a mixture."""
    chance = random.Random(3)
    nursery = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "swap")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    steps = [0]
    with nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for attempt in range(60):
            if attempt >= 12 and steps[-1] > 10:  # a slow machine needs more lives to come so far
                break
            keep = 1 + attempt % 2
            nursery.stdin.write(f"{keep}\n")
            nursery.stdin.flush()
            promised, pid = steps[-1], 0
            for line in iter(nursery.stdout.readline, "ended\n"):
                words = line.split()
                if words[:1] == ["ready"]:
                    assert int(words[1]) == steps[-1]
                    threading.Timer(chance.uniform(0.02, 0.4), os.kill, [pid, signal.SIGKILL]).start()
                elif words[:1] == ["committed"] and line.endswith("\n") and len(words) == 2:
                    promised = max(promised, int(words[1]))
                elif line.strip().isdigit():
                    pid = int(line)
            with open_store(tmp_path, keep=keep) as store:
                if store.committed is None:
                    assert promised == 0
                    continue
                step = store.committed.metadata["step"]
                assert step >= promised, "a commit that was promised is gone"
                assert [read(store, f"b{number}") for number in range(20)] == [step * 100 + number for number in range(20)]
                assert_quiet(store)
                steps.append(step)
        nursery.stdin.close()
    assert steps[-1] > 10


FORGETFUL = """
import sys, torch
from tierstore import TierStore
store = TierStore(gpu=32768, ram=98304, nvme=sys.argv[1], device="cpu")
for number in range(20):
    store.put(f"b{number}", torch.full((512,), float(number), dtype=torch.float64))
store.commit("here", wait=False)
store.put("late", torch.zeros(512, dtype=torch.float64))
"""


def test_a_program_that_forgets_to_close(tmp_path: Path) -> None:
    """The commit under way was lost without a word: the interpreter took its threads away."""
    swap = tmp_path / "swap"
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, str(swap)], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    assert "with a store open" in done.stderr
    assert "Traceback" not in done.stderr
    with open_store(tmp_path) as store:
        assert store.committed is not None
        assert store.committed.metadata == "here"
        assert [read(store, f"b{number}") for number in range(20)] == list(range(20))
        assert "late" not in store


def test_what_stores_and_handles_look_like(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with store:
        fill(store, 1, num_blocks=3)
        assert repr(store) == f"<TierStore: 3 blocks in {tmp_path / 'swap'}>"
        handle = store.commit(wait=False)
        assert isinstance(handle, CommitHandle)
        handle.result()
        assert repr(handle) == "<CommitHandle: generation 1>"
    assert repr(store) == "<TierStore: not open>"


class SlowWrites:
    """The drive: while closed, writes into shards of the blocks that are named wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *blocks: str) -> None:
        self.open = threading.Event()
        self._blocks = [f"block-{block}-" for block in blocks]
        self._write = local._PWRITEV
        monkeypatch.setattr(local, "_PWRITEV", self)

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if any(block in os.readlink(f"/proc/self/fd/{descriptor}") for block in self._blocks):
            assert self.open.wait(60)
        count: int = self._write(descriptor, buffers, offset)
        return count


@pytest.mark.native_files
def test_two_commits_in_flight_when_the_store_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second had been accepted, and close() refused it: it waited for the first to be saved before its instant came."""
    with open_store(tmp_path) as store:
        store.put("a", page(1))
        store.put("b", page(1))
        store.commit(0)
        slow = SlowWrites(monkeypatch, "a", "b")
        store.write("a", page(2))
        first = store.commit(1, wait=False)
        store.write("b", page(2))
        second = store.commit(2, wait=False)
        threading.Timer(0.2, slow.open.set).start()
    assert isinstance(first, CommitHandle)
    assert isinstance(second, CommitHandle)
    assert (first.result(), second.result()) == (2, 3)
    with open_store(tmp_path) as store:
        assert store.committed is not None
        assert store.committed.metadata == 2
        assert read(store, "a") == read(store, "b") == 2


@pytest.mark.native_files
def test_what_is_put_behind_commits_is_not_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path, keep=5) as store:
        store.put("a", page(1))
        store.commit(0)
        slow = SlowWrites(monkeypatch, "a")
        store.write("a", page(2))
        handles = [store.commit(number, wait=False) for number in (1, 2, 3)]
        store.put("later", page(3))
        slow.open.set()
        for handle in handles:
            assert isinstance(handle, CommitHandle)
            handle.result()
        store.commit("all")
    for generation, names in ((2, ["a"]), (3, ["a"]), (4, ["a"]), (5, ["a", "later"])):
        with open_store(tmp_path, keep=5, generation=generation) as store:
            assert list(store) == names
            assert read(store, "a") == 2


def test_what_a_commit_takes_hold_of_is_taken_on_the_loop_also_when_it_begins_while_another_thread_waits_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps of the loop, one that has replaced a shard and not yet booked it, a block was left out of the generation."""
    with TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
        engine = store.engine
        took: list[threading.Thread] = []
        done = threading.Event()

        def capture() -> None:
            if engine.captures:
                took.append(threading.current_thread())
                done.set()

        monkeypatch.setattr(engine, "_capture", capture)
        beside = threading.Thread(target=engine._attend)
        with engine.lock:
            beside.start()
            time.sleep(0.1)  # it waits for the lock by now; where it does not, nothing is shown
            engine.captures.append(object())  # type: ignore[arg-type]
        beside.join()
        engine.wake()
        assert done.wait(10)
        engine.captures.clear()
        monkeypatch.undo()
        assert set(took) == {engine._thread}
