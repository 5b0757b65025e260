"""Who waits: the indices say what a look at every request would, and a thousand waiters cost no look per pair of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.quiet import assert_quiet
from tierstore import AsyncTierStore
from tierstore.catalog import BlockId, lay_out
from tierstore.fitness import Prospect
from tierstore.requests import Record, Request, Save, Use, claim
from tierstore.scheduler import Scheduler
from tierstore.waiting import Claims, Waiting

RECORDS = [Record(BlockId(number), lay_out(f"b{number}", [("t", "F32", (4,))])) for number in range(4)]

ASKED = st.lists(
    st.tuples(
        st.integers(0, 3),  # owner
        st.dictionaries(st.sampled_from(range(4)), st.booleans(), min_size=1, max_size=3),  # block -> whether it is written
        st.sampled_from(["use", "use", "use", "commit", "flush"]),
        st.sampled_from(["stays", "goes", "begins"]),
    ),
    max_size=12,
)


def request_of(owner: int, blocks: dict[int, bool], kind: str) -> Request:
    if kind == "use":
        return Use(
            owner, tuple(RECORDS[number] for number in blocks), writes=frozenset(number for number, write in blocks.items() if write)
        )
    return Save(owner, (), commit=kind == "commit")


@given(asked=ASKED, holders=st.sets(st.integers(0, 3)), favourite=st.integers(0, 12))
def test_the_indices_say_what_a_look_at_every_request_would(
    asked: list[tuple[int, dict[int, bool], str, str]], holders: set[int], favourite: int
) -> None:
    waiting, dull = Waiting(), []
    for number, (owner, blocks, kind, _) in enumerate(asked):
        request = request_of(owner, blocks, kind)
        request.sequence = number
        waiting.add(request)
        dull.append(request)
    for request, (_, _, _, becomes) in zip(list(dull), asked, strict=True):
        if becomes == "goes":
            assert waiting.remove(request)
            assert not waiting.remove(request)
            dull.remove(request)
        elif becomes == "begins" and isinstance(request, Save):
            waiting.begin(request)
    assert list(waiting.values()) == dull
    assert waiting.saving_commits == sum(isinstance(request, Save) and request.commit and request.started for request in dull)
    assert waiting.unbegun_commits == sum(isinstance(request, Save) and request.commit and not request.started for request in dull)
    for record in RECORDS:
        assert list(waiting.wanting(record)) == [request for request in dull if record in request.records]
    assert {owner for owner in range(4) if waiting.asks(owner)} == {request.owner for request in dull}
    urgent = sorted(dull, key=lambda request: (request.sequence != favourite, request.owner not in holders, request.sequence))
    assert waiting.in_order(holders, favourite) == urgent


@given(asked=ASKED)
def test_claims_are_what_comparing_every_pair_finds(asked: list[tuple[int, dict[int, bool], str, str]]) -> None:
    claims, before = Claims(), []
    for owner, blocks, _, _ in asked:
        reads, writes = claim(request_of(owner, blocks, "use"))
        excluded = {
            number
            for other, theirs in before
            if other != owner
            for number, write in blocks.items()
            if number in theirs and (write or theirs[number])
        }
        assert set(claims.contended(owner, reads, writes)) == excluded
        claims.add(owner, reads, writes)
        before.append((owner, blocks))


def test_many_waiters_cost_no_look_per_pair_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 200 tasks at one block: before, whether a lease could ever be granted was asked 40,000 times, now once each."""
    num_tasks = 200
    asked: Counter[str] = Counter()
    for kind, name in ((Scheduler, "_conflict"), (Prospect, "grantable")):
        original = getattr(kind, name)

        def counting(self: object, *arguments: object, original: object = original, name: str = name, **more: object) -> object:
            asked[name] += 1
            return original(self, *arguments, **more)  # type: ignore[operator]

        monkeypatch.setattr(kind, name, counting)

    async def main() -> None:
        async with AsyncTierStore("64KiB", "1MiB", tmp_path / "swap", device="cpu") as store:
            await store.put("b", torch.zeros(8))

            async def one() -> None:
                async with store.use("b", write=True) as tensor:
                    tensor.add_(1)
                    await asyncio.sleep(0)

            await asyncio.gather(*(one() for _ in range(num_tasks)))
            assert (await store.read("b")).tolist() == [num_tasks] * 8  # type: ignore[union-attr]
            assert_quiet(store)

    asyncio.run(main())
    assert asked["grantable"] <= 4 * num_tasks
    assert asked["_conflict"] <= 20 * num_tasks
