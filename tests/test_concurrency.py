"""Leases from threads, tasks and autograd; who waits for whom; and that everybody who can go on does."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quiet import assert_quiet, tensor_of
from tierstore import AsyncTierStore, TierStore
from tierstore.errors import BlockNotFoundError, CapacityError, DeadlockError, LeaseTimeoutError, TierstoreError

PAGE = 4096
ROOM = 8
"""Blocks of one page that the device holds."""


def page(value: float) -> torch.Tensor:
    return torch.full((PAGE // 8,), value, dtype=torch.float64)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TierStore]:
    with TierStore(gpu=ROOM * PAGE, ram=24 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
        for number in range(24):
            store.put(f"b{number}", page(0))
        yield store
        assert_quiet(store)


class Party:
    """Threads whose failures are not lost."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def start(self, work: Callable[..., object], *arguments: object) -> threading.Thread:
        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()
        return thread

    def join(self, within_s: float = 60) -> None:
        deadline = time.monotonic() + within_s
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self.threads), "somebody waits for ever"

    def finish(self, within_s: float = 60) -> None:
        self.join(within_s)
        if self.failures:
            raise self.failures[0]


def wait_until(condition: Callable[[], object], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_readers_share_and_a_writer_has_it_alone(store: TierStore) -> None:
    party, together = Party(), threading.Barrier(3)

    def read() -> None:
        with store.use("b0"):
            together.wait(10)  # all three are inside

    for _ in range(3):
        party.start(read)
    party.finish()
    inside = 0

    def write() -> None:
        nonlocal inside
        for _ in range(50):
            with store.use("b0", write=True) as block:
                inside += 1
                assert inside == 1
                block.add_(1)
                time.sleep(0)
                inside -= 1

    def watch() -> None:
        for _ in range(50):
            with store.use("b0") as block:
                assert inside == 0
                assert block.min() == block.max()

    for work in (write, write, watch, watch):
        party.start(work)
    party.finish()
    assert torch.equal(tensor_of(store, "b0"), page(100))


def test_a_waiting_writer_is_not_starved_by_readers(store: TierStore) -> None:
    party, stop, read_while_waiting = Party(), threading.Event(), 0
    waiting = False

    def read(seed: int) -> None:
        nonlocal read_while_waiting
        chance = random.Random(seed)
        while not stop.is_set():
            before = waiting
            with store.use("b0"):
                read_while_waiting += before and waiting
                time.sleep(chance.uniform(0.005, 0.02))

    for seed in range(6):
        party.start(read, seed)
    time.sleep(0.05)
    for _ in range(10):
        wait_until(lambda: store.info("b0").leases >= 3)
        lease = store.use("b0", write=True, timeout=10)
        waiting = True
        with lease:
            waiting = False
        time.sleep(0.01)
    stop.set()
    party.finish()
    assert read_while_waiting <= 30  # those who asked in the instant between `waiting` and the request


@pytest.mark.parametrize("policy", ["lru", "lookahead", "static"])
def test_random_sets_of_blocks_from_many_threads_lose_no_write(tmp_path: Path, policy: str) -> None:
    num_blocks, num_threads, num_steps = 20, 8, 60
    expected = [0] * num_blocks
    with TierStore(gpu=ROOM * PAGE, ram=16 * PAGE, nvme=tmp_path / "swap", device="cpu", policy=policy) as store:
        for number in range(num_blocks):
            store.put(str(number), page(0))
        party, counting = Party(), threading.Lock()

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(num_steps):
                numbers = chance.sample(range(num_blocks), chance.randint(1, ROOM))
                written = [number for number in numbers if chance.random() < 0.5]
                with store.use(*map(str, numbers), write=list(map(str, written))) as leased:
                    blocks = dict(zip(numbers, leased if len(numbers) > 1 else (leased,), strict=True))
                    for number in numbers:
                        assert blocks[number].min() == blocks[number].max()
                        if number in written:
                            blocks[number][::2].add_(1)
                            blocks[number][1::2].add_(1)
                with counting:
                    for number in written:
                        expected[number] += 1
                if chance.random() < 0.1:
                    store.prefetch(*map(str, chance.sample(range(num_blocks), 4)))
                if chance.random() < 0.1:
                    value = tensor_of(store, str(chance.randrange(num_blocks)))
                    assert value.min() == value.max()
                if chance.random() < 0.03:
                    store.evict(str(chance.randrange(num_blocks)))
                if chance.random() < 0.02:
                    store.commit()

        for seed in range(num_threads):
            party.start(work, seed)
        party.finish(90)
        assert_quiet(store)
        for number in range(num_blocks):
            assert torch.equal(tensor_of(store, str(number)), page(expected[number])), number
        stats = store.stats()
        assert stats.tiers["gpu"].evictions > 0
        assert stats.links["nvme_read"].transfers > 0


def test_tasks_on_one_loop_lose_no_write(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncTierStore(gpu=ROOM * PAGE, ram=16 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
            for number in range(20):
                await store.put(str(number), page(0))
            expected = [0] * 20

            async def work(seed: int) -> None:
                chance = random.Random(seed)
                for _ in range(40):
                    numbers = chance.sample(range(20), chance.randint(1, ROOM))
                    async with store.use(*map(str, numbers), write=True) as leased:
                        for block in leased if len(numbers) > 1 else (leased,):
                            block.add_(1)
                            await asyncio.sleep(0)
                    for number in numbers:
                        expected[number] += 1

            await asyncio.wait_for(asyncio.gather(*map(work, range(12))), 60)
            for number in range(20):
                value = await store.read(str(number))
                assert isinstance(value, torch.Tensor)
                assert torch.equal(value, page(expected[number]))
            assert_quiet(store)

    asyncio.run(scenario())


def test_owners_are_tasks_on_the_async_face(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncTierStore(gpu=ROOM * PAGE, ram=16 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
            await store.put("a", page(0))

            async def other() -> None:
                async with store.use("a", write=True, timeout=0.05):
                    pass

            async with store.use("a", write=True), store.use("a", write=True):
                with pytest.raises(LeaseTimeoutError):
                    await asyncio.create_task(other())
            await asyncio.create_task(other())

    asyncio.run(scenario())


def test_hooks_of_backward_use_the_store(store: TierStore) -> None:
    """Weights are leased anew in backward; on a GPU such hooks run on threads of autograd's own."""
    weights = [torch.randn(8, 8, dtype=torch.float64) for _ in range(12)]
    for number, weight in enumerate(weights):
        store.put(f"w{number}", weight)
        store.put(f"g{number}", torch.zeros(8, 8, dtype=torch.float64))

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, number: int) -> torch.Tensor:
            ctx.save_for_backward(x)
            ctx.number = number
            with store.use(f"w{number}") as weight:
                return torch.tanh(x @ weight)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            (x,) = ctx.saved_tensors
            with store.use(f"w{ctx.number}", f"g{ctx.number}", write=f"g{ctx.number}") as (weight, total):
                grad = grad * (1 - torch.tanh(x @ weight) ** 2)
                total.add_(x.T @ grad)
                return grad @ weight.T, None

    def resident(x: torch.Tensor) -> list[torch.Tensor]:
        leaves = [weight.clone().requires_grad_() for weight in weights]
        for leaf in leaves:
            x = torch.tanh(x @ leaf)
        x.sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    inputs = [torch.randn(5, 8, dtype=torch.float64) for _ in range(4)]

    def train(x: torch.Tensor) -> None:
        out = x.clone().requires_grad_()
        for number in range(12):
            out = Layer.apply(out, number)  # type: ignore[no-untyped-call]
        called = []
        out.register_hook(lambda grad: called.append(store.read("w3")))
        out.sum().backward()
        assert called

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, inputs))
    expected = [sum(grads) for grads in zip(*map(resident, inputs), strict=True)]
    for number in range(12):
        assert torch.allclose(tensor_of(store, f"g{number}"), expected[number])


# -- competing for space ------------------------------------------------------------------------------------------------------


def names(start: int, stop: int) -> list[str]:
    return [f"b{number}" for number in range(start, stop)]


def test_what_fits_later_waits(store: TierStore) -> None:
    party, entered, leave = Party(), threading.Event(), threading.Event()

    def hold() -> None:
        with store.use(*names(0, 5)):
            entered.set()
            leave.wait(30)

    party.start(hold)
    entered.wait()
    got = threading.Event()

    def want() -> None:
        with store.use(*names(10, 15), write=True) as blocks:
            got.set()
            for block in blocks:
                block.add_(1)

    party.start(want)
    assert not got.wait(0.1)
    leave.set()
    party.finish()
    assert got.is_set()


def test_a_wait_for_space_ends_with_the_timeout_and_leaks_nothing(store: TierStore) -> None:
    with store.use(*names(0, 5)):

        def want(timeout: float) -> None:
            with pytest.raises(LeaseTimeoutError) as caught, store.use(*names(10, 15), timeout=timeout):
                pass
            assert caught.value.cause in ("space", "nvme")

        party = Party()
        for _ in range(10):
            party.start(want, random.uniform(0.01, 0.1))
        party.finish()
        with store.use(*names(20, 23), timeout=10):  # room for three is there, and no half of a request keeps it
            pass
    with store.use(*names(10, 18), timeout=10):
        pass


def test_a_big_request_is_not_starved_by_small_ones(store: TierStore) -> None:
    party, stop = Party(), threading.Event()

    def small(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            with store.use(f"b{chance.randrange(24)}", write=chance.random() < 0.5):
                time.sleep(0.0005)

    for seed in range(6):
        party.start(small, seed)
    time.sleep(0.05)
    for start in (0, 8, 16, 0):
        with store.use(*names(start, start + ROOM), write=True, timeout=20):
            pass
    stop.set()
    party.finish()


def test_nested_leases_that_need_more_than_fits_fail_in_one_thread_only(store: TierStore) -> None:
    for attempt in range(10):
        both = threading.Barrier(2)
        outcomes: list[str] = []

        def nested(number: int, both: threading.Barrier = both, outcomes: list[str] = outcomes) -> None:
            with store.use(*names(number * 12, number * 12 + 4)):
                both.wait(10)
                try:
                    with store.use(*names(number * 12 + 4, number * 12 + 7)):
                        outcomes.append("went on")
                except DeadlockError as error:
                    assert error.remedy  # noqa: PT017
                    outcomes.append("refused")

        party = Party()
        party.start(nested, 0)
        party.start(nested, 1)
        party.finish(20)
        assert sorted(outcomes) == ["refused", "went on"], attempt


def test_writers_that_want_one_anothers_blocks_fail_in_one_thread_only(store: TierStore) -> None:
    for size in (2, 3, 5):
        all_in = threading.Barrier(size)
        outcomes: list[str] = []

        def nested(number: int, size: int = size, all_in: threading.Barrier = all_in, outcomes: list[str] = outcomes) -> None:
            try:
                with store.use(f"b{number}", write=True):
                    all_in.wait(10)
                    with store.use(f"b{(number + 1) % size}", write=number % 2 == 0):
                        outcomes.append("went on")
            except DeadlockError:
                outcomes.append("refused")

        party = Party()
        for number in range(size):
            party.start(nested, number)
        party.finish(20)
        assert sorted(outcomes) == ["refused"] + ["went on"] * (size - 1)


def test_a_commit_among_nested_leases_is_no_deadlock(store: TierStore) -> None:
    """One reads x and wants to write y; another writes z and wants to write x; the commit waits for z."""
    for wait in (True, False):
        both, party = threading.Barrier(3), Party()
        outcomes: list[str] = []

        def reader(both: threading.Barrier = both, outcomes: list[str] = outcomes) -> None:
            with store.use("b0"):
                both.wait(10)
                wait_until(lambda: len(store.engine.scheduler.waiting) >= 2)
                with store.use("b1", write=True):
                    outcomes.append("reader")

        def writer(both: threading.Barrier = both, outcomes: list[str] = outcomes) -> None:
            with store.use("b2", write=True):
                both.wait(10)
                with store.use("b0", write=True):
                    outcomes.append("writer")

        def commit(both: threading.Barrier = both, outcomes: list[str] = outcomes, wait: bool = wait) -> None:
            both.wait(10)
            done = store.commit(wait=wait)
            if not isinstance(done, int):
                done.result(20)
            outcomes.append("commit")

        for work in (reader, writer, commit):
            party.start(work)
        party.finish(20)
        assert sorted(outcomes) == ["commit", "reader", "writer"]


def test_random_nested_leases_always_end(store: TierStore) -> None:
    """Whatever circles come up, each is broken, and nothing that was granted is lost."""
    party, refused, expected, counting = Party(), [], [0] * 24, threading.Lock()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            first, second = (chance.sample(range(24), chance.randint(1, 4)) for _ in range(2))
            write = chance.random() < 0.5
            try:
                with store.use(*(f"b{number}" for number in first), write=True) as one:
                    for block in one if len(first) > 1 else (one,):
                        block.add_(1)
                    with counting:
                        for number in first:
                            expected[number] += 1
                    with store.use(*(f"b{number}" for number in second), write=write) as two:
                        if write:
                            for block in two if len(second) > 1 else (two,):
                                block.add_(1)
                            with counting:
                                for number in second:
                                    expected[number] += 1
            except DeadlockError:
                refused.append(seed)

    for seed in range(6):
        party.start(work, seed)
    party.finish(60)
    for number in range(24):
        assert torch.equal(tensor_of(store, f"b{number}"), page(expected[number]))


def test_nested_leases_that_can_never_fit_fail_at_once(store: TierStore) -> None:
    party, entered, leave = Party(), threading.Event(), threading.Event()

    def other() -> None:
        with store.use("b20"):
            entered.set()
            leave.wait(30)

    party.start(other)
    entered.wait()
    start = time.monotonic()
    with store.use(*names(0, 6)), pytest.raises(CapacityError) as caught:
        store.use(*names(6, 9)).__enter__()
    assert time.monotonic() - start < 5
    assert str(3 * PAGE) in str(caught.value.need)
    assert caught.value.have is not None
    assert "release a lease" in str(caught.value.remedy)
    leave.set()
    party.finish()


# -- blocks that come and go --------------------------------------------------------------------------------------------------


def test_those_who_wait_for_a_block_that_is_deleted_are_told(store: TierStore) -> None:
    party, entered, leave, told = Party(), threading.Event(), threading.Event(), []

    def hold() -> None:
        with store.use("b0"):
            entered.set()
            leave.wait(30)

    def expect(call: Callable[[], object]) -> None:
        try:
            call()
        except BlockNotFoundError as error:
            assert error.remedy  # noqa: PT017
            told.append(error.block)

    party.start(hold)
    entered.wait()
    party.start(store.delete, "b0")
    wait_until(lambda: len(store.engine.scheduler.waiting) == 1)
    calls: list[Callable[[], object]] = [  # none of them overtakes the one that came first
        lambda: store.use("b1", "b0", write=True).__enter__(),
        lambda: store.use("b0").__enter__(),
        lambda: store.read("b0"),
        lambda: store.write("b0", page(3)),
        lambda: store.delete("b0"),
        lambda: store.evict("b0"),
    ]
    for number, call in enumerate(calls):
        party.start(expect, call)
        wait_until(lambda number=number: len(store.engine.scheduler.waiting) == 2 + number)  # type: ignore[misc]
    leave.set()
    party.finish(20)
    assert told == ["b0"] * len(calls)
    assert "b0" not in store
    store.put("b0", page(4))
    assert torch.equal(tensor_of(store, "b0"), page(4))


def test_blocks_that_come_and_go_under_everybodys_feet(store: TierStore) -> None:
    """Calls on a block that others put and delete either work or say that there is none (or already one)."""
    party, stop = Party(), threading.Event()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        calls: list[Callable[[], object]] = [
            lambda: store.put("x", page(chance.random()), tier=chance.choice(["gpu", "ram", "nvme"])),
            lambda: store.delete("x"),
            lambda: store.write("x", page(chance.random())),
            lambda: store.read("x"),
            lambda: store.evict("x"),
            lambda: store.prefetch("x"),
            lambda: store.hold("x", chance.choice(["gpu", "ram", "nvme"])),
            lambda: store.unhold("x"),
            lambda: store.info("x"),
            store.commit,
            store.flush,
            lambda: (store.use("x", "b3", write=True).__enter__(), None)[1],
        ]

        def use() -> None:
            with store.use("x", f"b{chance.randrange(24)}", write="x") as (block, _):
                assert block.min() == block.max()
                block.fill_(chance.random())

        calls[-1] = use
        while not stop.is_set():
            try:
                chance.choice(calls)()
            except TierstoreError as error:
                if not any(text in str(error) for text in ("no block 'x'", "already", "deleted", "is held")):
                    raise

    for seed in range(6):
        party.start(work, seed)
    time.sleep(3)
    stop.set()
    party.finish()
    if "x" in store:
        store.delete("x")


# -- the engine has a loop of its own -----------------------------------------------------------------------------------------


def test_a_blocked_event_loop_delays_no_prefetch(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncTierStore(gpu="8MiB", ram="8MiB", nvme=tmp_path / "swap", device="cpu", policy="lru") as store:
            for number in range(8):
                await store.put(str(number), torch.full((1 << 18,), float(number)), tier="nvme")
            await store.prefetch("3", "4", "5")
            start_ns = store.engine.clock.now_ns()
            time.sleep(1)  # noqa: ASYNC251  # what backward() does to a loop
            end_ns = store.engine.clock.now_ns()
            for number in (3, 4, 5):
                moves = [event for event in store.timeline.transfers if event.block == str(number)]
                assert {str(event.link) for event in moves if event.kind == "prefetch"} >= {"nvme_read", "h2d"}
                assert all(start_ns - 10**9 < event.start_ns <= event.end_ns < start_ns + (end_ns - start_ns) // 2 for event in moves[-2:])
            async with store.use("4") as block:
                assert block[0] == 4
            waits = list(store.timeline.waits)
            assert not any("4" in wait.blocks for wait in waits)
            assert store.stats().tiers["gpu"].hits >= 1

    asyncio.run(scenario())
