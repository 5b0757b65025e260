"""What once went wrong, each at the moment that brought it out: it must not come back."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quiet import assert_quiet, tensor_of
from tierstore import AsyncTierStore, CommitHandle, TierStore
from tierstore.arena import pack
from tierstore.catalog import Block, BlockId
from tierstore.errors import BusyError, CapacityError, DirectoryError, OptionError, TierstoreError
from tierstore.mover.calls import Ticket
from tierstore.mover.engine import Engine
from tierstore.nvme.directory import Directory
from tierstore.nvme.shards import Shard
from tierstore.policies import Lookahead, View
from tierstore.requests import Lease, Record
from tierstore.residency import Tier

PAGE = 4096
MB = 1 << 20
PATIENCE_S = 10.0
"""A lease that takes longer hangs."""

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one thread there")


def page(value: float, pages: int = 1) -> torch.Tensor:
    return torch.full((pages * PAGE // 4,), value)


def open_small(path: Path, *, gpu: int = 8, ram: int = 24, policy: Any = "lookahead") -> TierStore:
    """A store of so many pages on each memory tier."""
    return TierStore(gpu=gpu * PAGE, ram=ram * PAGE, nvme=path / "swap", device="cpu", policy=policy)


def ends(call: Callable[[], object], within_s: float = PATIENCE_S) -> bool:
    """Whether a call that knows no timeout ends; if not, its thread is left behind."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(within_s)
    return not thread.is_alive()


def wait_until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never comes to that"
        time.sleep(0.001)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# -- Ctrl-C ---------------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[TierStore], object]] = {
    "prefetch": lambda store: store.prefetch("b"),
    "use": lambda store: store.use("b", timeout=PATIENCE_S).__enter__(),
    "read": lambda store: store.read("b"),
    "put": lambda store: store.put("new", page(3)),
    "commit": lambda store: store.commit(),
    "commit later": lambda store: store.commit(wait=False),
}


@needs_signals
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_while_waking_the_engine_leaves_it_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: bool) -> None:
    """The flag that says "woken already" must not stay up when the wake-up itself is struck: nobody would be served again."""
    with open_small(tmp_path) as store:
        for number, block in enumerate("ab"):
            store.put(block, page(number))
        store.evict("b")
        assert_quiet(store)
        loop = store.engine.loop
        original = loop.call_soon_threadsafe
        struck: list[bool] = []

        def strike(callback: Any, *arguments: Any, **options: Any) -> asyncio.Handle:
            first = in_main_thread() and not struck
            struck.extend([True] if first else [])
            if first and not after:
                signal.raise_signal(signal.SIGINT)
            handle = original(callback, *arguments, **options)
            if first and after:
                signal.raise_signal(signal.SIGINT)
            return handle

        with monkeypatch.context() as patch:
            patch.setattr(loop, "call_soon_threadsafe", strike)
            with pytest.raises(KeyboardInterrupt):
                CALLS[name](store)
        assert struck
        gc.collect()  # the context of a `use` that was struck
        with store.use("b", write=True, timeout=PATIENCE_S) as tensor:
            assert (tensor == 1).all()
        with store.use("a", timeout=PATIENCE_S) as tensor:
            assert (tensor == 0).all()
        assert_quiet(store)


@needs_signals
@pytest.mark.parametrize("how", ["end_use", "abandon"])
def test_ctrl_c_while_a_lease_ends_wakes_who_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A Ctrl-C noted under the lock is raised on leaving it: what comes after the lock may never run, the waking must."""
    got = threading.Event()
    failed: list[TierstoreError] = []

    def wait_for_it() -> None:
        try:
            with store.use("a", write=True, timeout=PATIENCE_S):
                got.set()
        except TierstoreError as error:
            failed.append(error)

    with open_small(tmp_path) as store:
        store.put("a", page(1))
        with store.use("a", timeout=PATIENCE_S):
            pass
        assert_quiet(store)
        engine, waiter = store.engine, threading.Thread(target=wait_for_it)
        release, tensors = engine.scheduler.release, engine.tensors

        def start_waiter() -> None:
            waiter.start()
            wait_until(lambda: engine.scheduler.waiting)

        def strike(lease: Lease) -> None:
            release(lease)
            if in_main_thread():
                signal.raise_signal(signal.SIGINT)

        def fail(ticket: Ticket, *, plain: bool) -> dict[Record, tuple[torch.Tensor, ...]]:
            if in_main_thread():
                start_waiter()
                raise ValueError("the lease was granted, and its tensors cannot be handed out")
            return tensors(ticket, plain=plain)

        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "release", strike)
            if how == "abandon":
                patch.setattr(engine, "tensors", fail)
            with pytest.raises(KeyboardInterrupt), store.use("a", write=True, timeout=PATIENCE_S):
                start_waiter()
        waiter.join(2 * PATIENCE_S)
        assert got.is_set(), failed
        assert_quiet(store)


@needs_signals
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_second_close_after_an_interrupted_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """However often Ctrl-C struck the first: the second does not hang, and the directory is free in the same process."""
    store: TierStore | None = open_small(tmp_path)
    assert store is not None
    store.put("a", page(1))
    store.commit()
    engine = store.engine
    wait = engine.runtime.wait

    def strike(future: Future[None], timeout: float | None = None) -> None:
        if future is engine.ended:
            signal.raise_signal(signal.SIGINT)
        wait(future, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runtime, "wait", strike)
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                store.close()
    assert ends(store.close), "the second close() hangs"
    assert ends(store.close), "the third close() hangs"
    busy: str | None = None
    try:
        with reopened(tmp_path, within_s=2) as again:
            assert (tensor_of(again, "a") == 1).all()
    except BusyError as error:
        busy = str(error)
    store = None
    gc.collect()  # a coroutine that was left unfinished complains here, and not in another test
    assert busy is None


def reopened(path: Path, within_s: float = 5.0) -> TierStore:
    """The directory again, as soon as it is free."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return open_small(path)
        except BusyError:
            if time.monotonic() > deadline:
                raise
        gc.collect()
        time.sleep(0.02)


# -- commits that nobody waits for ------------------------------------------------------------------------------------------


def test_leaving_the_store_finishes_a_commit_under_way(tmp_path: Path) -> None:
    with TierStore(gpu=4 * MB, ram=24 * MB, nvme=tmp_path / "swap", device="cpu") as store:
        for number in range(10):
            store.put(f"b{number}", torch.full((MB // 4,), float(number)))
        handle = store.commit({"step": 1}, wait=False)
        assert isinstance(handle, CommitHandle)
    assert handle.result(timeout=0) == 1
    with TierStore(gpu=4 * MB, ram=24 * MB, nvme=tmp_path / "swap", device="cpu") as store:
        assert store.committed is not None
        assert store.committed.metadata == {"step": 1}
        assert sorted(store) == sorted(f"b{number}" for number in range(10))
        for number in range(10):
            assert (tensor_of(store, f"b{number}") == number).all()


def test_a_commit_that_waits_for_a_writer_holds_one_instant(tmp_path: Path) -> None:
    """A lease of another thread puts off the moment at which the state can be taken: all is in that was there then."""
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store.use("a", write=True, timeout=PATIENCE_S) as tensor:
            tensor.fill_(2)
            held.set()
            leave.wait(3 * PATIENCE_S)

    def change() -> None:
        with store.use("b", write=True, timeout=2 * PATIENCE_S) as tensor:
            tensor.fill_(7)

    with open_small(tmp_path) as store:
        for block in "abc":
            store.put(block, page(1))
        holder, changer = threading.Thread(target=hold), threading.Thread(target=change)
        holder.start()
        assert held.wait(PATIENCE_S)
        handle = store.commit({"step": 1}, wait=False)
        assert isinstance(handle, CommitHandle)
        for tier in ("ram", "gpu", "nvme"):
            store.put(f"late on {tier}", page(5), tier=tier)
        changer.start()
        leave.set()
        holder.join()
        assert handle.result(PATIENCE_S) == 1
        changer.join()
        assert (tensor_of(store, "b") == 7).all()
        assert_quiet(store)
    with open_small(tmp_path) as store:
        late = [f"late on {tier}" for tier in ("gpu", "nvme", "ram")]
        assert sorted(store) == ["a", "b", "c", *late]
        assert [tensor_of(store, block)[0].item() for block in "abc"] == [2, 1, 1]
        assert [tensor_of(store, block)[0].item() for block in late] == [5, 5, 5]


def test_a_writer_waits_for_its_own_blocks_of_a_commit_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive takes its time for each block: whoever wants to write the last one must not queue behind all the others."""
    write, count = Directory.write, 60

    async def slowly(self: Directory, block: Block, source: memoryview, replaces: Shard | None = None) -> Shard:
        await asyncio.sleep(0.02)
        return await write(self, block, source, replaces)

    with TierStore(gpu=8 * PAGE, ram=8 * MB, nvme=tmp_path / "swap", device="cpu") as store:
        for number in range(count):
            store.put(f"b{number}", page(number))
        monkeypatch.setattr(Directory, "write", slowly)
        engine = store.engine
        handle = store.commit({"step": 1}, wait=False)
        assert isinstance(handle, CommitHandle)
        for number in (count - 1, count // 2):
            with store.use(f"b{number}", write=True, timeout=PATIENCE_S) as tensor:
                with engine.lock:
                    pending = [len(capture.request.pending) for capture in engine.captures]
                tensor.fill_(-1)
            assert pending, "the commit ended before the lease was granted"
            assert pending[0] > count // 3, f"only {pending[0]} of {count} blocks were left to save"
        assert handle.result(PATIENCE_S) == 1
    with TierStore(gpu=8 * PAGE, ram=8 * MB, nvme=tmp_path / "swap", device="cpu") as store:
        for number in range(count):
            assert (tensor_of(store, f"b{number}") == number).all()


# -- many blocks --------------------------------------------------------------------------------------------------------------

MANY = 1150
"""More than Python's limit of recursion."""


def test_a_lease_of_many_blocks_beside_another() -> None:
    with TierStore(gpu=(MANY + 8) * PAGE, ram=3 * MANY * PAGE, device="cpu") as store:
        for number in range(MANY):
            store.put(f"b{number}", torch.full((1,), float(number)))
        store.put("x", torch.zeros(1))
        with store.use("x", timeout=PATIENCE_S), store.use(*(f"b{number}" for number in range(MANY)), timeout=PATIENCE_S) as tensors:
            assert torch.cat(tensors).tolist() == list(range(MANY))


def test_a_lease_beside_another_with_many_blocks_held() -> None:
    with TierStore(gpu=(MANY + 8) * PAGE, ram=3 * MANY * PAGE, device="cpu") as store:
        for number in range(MANY):
            store.put(f"b{number}", torch.zeros(1))
            store.hold(f"b{number}", "gpu")
        store.put("x", torch.zeros(1))
        store.put("y", torch.zeros(1))
        with store.use("x", timeout=PATIENCE_S), store.use("y", timeout=PATIENCE_S) as tensor:
            assert tensor.tolist() == [0]


@st.composite
def cut_gaps(draw: st.DrawFn) -> list[list[int]]:
    """Up to eight gaps, cut into forty pieces in all at most."""
    number = draw(st.integers(1, 8))
    most = draw(st.sampled_from([3, 40, 10_000]))
    return [draw(st.lists(st.integers(1, most), min_size=1, max_size=40 // number)) for _ in range(number)]


@given(gaps=cut_gaps(), slack=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=200)
def test_pieces_cut_from_gaps_can_be_packed_into_them(gaps: list[list[int]], slack: int, seed: int) -> None:
    sizes = [size for pieces in gaps for size in pieces]
    random.Random(seed).shuffle(sizes)
    assert pack([sum(pieces) + slack for pieces in gaps], sizes)


def test_tight_packings_are_found_whatever_they_cost() -> None:
    chance = random.Random(0)
    for _ in range(40):
        gaps = [[chance.randint(1, 40) for _ in range(5)] for _ in range(8)]
        assert pack([sum(pieces) for pieces in gaps], [size for pieces in gaps for size in pieces])


# -- policies that are wrong --------------------------------------------------------------------------------------------------

METHODS = ("bind", "accessed", "touched", "admitted", "removed", "victims", "next_use", "expected", "epoch")
ANSWERS: dict[str, tuple[object, ...]] = {
    "victims": (None, [None], [[]]),
    "next_use": (None, "soon", math.nan),
    "expected": (None, "b0", [], -1),
    "epoch": (None, []),
}


class Wrong(Lookahead):
    """Right for the first calls of one method, and wrong from then on.

    Args:
        method: Which of the protocol.
        good: How many calls go well.
        answer: What it says afterwards; an exception is raised.
    """

    def __init__(self, method: str, good: int, answer: object) -> None:
        super().__init__()
        self.method = method
        self.good = good
        self.answer = answer
        self.wrongs = 0

    def _ask(self, method: str, right: Callable[[], Any]) -> Any:
        if method != self.method or self.good > 0:
            self.good -= method == self.method
            return right()
        self.wrongs += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def bind(self, view: View) -> None:
        self._ask("bind", lambda: Lookahead.bind(self, view))

    def accessed(self, block: BlockId, write: bool) -> None:
        self._ask("accessed", lambda: Lookahead.accessed(self, block, write))

    def touched(self, block: BlockId, tier: Tier) -> None:
        self._ask("touched", lambda: Lookahead.touched(self, block, tier))

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self._ask("admitted", lambda: Lookahead.admitted(self, block, tier))

    def removed(self, block: BlockId, tier: Tier) -> None:
        self._ask("removed", lambda: Lookahead.removed(self, block, tier))

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        victims: Iterator[BlockId] = self._ask("victims", lambda: Lookahead.victims(self, tier))
        return victims

    def next_use(self, block: BlockId) -> float:
        position: float = self._ask("next_use", lambda: Lookahead.next_use(self, block))
        return position

    def expected(self, position: int) -> BlockId | None:
        block: BlockId | None = self._ask("expected", lambda: Lookahead.expected(self, position))
        return block

    @property
    def epoch(self) -> int:
        epoch: int = self._ask("epoch", lambda: Lookahead.epoch.fget(self))  # type: ignore[attr-defined]
        return epoch


def test_nothing_is_measured_for_a_policy_that_has_failed() -> None:
    """Each mark costs a lease a little, and nobody would ever say that they are not wanted any more."""
    with TierStore(gpu="1MB", ram="4MB", device="cpu", policy=Wrong("accessed", 30, RuntimeError())) as store:
        pace = store.engine.placement.pace
        for number in range(8):
            store.put(f"b{number}", torch.zeros(60_000))
        measured = []
        for number in range(48):
            with store.use(f"b{number % 8}"):
                measured.append(pace.measuring)
    assert measured[28]
    assert not any(measured[32:])


class Interrupted(Lookahead):
    """Names some victims, and raises before the end of the list."""

    def __init__(self) -> None:
        super().__init__()
        self.wrongs = 0

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        for number, block in enumerate(super().victims(tier)):
            if number == 1:
                self.wrongs += 1
                raise LookupError("lost count")
            yield block


def exercise(path: Path, policy: Lookahead) -> None:
    """Three times as much as the device takes, read and written in turn: every value must be right, and no lease may hang."""
    count, rounds = 12, 3
    store = open_small(path, policy=policy)
    try:
        for number in range(count):
            store.put(f"b{number}", page(0, pages=2))
        for turn in range(rounds):
            for number in range(count):
                with store.use(f"b{number}", f"b{(number * 5) % count}", write=f"b{number}", timeout=PATIENCE_S) as (tensor, _):
                    assert (tensor == turn).all(), (number, turn)
                    tensor.add_(1)
            store.prefetch("b3", "b4")
        store.delete("b0")
        store.evict("b1")
        store.commit(rounds)
        for number in range(1, count):
            assert (tensor_of(store, f"b{number}") == rounds).all()
        assert_quiet(store)
    except BaseException:
        with suppress(Exception):
            store.close()
        raise
    assert ends(store.close), "close() hangs"
    with open_small(path) as again:
        assert all((tensor_of(again, f"b{number}") == rounds).all() for number in range(1, count))


@pytest.mark.parametrize("good", [0, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_raises_costs_time_and_nothing_else(tmp_path: Path, method: str, good: int) -> None:
    policy = Wrong(method, 0 if method == "bind" else good, ValueError("my policy is broken"))
    exercise(tmp_path, policy)
    assert policy.wrongs, "it was never asked"


@pytest.mark.parametrize(("method", "number"), [(method, number) for method, answers in ANSWERS.items() for number in range(len(answers))])
def test_a_policy_that_talks_nonsense_costs_time_and_nothing_else(tmp_path: Path, method: str, number: int) -> None:
    policy = Wrong(method, 5, ANSWERS[method][number])
    exercise(tmp_path, policy)
    assert policy.wrongs, "it was never asked"


def test_a_policy_that_raises_in_the_middle_of_its_victims(tmp_path: Path) -> None:
    policy = Interrupted()
    exercise(tmp_path, policy)
    assert policy.wrongs, "it was never asked"


def test_one_policy_object_serves_one_store_only(tmp_path: Path) -> None:
    """It knows blocks by numbers that mean others in the next store."""
    policy = Lookahead()
    with open_small(tmp_path / "one", policy=policy) as store:
        store.put("a", page(1))
        with pytest.raises(OptionError, match="policy="):
            open_small(tmp_path / "two", policy=policy)
        with store.use("a", timeout=PATIENCE_S) as tensor:  # the refusal did it no harm
            assert (tensor == 1).all()
    with pytest.raises(OptionError, match="policy="):
        open_small(tmp_path / "one", policy=policy)
    for name in ("one", "two"):  # and the directories are free
        for again in (Lookahead(), Lookahead, "lookahead"):
            open_small(tmp_path / name, policy=again).close()


# -- autograd ----------------------------------------------------------------------------------------------------------------


def saved_for_backward(store: TierStore) -> tuple[torch.Tensor, torch.Tensor]:
    """(input, loss) of a product with block `b1`, which autograd saves; the lease has ended."""
    x = torch.ones(PAGE // 4, requires_grad=True)
    with store.use("b1", timeout=PATIENCE_S) as weight:
        loss = (x * weight).sum()
    return x, loss


def refill(store: TierStore) -> None:
    for number in range(2, 12):
        with store.use(f"b{number}", timeout=PATIENCE_S):
            pass


def change(store: TierStore) -> None:
    with store.use("b1", write=True, timeout=PATIENCE_S) as weight:
        weight.add_(1)


def replace(store: TierStore) -> None:
    store.delete("b1")
    for number in range(8):
        store.put(f"new {number}", page(-1), tier="gpu")


def write_back_to_device(store: TierStore) -> None:
    """Values replaced from the host where the device has the only copy."""
    with store.use("b1", write=True, timeout=PATIENCE_S):
        pass
    store.write("b1", page(9))


@pytest.mark.parametrize("happens", [refill, change, replace, write_back_to_device], ids=lambda happens: happens.__name__)
def test_backward_through_a_block_that_is_gone_raises(happens: Callable[[TierStore], None]) -> None:
    with TierStore(gpu=8 * PAGE, ram=200 * PAGE, device="cpu") as store:
        for number in range(12):
            store.put(f"b{number}", page(number))
        x, loss = saved_for_backward(store)
        happens(store)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert x.grad is None
        assert_quiet(store)


def test_backward_inside_the_lease_gives_the_right_gradients() -> None:
    with TierStore(gpu=8 * PAGE, ram=200 * PAGE, device="cpu") as store:
        for number in range(12):
            store.put(f"b{number}", page(number))
        for turn in range(2):
            for number in range(12):
                x = torch.ones(PAGE // 4, requires_grad=True)
                with store.use(f"b{number}", timeout=PATIENCE_S) as weight:
                    hidden = x * weight
                    for other in range(3):  # others come and go meanwhile
                        with store.use(f"b{(number + other + turn) % 12}", timeout=PATIENCE_S):
                            pass
                    hidden.sum().backward()
                assert x.grad is not None
                assert (x.grad == number).all()


# -- what closing and dropping give back ---------------------------------------------------------------------------------------


def resident_bytes() -> int:
    gc.collect()
    nbytes: int = psutil.Process().memory_info().rss
    return nbytes


@pytest.mark.parametrize("with_drive", [True, False])
def test_close_gives_the_memory_back_though_the_store_is_referenced(tmp_path: Path, with_drive: bool) -> None:
    budgets = 160 * MB
    before = resident_bytes()
    store = TierStore(gpu=40 * MB, ram=120 * MB, nvme=tmp_path / "swap" if with_drive else None, device="cpu")
    store.put("a", torch.zeros(MB))
    use = store.use("a", timeout=PATIENCE_S)
    with use as tensor:
        del tensor
    opened = resident_bytes()
    assert opened - before > 0.8 * budgets, "the budgets are taken at once"
    store.close()
    closed = resident_bytes()
    assert opened - closed > 0.8 * budgets, f"only {(opened - closed) >> 20} of {budgets >> 20} MiB came back"
    assert "closed" not in repr(type(store))  # it lives until here


def test_a_store_dropped_without_close_frees_its_directory_and_its_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def leave_behind() -> None:
        store = open_small(tmp_path)
        store.put("a", page(1))
        store.commit(1)
        store.prefetch("a")
        with store.use("a", timeout=PATIENCE_S):
            pass

    threads = threading.active_count()
    with caplog.at_level(logging.CRITICAL, logger="tierstore"):
        for _ in range(3):
            leave_behind()
            gc.collect()
            with reopened(tmp_path) as store:
                assert (tensor_of(store, "a") == 1).all()
                store.delete("a")
                store.commit(0)
        wait_until(lambda: threading.active_count() <= threads)
    assert not caplog.records


def test_a_lease_outlives_the_name_of_its_store(tmp_path: Path) -> None:
    """A context of a lease is all that is left of the store: it must go on working, and so must leaving it."""
    store: TierStore | None = open_small(tmp_path)
    assert store is not None
    store.put("a", page(1))
    with store.use("a", timeout=PATIENCE_S) as tensor:
        store = None
        gc.collect()
        assert (tensor == 1).all()
    with reopened(tmp_path) as again:
        assert len(again) == 0


AT_EXIT = {
    "prefetching": """
store.commit()
store.prefetch(*names)
""",
    "in the middle of everything": """
import threading
store.commit(wait=False)
lease = store.use("b0", write=True, timeout=10)
lease.__enter__()
threading.Thread(target=lambda: store.use("b0", timeout=60).__enter__(), daemon=True).start()
store.prefetch(*names)
""",
}
OPEN_AT_EXIT = """
import sys
import torch
from tierstore import TierStore

store = TierStore(gpu=4 << 20, ram=16 << 20, nvme=sys.argv[1], device="cpu")
names = [f"b{number}" for number in range(24)]
for name in names:
    store.put(name, torch.zeros(1 << 18))
"""
ALARMING = ("Traceback", "Error", "Exception", "Fatal", "never awaited", "destroyed", "engine failed", "leaked")


def test_a_process_that_just_ends_with_an_open_store_ends_well(tmp_path: Path) -> None:
    def child(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OPEN_AT_EXIT + AT_EXIT[name], str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

    children = {name: child(name) for name in AT_EXIT}
    found: dict[str, tuple[object, str, str]] = {}
    for name, process in children.items():
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "\nit hangs, which is a Fatal Error"
        found[name] = (process.returncode, out, err)
    assert {name: result for name, result in found.items() if result[0] or result[1] or any(word in result[2] for word in ALARMING)} == {}


# -- put ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["ram", "gpu", "nvme"])
def test_a_cancelled_put_has_happened_or_not(tmp_path: Path, tier: str) -> None:
    """Cancelled after any number of the loop's steps. When the error arrives, all is over: nothing appears afterwards."""
    outcomes = {"put": 0, "cancelled": 0}

    async def scenario() -> None:
        value = torch.arange(MB // 4, dtype=torch.float32)
        chance = random.Random(1)
        async with AsyncTierStore(gpu=4 * MB, ram=8 * MB, nvme=tmp_path / "swap", device="cpu") as store:
            for turn in range(50):
                task = asyncio.create_task(store.put("x", value, tier=tier))
                for _ in range(turn % 10):
                    await asyncio.sleep(0)
                if turn >= 10:
                    await asyncio.sleep(chance.uniform(0, 0.003))
                task.cancel()
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        await task
                    outcomes["put"] += 1
                    assert "x" in store, "it returned, and there is no block"
                except asyncio.CancelledError:
                    outcomes["cancelled"] += 1
                there = "x" in store
                assert_quiet(store, within_s=0.5)
                await asyncio.sleep(0.002)
                assert ("x" in store) == there, "it went on after it had been cancelled"
                if not there:
                    async with asyncio.timeout(PATIENCE_S):
                        await store.put("x", value, tier=tier)
                found = await store.read("x")
                assert isinstance(found, torch.Tensor)
                assert torch.equal(found, value), "there in part"
                await store.delete("x")

    asyncio.run(scenario())
    assert outcomes["cancelled"] >= 5, outcomes


def test_a_tensor_in_any_layout_is_put_on_the_drive_by_value(tmp_path: Path) -> None:
    base = torch.arange(120_000, dtype=torch.float32).reshape(300, 400)
    layouts = {
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "expanded": base[:1].expand(50, 400),
        "permuted": base.reshape(30, 40, 100).permute(2, 0, 1),
        "bfloat16": base.bfloat16().t(),
        "bool": (base > 7).t(),
        "column": base[:, 3],
    }
    with TierStore(gpu=4 * MB, ram=2 * MB, nvme=tmp_path / "swap", device="cpu") as store:
        for name, tensor in layouts.items():
            source = {"a": tensor, "b": base[:7, :5].t(), "c": torch.tensor(3.0)}
            expected = {key: value.clone() for key, value in source.items()}
            store.put(name, source, tier="nvme")
            base.add_(1)  # the bytes were copied: a later change is none of the block
            found = store.read(name)
            assert isinstance(found, dict)
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                assert torch.equal(found[key], value), (name, key)


def test_a_transposed_tensor_takes_hardly_longer_than_a_contiguous_one(tmp_path: Path) -> None:
    """It goes through transfer space in many pieces; bringing it into order once per piece would be quadratic."""
    matrix = torch.randn(1800, 1800)
    with TierStore(gpu=16 * MB, ram=24 * MB, nvme=tmp_path / "swap", device="cpu", direct_io=False) as store:

        def seconds(tensor: torch.Tensor) -> float:
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                store.put("x", tensor, tier="nvme")
                taken.append(time.perf_counter() - start)
                assert torch.equal(tensor_of(store, "x"), tensor)
                store.delete("x")
            return min(taken)

        contiguous, transposed = seconds(matrix), seconds(matrix.t())
        assert transposed < 6 * contiguous, (contiguous, transposed)


def test_a_full_store_without_a_drive_says_what_would_help() -> None:
    with TierStore(gpu=8 * PAGE, ram=40 * PAGE, device="cpu") as store:
        with pytest.raises(CapacityError) as caught:
            for number in range(100):
                store.put(f"b{number}", page(number))
        assert number > 4
        assert caught.value.remedy is not None
        assert "ram=" in caught.value.remedy
        assert "nvme=" in caught.value.remedy
        assert f"b{number}" not in store
        for kept in range(number):
            with store.use(f"b{kept}", timeout=PATIENCE_S) as tensor:
                assert (tensor == kept).all()
        store.delete("b0")
        store.put("b0", page(5))
        assert_quiet(store)


# -- paths that cannot be -----------------------------------------------------------------------------------------------------


@contextmanager
def without_privileges(path: Path) -> Iterator[None]:
    """As a user who may read nothing below `path`; for root, who may read everything, as another user."""
    path.chmod(0o000)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(0o700)


def open_at(path: str | Path) -> None:
    TierStore(gpu=4 * PAGE, ram=16 * PAGE, nvme=path, device="cpu").close()


def test_paths_that_cannot_be_are_refused_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("something")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "file" / "below")
    for path in (
        "x" * 300,
        str(tmp_path / ("x" * 300) / "swap"),
        str(tmp_path / "y") + "/y" * 2100,
        tmp_path / "file",
        tmp_path / "file" / "swap",
        tmp_path / "file" / "deeper" / "swap",
        tmp_path / "loop" / "swap",
        tmp_path / "loop",
        tmp_path / "nowhere",
        tmp_path / "\udcff\ud800",  # no file name in any encoding
    ):
        with pytest.raises((DirectoryError, OptionError)) as caught:
            open_at(path)
        assert str(caught.value)
        assert len(str(caught.value)) < 6000

        async def open_async(path: str | Path = path) -> None:
            async with AsyncTierStore(gpu=4 * PAGE, ram=16 * PAGE, nvme=path, device="cpu"):
                pass

        with pytest.raises((DirectoryError, OptionError)):
            asyncio.run(open_async())
    open_at(tmp_path / "good")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="another notion of users there")
def test_a_directory_that_may_not_be_read_is_refused_in_our_words(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)
    open_at(tmp_path / "good")  # whatever is imported on the way is there now
    for path in (closed, closed / "swap", closed / "inner", closed / "inner" / "deeper" / "swap"):
        raised: Exception | None = None
        with without_privileges(closed):
            try:
                open_at(path)
            except Exception as error:
                raised = error
        assert isinstance(raised, DirectoryError | OptionError), (path, raised)


# -- the engine, when all is said ----------------------------------------------------------------------------------------------


def test_no_engine_is_left_behind() -> None:
    """What this file opened is closed: an engine that lives on keeps its memory, its threads and its lock."""
    with suppress(AssertionError):
        wait_until(lambda: gc.collect() is None or not living_engines(), within_s=5)
    assert not living_engines()


def living_engines() -> list[Engine]:
    return [thing for thing in gc.get_objects() if type(thing) is Engine and not thing.ended.done()]
