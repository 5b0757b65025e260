"""Cancelling a task at any await, and Ctrl-C at any moment: nothing is leaked, nothing half done, and the store goes on."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quiet import assert_quiet, tensor_of
from tierstore import AsyncCommitHandle, AsyncTierStore, TierStore
from tierstore.errors import LeaseTimeoutError

PAGE = 4096
NUM_BLOCKS = 12
MOST_STEPS = 120
"""Iterations of the user's loop after which a task is cancelled, at most."""


def page(value: float) -> torch.Tensor:
    return torch.full((2 * PAGE // 8,), value, dtype=torch.float64)


def open_store(path: Path) -> AsyncTierStore:
    return AsyncTierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=path / "swap", device="cpu")


async def spin(steps: int) -> None:
    """Let the loop run this often; the engine's threads get a moment too."""
    for step in range(steps):
        await asyncio.sleep(0 if step % 4 else 0.0003)


class Model:
    """What the store must hold. A call that was cancelled may have happened or not, but not in part."""

    def __init__(self, store: AsyncTierStore) -> None:
        self.store = store
        self.values: dict[str, set[float]] = {}

    async def check(self) -> None:
        assert_quiet(self.store)
        for name, allowed in self.values.items():
            if name not in self.store:
                assert None in allowed, f"{name} is gone"
                continue
            value = await self.store.read(name)
            assert isinstance(value, torch.Tensor)
            assert value.min() == value.max(), f"{name} was changed in part"
            assert value[0].item() in allowed, (name, value[0].item(), allowed)
            self.values[name] = {value[0].item()}


Call = Callable[[AsyncTierStore, Model, int], Coroutine[Any, Any, None]]


async def use(store: AsyncTierStore, model: Model, step: int) -> None:
    names = [f"b{(step + number) % NUM_BLOCKS}" for number in range(3)]
    async with store.use(*names, write=names[0]) as (first, _, _):
        first.fill_(step)
        model.values[names[0]] = {float(step)}
        await asyncio.sleep(0)


async def put(store: AsyncTierStore, model: Model, step: int, tier: str) -> None:
    name = f"new {step}"
    model.values[name] = {None, float(step)}  # type: ignore[arg-type]
    await store.put(name, page(step), tier=tier)


async def write(store: AsyncTierStore, model: Model, step: int, where: str) -> None:
    name = f"b{step % NUM_BLOCKS}"
    if where == "nvme":
        await store.evict(name)
    if where == "gpu":
        async with store.use(name, write=True):
            pass
    model.values[name] = {*model.values[name], float(step)}
    await store.write(name, page(step))


async def read(store: AsyncTierStore, model: Model, step: int) -> None:
    await store.read(f"b{step % NUM_BLOCKS}")


async def evict(store: AsyncTierStore, model: Model, step: int) -> None:
    await store.evict(f"b{step % NUM_BLOCKS}")


async def hold(store: AsyncTierStore, model: Model, step: int, tier: str) -> None:
    name = f"b{step % NUM_BLOCKS}"
    try:
        await store.hold(name, tier)
    finally:
        await store.unhold(name)


async def delete(store: AsyncTierStore, model: Model, step: int) -> None:
    name = f"b{step % NUM_BLOCKS}"
    model.values[name] = {*model.values[name], None}  # type: ignore[arg-type]
    await store.delete(name)


async def commit(store: AsyncTierStore, model: Model, step: int) -> None:
    await store.commit({"step": step})


async def commit_later(store: AsyncTierStore, model: Model, step: int) -> None:
    handle = await store.commit({"step": step}, wait=False)
    assert isinstance(handle, AsyncCommitHandle)
    await handle.result()


async def flush(store: AsyncTierStore, model: Model, step: int) -> None:
    await store.flush()


CALLS: dict[str, Call] = {
    "use": use,
    "put ram": lambda store, model, step: put(store, model, step, "ram"),
    "put gpu": lambda store, model, step: put(store, model, step, "gpu"),
    "put nvme": lambda store, model, step: put(store, model, step, "nvme"),
    "write ram": lambda store, model, step: write(store, model, step, "ram"),
    "write gpu": lambda store, model, step: write(store, model, step, "gpu"),
    "write nvme": lambda store, model, step: write(store, model, step, "nvme"),
    "read": read,
    "evict": evict,
    "hold gpu": lambda store, model, step: hold(store, model, step, "gpu"),
    "hold ram": lambda store, model, step: hold(store, model, step, "ram"),
    "hold nvme": lambda store, model, step: hold(store, model, step, "nvme"),
    "delete": delete,
    "commit": commit,
    "commit later": commit_later,
    "flush": flush,
}


async def fill(store: AsyncTierStore) -> Model:
    model = Model(store)
    for number in range(NUM_BLOCKS):
        await store.put(f"b{number}", page(-1))
        model.values[f"b{number}"] = {-1.0}
    return model


@pytest.mark.parametrize("name", CALLS)
def test_cancelling_at_any_await(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        async with open_store(tmp_path) as store:
            model = await fill(store)
            steps, finished = 0, 0
            for step in range(1000):
                task = asyncio.create_task(CALLS[name](store, model, step))
                await spin(steps)
                task.cancel()
                try:
                    await task
                    finished += 1
                except asyncio.CancelledError:
                    pass
                if name != "commit later":
                    # A call whose cancellation has come back has left nothing that the same owner would run into.
                    assert not store.engine.calls
                    assert not store.engine.scheduler._owned
                if step % 4 == 0:
                    await model.check()
                if f"b{step % NUM_BLOCKS}" not in store:
                    await store.put(f"b{step % NUM_BLOCKS}", page(step))
                    model.values[f"b{step % NUM_BLOCKS}"] = {float(step)}
                if f"new {step}" in store:
                    await store.delete(f"new {step}")
                model.values.pop(f"new {step}", None)
                steps += 1 + steps // 12
                if steps > MOST_STEPS or finished >= 15:
                    break
            await model.check()
            await store.commit()
            await model.check()

    asyncio.run(scenario())


def test_cancelling_everything_at_once_many_times(tmp_path: Path) -> None:
    async def scenario() -> None:
        chance = random.Random(1)
        async with open_store(tmp_path) as store:
            model = await fill(store)
            calls = [call for name, call in CALLS.items() if name.split()[0] not in ("delete", "put", "write")]
            for turn in range(25):
                tasks = [asyncio.create_task(chance.choice(calls)(store, model, turn * 20 + number)) for number in range(10)]
                await spin(chance.randrange(40))
                chance.shuffle(tasks)
                for task in tasks:
                    task.cancel()
                    await spin(chance.randrange(2))
                await asyncio.gather(*tasks, return_exceptions=True)
                assert_quiet(store)
            for number in range(NUM_BLOCKS):
                value = await store.read(f"b{number}")
                assert isinstance(value, torch.Tensor)
                assert value.min() == value.max()

    asyncio.run(scenario())


def test_what_a_cancelled_call_held_is_free_when_the_cancellation_comes_back(tmp_path: Path) -> None:
    """`asyncio.timeout` around a call, and then another call on the same block by the same task."""

    async def scenario() -> None:
        async with open_store(tmp_path) as store:
            await fill(store)
            for delay_ms in range(40):
                try:
                    async with asyncio.timeout(delay_ms / 10_000):
                        await store.read("b0")
                except TimeoutError:
                    pass
                async with store.use("b0", write=True):  # the read's own lease would refuse this
                    pass
                try:
                    async with asyncio.timeout(delay_ms / 10_000):
                        await store.put("x", page(1), tier="nvme")
                except TimeoutError:
                    pass
                if "x" in store:
                    await store.delete("x")
                await store.put("x", page(2))
                await store.delete("x")

    asyncio.run(scenario())


def test_cancelling_those_who_wait_for_somebody_elses_lease(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with open_store(tmp_path) as store:
            model = await fill(store)

            async def waiting(call: Call, step: int) -> None:
                await call(store, model, step)

            for turn in range(8):
                async with store.use("b0", "b1", write=True):
                    calls = [read, evict, delete, commit, flush, CALLS["hold nvme"]]
                    tasks = [asyncio.create_task(waiting(call, 0)) for call in calls]
                    tasks += [asyncio.create_task(store.write("b1", page(1))), asyncio.create_task(use_one(store, "b0"))]
                    await spin(turn * 3)
                    for task in tasks:
                        task.cancel()
                    results = await asyncio.gather(*tasks, return_exceptions=True)
                    assert all(isinstance(result, asyncio.CancelledError) for result in results), results
                    assert len(store.engine.scheduler._owned) == 1
                    assert not store.engine.scheduler.waiting
                assert_quiet(store)
                with pytest.raises(LeaseTimeoutError):
                    async with store.use("b0"):
                        await asyncio.create_task(use_one(store, "b0", timeout=0.01))
                assert_quiet(store)

    async def use_one(store: AsyncTierStore, name: str, timeout: float | None = None) -> None:
        async with store.use(name, write=True, timeout=timeout):
            pass

    asyncio.run(scenario())


def test_cancelling_while_it_opens_and_closes(tmp_path: Path) -> None:
    async def scenario() -> None:
        for steps in range(0, 60, 4):
            store = open_store(tmp_path)
            opening = asyncio.create_task(store.__aenter__())
            await spin(steps)
            opening.cancel()
            try:
                await opening
            except asyncio.CancelledError:
                pass
            else:
                await store.close()
            async with open_store(tmp_path) as again:  # the directory is free
                if "a" not in again:
                    await again.put("a", page(1))
                    await again.commit()
                await again.put("b", page(1))
                closing = asyncio.create_task(again.close())
                await spin(steps)
                closing.cancel()
                await asyncio.gather(closing, return_exceptions=True)
                assert again._engine is not None
                assert steps == 0 or again._engine.ended.done()

    asyncio.run(scenario())


CTRL_C = """
import random, signal, sys, time
import torch
from tests.quiet import assert_quiet, tensor_of
from tierstore import TierStore
from tierstore.errors import TierstoreError

chance = random.Random(int(sys.argv[2]))
PAGE = 4096
page = lambda value: torch.full((2 * PAGE // 8,), float(value), dtype=torch.float64)
caught, struck = 0, False
store = TierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=sys.argv[1], device="cpu")
low, high = [0.0] * 12, [0.0] * 12
for number in range(12):
    store.put(f"b{number}", page(0))
armed = False

def interrupt(*_):
    global armed
    if armed:
        armed = False  # one at a time: what follows checks
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
print("ready", flush=True)
end = time.monotonic() + float(sys.argv[3])
count = 0
while time.monotonic() < end:
    try:
        armed = True
        count += 1
        number = chance.randrange(12)
        # A value is in doubt only while it is being changed.
        kind = chance.randrange(9)
        if kind < 4:
            high[number] = low[number] + 1
            with store.use(f"b{number}", f"b{(number + 5) % 12}", write=f"b{number}") as (block, _):
                assert block.min() == block.max() == low[number], (number, block[0], low[number])
                block.fill_(high[number])
                low[number] = high[number]
        elif kind == 4:
            value = store.read(f"b{number}")
            assert value.min() == value.max() == low[number]
        elif kind == 5:
            name = f"new {count}"
            store.put(name, page(count), tier=chance.choice(["ram", "gpu", "nvme"]))
            store.delete(name)
        elif kind == 6:
            store.commit({"count": count})
        elif kind == 7:
            store.unhold(f"b{number}")
            store.evict(f"b{number}")
        else:
            store.prefetch(f"b{number}", f"b{(number + 1) % 12}")
            store.hold(f"b{number}", "ram")
            store.unhold(f"b{number}")
        armed = False  # the loop's own head is not what is tested
    except KeyboardInterrupt:
        struck = True
    if struck:  # the exception has been dropped, and with it whatever it kept alive
        struck = False
        caught += 1
        for number in range(12):  # it may have struck between the change and the note of it
            value = store.read(f"b{number}")
            assert value.min() == value.max()
            assert value[0] in (low[number], high[number]), (number, value[0], low[number], high[number])
            low[number] = high[number] = value[0].item()
signal.signal(signal.SIGINT, signal.SIG_IGN)
for number in range(12):
    store.unhold(f"b{number}")
for name in list(store):
    if name.startswith("new"):
        store.delete(name)
assert_quiet(store)
stats = store.stats()
assert all(tier.peak_bytes <= tier.capacity_bytes for tier in stats.tiers.values())
for number in range(12):
    assert (store.read(f"b{number}") == low[number]).all()
store.commit()
store.close()
with TierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=sys.argv[1], device="cpu") as store:
    for number in range(12):
        assert (store.read(f"b{number}") == low[number]).all()
print("fine", caught, count, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("seed", range(2))
def test_ctrl_c_at_any_moment(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    command = [sys.executable, "-W", "ignore", "-c", CTRL_C, str(tmp_path / "swap"), str(seed), "3.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as child:
        assert child.stdout is not None
        ready, sent, end = child.stdout.readline(), 0, time.monotonic() + 3
        while time.monotonic() < end and child.poll() is None:
            time.sleep(chance.uniform(0.0005, 0.02))
            child.send_signal(signal.SIGINT)
            sent += 1
        try:
            out, err = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGABRT)
            out, err = child.communicate()
    assert child.returncode == 0, err[-6000:]
    assert ready == "ready\n"
    fine, caught, count = out.split()
    assert fine == "fine"
    assert int(caught) >= 10, f"{sent} were sent"  # those that come while the child checks are dropped
    assert int(count) >= 50


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one thread there")
def test_sync_calls_give_up_when_interrupted_while_they_wait(tmp_path: Path) -> None:
    """The same, at a known place: every call that waits for a lease ends with Ctrl-C and leaves nothing."""
    main = threading.main_thread().ident
    assert main is not None
    with TierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
        store.put("a", page(1))
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with store.use("a", write=True):
                entered.set()
                leave.wait(60)

        holder = threading.Thread(target=hold)
        holder.start()
        entered.wait()
        calls: list[Callable[[], object]] = [
            lambda: store.use("a").__enter__(),
            lambda: store.read("a"),
            lambda: store.write("a", page(2)),
            lambda: store.delete("a"),
            lambda: store.evict("a"),
            lambda: store.hold("a", "nvme"),
            store.commit,
        ]
        for call in calls:

            def interrupt() -> None:
                while not store.engine.scheduler.waiting:
                    time.sleep(0.001)
                signal.pthread_kill(main, signal.SIGINT)

            interrupter = threading.Thread(target=interrupt)
            interrupter.start()
            with pytest.raises(KeyboardInterrupt):
                call()
            interrupter.join()
            assert not store.engine.scheduler.waiting
            assert not store.engine.calls
        leave.set()
        holder.join()
        assert_quiet(store)
        assert torch.equal(tensor_of(store, "a"), page(1))
