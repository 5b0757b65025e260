"""Threads that cannot be started, and the engine's own ending before its time: nobody waits for ever, and the directory is free."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.driver import pages
from tests.patience import PATIENCE_S, in_thread, wait_until
from tests.quiet import tensor_of
from tierstore import AsyncTierStore, CommitHandle, TierStore
from tierstore.catalog import PAGE
from tierstore.errors import ClosedError, TierstoreError
from tierstore.mover.streams import ThreadCopies
from tierstore.requests import Order, Vacate

ENDS: dict[str, Callable[[asyncio.AbstractEventLoop], object]] = {
    "stopped": lambda loop: loop.call_soon_threadsafe(loop.stop),
    "killed": lambda loop: loop.call_soon_threadsafe(_kill),
    "killed in a task": lambda loop: asyncio.run_coroutine_threadsafe(_die(), loop),
}


def _kill() -> None:
    raise SystemExit("somebody ended the thread")


async def _die() -> None:
    _kill()


def opened(path: Path) -> TierStore:
    return TierStore(gpu=6 * PAGE, ram=13 * PAGE, nvme=path / "swap", device="cpu")


def enter(store: TierStore, name: str) -> None:
    with store.use(name, write=True):
        pass


@pytest.mark.parametrize("how", ENDS)
def test_everybody_hears_that_the_engine_s_thread_ended(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(tmp_path)
    store.put("a", pages(1, 2))
    store.put("b", pages(2, 2))
    store.commit()
    engine = store.engine
    lease = store.use("a", write=True)
    lease.__enter__().add_(1)
    calls: dict[str, Callable[[], object]] = {
        "use": lambda: enter(store, "a"),
        "read": lambda: store.read("a"),
        "write": lambda: store.write("a", pages(5, 2)),
        "delete": lambda: store.delete("a"),
        "evict": lambda: store.evict("a"),
        "commit": store.commit,
        "flush": store.flush,
    }
    waiting = {name: in_thread(call) for name, call in calls.items() if name != "flush"}  # that leaves what is being written
    wait_until(lambda: len(list(engine.scheduler.waiting)) == len(waiting))
    with caplog.at_level(logging.CRITICAL, logger="tierstore"):
        ENDS[how](engine.loop)
        for name, future in waiting.items():
            error = future.exception(PATIENCE_S)
            assert isinstance(error, ClosedError), f"{name}: {error!r}"
            assert "engine failed" in str(error)
    engine.runtime.join(engine._thread)
    lease.__exit__(None, None, None)
    for call in calls.values():
        with pytest.raises(ClosedError, match="engine failed"):
            call()
    assert in_thread(store.close).exception(PATIENCE_S) is None
    assert in_thread(store.close).exception(PATIENCE_S) is None
    with opened(tmp_path) as again:
        assert torch.equal(tensor_of(again, "a"), pages(1, 2)), "the last commit is intact"
        assert torch.equal(tensor_of(again, "b"), pages(2, 2))


@pytest.mark.parametrize("how", ENDS)
def test_tasks_hear_of_it_too(tmp_path: Path, how: str) -> None:
    async def go() -> None:
        store = await AsyncTierStore(gpu=6 * PAGE, ram=13 * PAGE, nvme=tmp_path / "swap", device="cpu")
        await store.put("a", pages(1, 2))
        async with store.use("a", write=True):
            task = asyncio.create_task(store.read("a"))
            using = asyncio.create_task(store.use("a", write=True).__aenter__())
            await asyncio.to_thread(wait_until, lambda: len(store.engine.scheduler.waiting) == 2)
            ENDS[how](store.engine.loop)
            for waiting in (task, using):
                with pytest.raises(ClosedError, match="engine failed"):
                    await asyncio.wait_for(waiting, PATIENCE_S)
        await asyncio.wait_for(store.close(), PATIENCE_S)

    asyncio.run(go())
    opened(tmp_path).close()


def test_a_commit_under_way_when_the_engine_ends(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.put("a", pages(1, 2))
    with store.use("a", write=True):
        other = in_thread(lambda: store.commit(wait=False))
        handle = other.result(PATIENCE_S)
        assert isinstance(handle, CommitHandle)
        ENDS["stopped"](store.engine.loop)
        with pytest.raises(ClosedError):
            handle.result(PATIENCE_S)
    assert in_thread(store.close).exception(PATIENCE_S) is None
    opened(tmp_path).close()


def test_who_asks_while_the_engine_fails_hears_of_it(tmp_path: Path) -> None:
    """The caller has found the store open, and queues his request after everybody else was told."""
    store = opened(tmp_path)
    store.put("a", pages(1, 2))
    engine = store.engine
    with engine.lock:
        engine.check_open()
        engine.loop.call_soon_threadsafe(lambda: 1 // 0)
        wait_until(lambda: engine.failure is not None)
        time.sleep(0.2)  # all that happens without the lock has happened
        future = engine.submit(Vacate("test", (engine.scheduler.find("a"),)))
    with pytest.raises(ClosedError):
        future.result(PATIENCE_S)
    with pytest.raises(ClosedError):
        store.read("a")
    store.close()


def test_an_engine_that_fails_while_closing_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it fails at is the report of the last transfer that close() waits for."""
    store = opened(tmp_path)
    store.put("a", pages(1, 2))
    engine, gate, copying = store.engine, threading.Event(), threading.Event()
    carry_out = ThreadCopies._carry_out

    def slow(self: ThreadCopies, order: Order) -> None:
        copying.set()
        gate.wait(PATIENCE_S)
        carry_out(self, order)

    def broken(order: Order) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(ThreadCopies, "_carry_out", slow)
    monkeypatch.setattr(engine.placement, "done", broken)
    store.prefetch("a")
    assert copying.wait(PATIENCE_S)
    closing = in_thread(store.close)
    wait_until(lambda: engine.closed)
    time.sleep(0.1)  # it waits for the copy
    gate.set()
    closing.result(PATIENCE_S)


def refuse_threads(patch: pytest.MonkeyPatch, name: str = "") -> None:
    """The system starts no more threads (of this name)."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if name in self.name:
            raise RuntimeError("can't start new thread")
        start(self)

    patch.setattr(threading.Thread, "start", refuse)


def test_a_store_without_a_thread_for_its_engine_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse_threads(patch, "tierstore-engine")
        with pytest.raises(RuntimeError, match="can't start new thread"):
            opened(tmp_path)
    opened(tmp_path).close()


def test_close_without_a_thread_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    store.put("a", pages(1, 2))
    store.commit()
    with monkeypatch.context() as patch:
        refuse_threads(patch)
        store.close()
        store.close()
    with opened(tmp_path) as again:
        assert torch.equal(tensor_of(again, "a"), pages(1, 2))


def test_an_async_store_closes_without_a_thread_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        store = await AsyncTierStore(gpu=6 * PAGE, ram=13 * PAGE, nvme=tmp_path / "swap", device="cpu")
        await store.put("a", pages(1, 2))
        await store.commit()
        asyncio.get_running_loop()._default_executor = None  # type: ignore[attr-defined]  # a fresh one, which has no threads yet
        with monkeypatch.context() as patch:
            refuse_threads(patch)
            await asyncio.wait_for(store.close(), PATIENCE_S)

    asyncio.run(go())
    opened(tmp_path).close()


@pytest.mark.parametrize("call", ["use", "read", "write", "put", "flush", "commit", "evict"])
def test_calls_of_a_store_that_gets_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A store that has started none yet: each call says so at once, in the tree's words, and works when there are threads."""
    with opened(tmp_path) as store:
        store.put("a", pages(1, 2), tier="nvme")
        store.put("b", pages(2, 2))
        store.commit()
        store.write("b", pages(3, 2))
    store = opened(tmp_path)
    calls: dict[str, Callable[[], object]] = {
        "use": lambda: enter(store, "a"),
        "read": lambda: store.read("a"),
        "write": lambda: store.write("a", pages(5, 2)),
        "put": lambda: store.put("c", pages(6, 2)),
        "flush": store.flush,
        "commit": store.commit,
        "evict": lambda: store.evict("b"),
    }
    if call in ("flush", "commit", "evict"):
        store.write("b", pages(4, 2))
        with store.use("b", write=True, timeout=PATIENCE_S) as tensor:
            tensor.copy_(pages(4, 2))
    for pool in store.engine.directory.files._executors.values():  # type: ignore[union-attr]
        pool.shutdown()
    store.engine.directory.files._executors.clear()  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        refuse_threads(patch, "tierstore-")
        start = time.monotonic()
        with pytest.raises(TierstoreError, match=r"can't start new thread") as caught:
            calls[call]()
        assert time.monotonic() - start < PATIENCE_S
        assert caught.value.remedy
    calls[call]()
    assert torch.equal(tensor_of(store, "b"), pages(4 if call in ("flush", "commit", "evict") else 2, 2))
    store.close()
