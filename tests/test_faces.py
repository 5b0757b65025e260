"""Both faces have the same calls with the same signatures and say what they do; and the async one can be used as promised."""

from __future__ import annotations

import asyncio
import inspect
import threading
from pathlib import Path

import pytest
import torch

from tests.quiet import assert_quiet
from tierstore import AsyncCommitHandle, AsyncTierStore, CommitHandle, TierStore
from tierstore.errors import BusyError, LeaseError

WAITS_FOR_NOTHING = {"use", "info", "stats", "trace", "timeline", "committed", "device", "engine"}
"""Not coroutines on the async face either; `use()` is entered with `async with`."""


def members(kind: type) -> dict[str, object]:
    return {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("sync", "other"), [(TierStore, AsyncTierStore), (CommitHandle, AsyncCommitHandle)])
def test_the_signatures_are_equal(sync: type, other: type) -> None:
    assert members(sync).keys() == members(other).keys()
    for name, member in members(sync).items():
        twin = members(other)[name]
        if isinstance(member, property):
            assert isinstance(twin, property)
            continue
        assert inspect.isfunction(member)
        assert inspect.isfunction(twin)
        one, two = inspect.signature(member), inspect.signature(twin)
        assert one.parameters == two.parameters, name
        assert (
            str(one.return_annotation).replace("CommitHandle", "AsyncCommitHandle").replace("Use", "AsyncUse") == two.return_annotation
        ), name
        if sync is TierStore:
            assert inspect.iscoroutinefunction(twin) == (name not in WAITS_FOR_NOTHING), name
        assert not inspect.iscoroutinefunction(member), name
    assert inspect.signature(sync).parameters == inspect.signature(other).parameters


@pytest.mark.parametrize("kind", [TierStore, AsyncTierStore, CommitHandle, AsyncCommitHandle])
def test_everything_public_has_a_docstring(kind: type) -> None:
    assert kind.__doc__
    for name, member in members(kind).items():
        text = inspect.getdoc(member)
        assert text, name
        assert text[0].isupper(), name
        assert text.split("\n")[0].endswith((".", ":")), name


def test_every_call_of_the_async_face(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncTierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
            await store.put("a", torch.ones(3))
            await store.put("b", {"x": torch.zeros(2), "y": torch.ones(2)}, tier="nvme", frozen=True)
            await store.prefetch("b")
            async with store.use("a", "b", write="a") as (a, b):
                a.add_(b["y"][0])
            assert torch.equal(await store.read("a"), torch.full((3,), 2.0))  # type: ignore[arg-type]
            assert set(await store.read("b")) == {"x", "y"}
            await store.write("a", torch.zeros(3))
            await store.hold("a", "gpu")
            assert store.info("a").hold == "gpu"
            await store.unhold("a")
            await store.evict("a")
            await store.flush()
            assert await store.commit({"step": 1}) == 1
            handle = await store.commit({"step": 2}, wait=False)
            assert isinstance(handle, AsyncCommitHandle)
            assert await handle.result() == 2
            assert handle.done()
            assert store.committed is not None
            assert store.committed.metadata == {"step": 2}
            await store.delete("b")
            assert list(store) == ["a"]
            assert "b" not in store
            assert len(store) == 1
            assert len(store.trace) == 2
            assert store.stats().commits == 2
            assert_quiet(store)

    asyncio.run(scenario())


def test_awaiting_opens_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = await AsyncTierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu")
        await store.put("a", torch.ones(3))
        await store
        with pytest.raises(BusyError):
            await AsyncTierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu")
        await asyncio.gather(store.close(), store.close())
        await store.close()
        first, second = AsyncTierStore(gpu="1MB", ram="1MB", device="cpu"), AsyncTierStore(gpu="1MB", ram="1MB", device="cpu")
        await asyncio.gather(first, first, second)
        assert len(first) == len(second) == 0
        await first.close()
        await second.close()

    asyncio.run(scenario())


def test_both_faces_commit_in_the_background(tmp_path: Path) -> None:
    with TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
        store.put("a", torch.ones(3))
        handle = store.commit("first", wait=False)
        assert isinstance(handle, CommitHandle)
        assert handle.result(10) == 1
        assert handle.done()
        assert handle.result() == 1


def test_one_loop_per_store_and_none_of_the_callers(tmp_path: Path) -> None:
    """A sync store can be used where a loop runs, and an async one on several loops, one after the other."""

    async def sync_inside() -> None:
        with TierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
            store.put("a", torch.ones(3))
            with store.use("a"):
                pass
            store.commit()

    asyncio.run(sync_inside())

    async def opened() -> AsyncTierStore:
        return await AsyncTierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu")

    store = asyncio.run(opened())

    async def used() -> None:
        async with store.use("a", write=True) as a:
            a.add_(1)

    asyncio.run(used())
    thread = threading.Thread(target=lambda: asyncio.run(used()))
    thread.start()
    thread.join()
    value = asyncio.run(store.read("a"))
    assert isinstance(value, torch.Tensor)
    assert value[0] == 3
    asyncio.run(store.close())


def test_a_task_cannot_commit_inside_its_write_lease_but_another_task_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncTierStore(gpu="1MB", ram="1MB", nvme=tmp_path / "swap", device="cpu") as store:
            await store.put("a", torch.ones(3))
            async with store.use("a", write=True):
                with pytest.raises(LeaseError):
                    await store.commit()
                other = asyncio.create_task(store.commit())
                await asyncio.sleep(0.05)
                assert not other.done()
            assert await other == 1

    asyncio.run(scenario())
