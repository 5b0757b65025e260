"""Blocks without content: leases that load nothing (`fresh`), and that leave nothing behind (`spent`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import pytest
import torch

from tests.quiet import assert_quiet
from tierstore import TierStore
from tierstore.catalog import lay_out
from tierstore.errors import BlockNotFoundError, CapacityError, DeadlockError, LeaseError
from tierstore.mover import operations
from tierstore.mover.calls import Ticket
from tierstore.sync import Use

KIB = 1 << 10
PAYLOAD = 256 * KIB


def declare(store: TierStore, name: str, numel: int = PAYLOAD // 4) -> None:
    """A blank block of `numel` fp32."""
    block = lay_out(name, [(name, "F32", (numel,))], single=True)
    store._run(operations.declare(store.engine, block, threading.get_ident()))


def lease(store: TierStore, *names: str, fresh: Collection[str] = (), spent: Collection[str] = (), owner: object = None) -> Use:
    return Use(store.engine, names, set(fresh) | set(spent), None, fresh=fresh, spent=spent, owner=owner)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TierStore]:
    """Room for four blocks on the device and six in RAM. What is loaded is loaded for leases: nobody guesses what comes next."""
    with TierStore(gpu=4 * PAYLOAD, ram=6 * PAYLOAD + (1 << 20), nvme=tmp_path / "swap", device="cpu", policy="lru") as store:
        yield store


@pytest.fixture
def two_tiers() -> Iterator[TierStore]:
    with TierStore(gpu=4 * PAYLOAD, ram=8 * PAYLOAD, device="cpu", policy="lru") as store:
        yield store


def filled(store: TierStore, name: str, value: float) -> None:
    with lease(store, name, fresh=[name]) as tensor:
        tensor.fill_(value)


def links(store: TierStore) -> dict[str, int]:
    return {name: link.bytes for name, link in store.stats().links.items()}


@pytest.mark.parametrize("tiers", ["store", "two_tiers"])
def test_a_blank_block_holds_nothing_and_is_written_whole(tiers: str, request: pytest.FixtureRequest) -> None:
    store: TierStore = request.getfixturevalue(tiers)
    declare(store, "g")
    assert "g" in store
    assert store.info("g").tiers == ()
    assert not store.info("g").dirty
    for call in (lambda: store.read("g"), lambda: store.use("g").__enter__(), lambda: store.write("g", torch.zeros(PAYLOAD // 4))):
        with pytest.raises(LeaseError, match="has no content"):
            call()
    before = links(store)
    filled(store, "g", 3.0)
    assert links(store) == before  # nothing was moved for it
    assert store.read("g").eq(3).all()
    store.evict("g")
    assert store.read("g").eq(3).all()
    with lease(store, "g", spent=["g"]) as tensor:
        assert tensor.eq(3).all()
    assert store.info("g").tiers == ()
    assert store.stats().tiers["gpu"].used_bytes == 0
    with pytest.raises(LeaseError, match="has no content"):
        store.read("g")
    filled(store, "g", 4.0)
    assert store.read("g").eq(4).all()
    store.delete("g")
    assert "g" not in store


def test_what_is_spent_is_never_written_back(store: TierStore) -> None:
    """Twenty rounds over more blocks than there is room for, each spent before the next needs the room."""
    for number in range(20):
        declare(store, f"g{number}")
    for _ in range(3):
        for number in range(20):
            filled(store, f"g{number}", number)
            with lease(store, f"g{number}", spent=[f"g{number}"]) as tensor:
                assert tensor.eq(number).all()
    assert all(nbytes == 0 for nbytes in links(store).values()), links(store)


@pytest.mark.parametrize("tiers", ["store", "two_tiers"])
def test_content_that_waits_is_evicted_and_comes_back(tiers: str, request: pytest.FixtureRequest) -> None:
    """More content than the device holds: written back as any other, dropped when spent, and old content is not loaded to be lost."""
    store: TierStore = request.getfixturevalue(tiers)
    count = 12 if tiers == "store" else 7
    for number in range(count):
        declare(store, f"g{number}")
    for number in range(count):
        filled(store, f"g{number}", number)
    for number in range(count):
        with lease(store, f"g{number}", spent=[f"g{number}"]) as tensor:
            assert tensor.eq(number).all()
    stats = store.stats()
    assert stats.tiers["gpu"].evictions
    assert stats.links["d2h"].bytes
    assert stats.tiers["gpu"].used_bytes == 0
    assert_quiet(store)  # a lease begins before the load that it waited for is counted
    loaded = links(store)["h2d"]
    for number in range(count):
        filled(store, f"g{number}", -number)
    for number in range(count):  # written anew, whatever the tiers still have of it
        filled(store, f"g{number}", number + 0.5)
    assert links(store)["h2d"] == loaded
    for number in range(count):
        assert store.read(f"g{number}").eq(number + 0.5).all()


def test_a_commit_passes_blank_blocks_by(tmp_path: Path) -> None:
    with TierStore(gpu=4 * PAYLOAD, ram=8 * PAYLOAD, nvme=tmp_path / "swap", device="cpu") as store:
        store.put("w", torch.ones(8))
        for name in ("blank", "full", "spent"):
            declare(store, name)
        filled(store, "full", 2.0)
        filled(store, "spent", 2.0)
        store.commit()
        with lease(store, "spent", spent=["spent"]):
            pass
        written = links(store)["nvme_write"]
        store.commit()
        assert links(store)["nvme_write"] == written
    with TierStore(gpu=4 * PAYLOAD, ram=8 * PAYLOAD, nvme=tmp_path / "swap", device="cpu") as store:
        assert sorted(store) == ["full", "w"]
        assert store.read("full").eq(2).all()


def test_what_cannot_be_given_leaves_nothing_behind(store: TierStore) -> None:
    declare(store, "g")
    store.put("w", torch.zeros(4 * PAYLOAD // 4))
    with pytest.raises(CapacityError), lease(store, "g", "w", fresh=["g"]):
        pass
    assert store.stats().tiers["gpu"].used_bytes == 0
    with pytest.raises(BlockNotFoundError), lease(store, "g", "none", fresh=["g"]):
        pass
    assert store.stats().tiers["gpu"].used_bytes == 0
    assert store.info("g").tiers == ()


def test_a_fresh_lease_waits_for_room(store: TierStore) -> None:
    """Another thread leases the whole device; the fresh lease comes when it lets go."""
    for number in range(4):
        store.put(f"w{number}", torch.full((PAYLOAD // 4,), float(number)))
    declare(store, "g")
    begun = threading.Event()

    def other() -> None:
        begun.set()
        filled(store, "g", 7.0)

    with store.use("w0", "w1", "w2", "w3", write=True):
        thread = threading.Thread(target=other)
        thread.start()
        begun.wait()
        assert store.info("g").tiers == ()
    thread.join()
    assert store.read("g").eq(7).all()
    assert store.read("w3").eq(3).all()


def test_an_owner_may_be_handed_to_another_thread(store: TierStore) -> None:
    """What one thread leases for an owner, another that acts for the same owner may lease too."""
    store.put("w", torch.zeros(4))
    found: list[bool] = []

    def helper() -> None:
        with lease(store, "w", spent=["w"], owner="the loop") as tensor:
            found.append(bool(tensor.eq(0).all()))

    with Use(store.engine, ("w",), True, None, owner="the loop"):
        thread = threading.Thread(target=helper)
        thread.start()
        thread.join(20)
        assert found == [True]
        assert store.info("w").tiers  # it is still leased, so not spent yet
    assert store.read("w").eq(0).all()


def test_what_was_put_off_is_done_when_asked_for(store: TierStore) -> None:
    store.put("w", torch.zeros(4))
    store.put("v", torch.zeros(4))
    done: list[str] = []

    def finish() -> None:
        del store.engine.unsettled["w"]
        store.write("w", torch.ones(4))
        done.append("w")

    calls = (lambda: store.read("w"), lambda: store.use("w").__enter__(), store.commit, store.flush)
    for call in calls[::-1]:
        store.engine.unsettled["w"] = finish
        store.read("v")
        assert not done
        call()
        assert done == ["w"]
        done.clear()
    assert store.read("w").eq(1).all()


@pytest.mark.parametrize("tiers", ["store", "two_tiers"])
def test_a_lease_that_comes_too_late_uses_nothing_up(tiers: str, request: pytest.FixtureRequest) -> None:
    """It was granted as its owner stopped waiting: nobody has read what was to be spent."""
    store: TierStore = request.getfixturevalue(tiers)
    declare(store, "g")
    filled(store, "g", 3.0)
    ticket = Ticket("late")
    with store.use("g"):
        future = store.engine.begin_use(ticket, ("g",), frozenset({"g"}), spent=("g",))
        assert future is not None
    future.result(20)
    store.engine.abandon(ticket)
    assert store.read("g").eq(3).all()


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("tiers", ["store", "two_tiers"])
def test_a_fresh_lease_that_comes_too_late_leaves_no_garbage(tiers: str, evicted: bool, request: pytest.FixtureRequest) -> None:
    store: TierStore = request.getfixturevalue(tiers)
    declare(store, "g")
    for number in range(4):
        store.put(f"w{number}", torch.full((PAYLOAD // 4,), float(number)))
    if evicted:
        filled(store, "g", 3.0)
        store.evict("g")
    ticket = Ticket("late")
    with store.use("w0", "w1", "w2", "w3"):
        future = store.engine.begin_use(ticket, ("g",), frozenset({"g"}), fresh=("g",))
        assert future is not None
    future.result(20)
    store.engine.abandon(ticket)
    with pytest.raises(LeaseError, match="has no content"):
        store.read("g")
    filled(store, "g", 4.0)
    assert store.read("g").eq(4).all()


def test_a_fresh_lease_is_not_blamed_for_the_one_before(store: TierStore) -> None:
    """Block and extent are the same, and the engine's thread has not looked since: what autograd saves now stays good, and only that."""
    declare(store, "g")
    filled(store, "g", 2.0)
    weight = torch.ones(PAYLOAD // 4, requires_grad=True)
    go_on = threading.Event()
    store.engine.loop.call_soon_threadsafe(go_on.wait, 20)
    with lease(store, "g", spent=["g"]) as tensor:
        before = (weight * tensor).sum()
    with lease(store, "g", fresh=["g"]) as tensor:
        tensor.fill_(3.0)
        after = (weight * tensor).sum()
    go_on.set()
    store.read("g")  # by now it has looked
    after.backward()
    assert weight.grad is not None
    assert weight.grad.eq(3).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


def soon(store: TierStore, steps: int, function: Callable[[], object]) -> None:
    """Call it on the engine's loop, so many turns from now."""
    loop = store.engine.loop
    loop.call_soon_threadsafe(function if steps == 0 else lambda: soon(store, steps - 1, function))


def test_a_deadlock_is_seen_although_a_block_is_declared_meanwhile(store: TierStore) -> None:
    """Nobody is refused while a block is made, and nobody looked again when it was."""
    engine = store.engine
    for name in ("a", "b"):
        store.put(name, torch.zeros(4), tier="gpu")
    for owner, name in (("one", "a"), ("two", "b")):
        assert engine.begin_use(Ticket(owner), (name,), True) is None
    first = engine.begin_use(Ticket("one"), ("b",), True)
    second: Future[Future[None] | None] = Future()
    go_on = threading.Event()
    engine.loop.call_soon_threadsafe(go_on.wait, 20)
    block = lay_out("g", [("g", "F32", (4,))], single=True)
    declared = engine.call(operations.declare(engine, block, "three"))
    soon(store, 1, lambda: second.set_result(engine.begin_use(Ticket("two"), ("a",), True)))  # in between its request and the look at it
    go_on.set()
    declared.result.result(20)
    futures = [future for future in (first, second.result(20)) if future is not None]
    assert len(futures) == 2
    with pytest.raises(DeadlockError):
        next(iter(wait(futures, 20, FIRST_COMPLETED).done)).result(0)


def test_a_cancelled_declaration_leaves_no_block(store: TierStore) -> None:
    """Whenever it is cancelled: either it is there, and the caller knows, or it is not."""
    for turns in range(8):
        block = lay_out("g", [("g", "F32", (4,))], single=True)
        go_on = threading.Event()
        store.engine.loop.call_soon_threadsafe(go_on.wait, 20)
        call = store.engine.call(operations.declare(store.engine, block, "main"))
        soon(store, turns, call._cancel)
        go_on.set()
        call.ended.result(20)
        told = not call.result.cancelled() and call.result.exception() is None
        assert told == ("g" in store), f"cancelled after {turns} turns"
        if told:
            store.delete("g")
    assert store.stats().tiers["ram"].used_bytes == store.engine.transfer.nbytes


def test_a_commit_holds_what_a_fresh_lease_replaces_right_behind_it(tmp_path: Path) -> None:
    """The lease was granted in the same look that fixed the commit's state, which then lacked the block: it was nowhere any more."""
    with TierStore(gpu=4 * PAYLOAD, ram=8 * PAYLOAD, nvme=tmp_path / "swap", device="cpu") as store:
        store.put("w", torch.ones(4))
        declare(store, "g")
        filled(store, "g", 2.0)
        store.commit()
        store.evict("g")
        ticket = Ticket("eager")
        with store.use("w", write=True) as weight:
            weight.add_(1)
            commit = operations.start_commit(store.engine, "other", None, wait=True)
            future = store.engine.begin_use(ticket, ("g",), frozenset({"g"}), fresh=("g",))
            assert future is not None, "nobody begins to write while a commit waits for writers"
        future.result(20)
        store.engine.finish_wait(ticket)
        for tensors in store.engine.tensors(ticket).values():
            tensors[0].fill_(3.0)
        commit.result.result(20)
        store.engine.end_use(ticket)
    with TierStore(gpu=4 * PAYLOAD, ram=8 * PAYLOAD, nvme=tmp_path / "swap", device="cpu") as store:
        assert sorted(store) == ["g", "w"]
        assert store.read("g").eq(2).all()
        assert store.read("w").eq(2).all()


@pytest.mark.parametrize("tiers", ["store", "two_tiers"])
def test_an_exception_uses_nothing_up_and_leaves_no_garbage(tiers: str, request: pytest.FixtureRequest) -> None:
    """What it was to be used for has not happened, and of what was to be written whole nobody knows how much was."""
    store: TierStore = request.getfixturevalue(tiers)
    declare(store, "used")
    declare(store, "written")
    filled(store, "used", 3.0)
    with pytest.raises(ZeroDivisionError), lease(store, "used", "written", fresh=["written"], spent=["used"]) as (used, written):
        written[:100].fill_(1 / int(used.sub(3).sum()))
    assert store.read("used").eq(3).all()
    with pytest.raises(LeaseError, match="has no content"):
        store.read("written")
    with lease(store, "used", spent=["used"]):
        pass
    with pytest.raises(LeaseError, match="has no content"):
        store.read("used")
