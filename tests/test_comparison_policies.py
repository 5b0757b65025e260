"""LRU and the policies for comparison against textbooks: dull caches of equal blocks, written from the papers alone.

The real scheduler runs; a textbook sees the same requests and must hold the same blocks after each of them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_scheduler import Sim
from tierstore.catalog import PAGE
from tierstore.policies import resolve
from tierstore.requests import Record
from tierstore.residency import Tier

Key = tuple[int, int]
"""A block's number, and how many blocks of that number were deleted before."""


# -- the textbooks --------------------------------------------------------------------------------------------------------


class Book:
    """A cache of `room` equal blocks."""

    def __init__(self, room: int) -> None:
        self.room = room

    def request(self, key: Key) -> bool:
        """Returns whether it was a hit."""
        raise NotImplementedError

    def delete(self, key: Key) -> None:
        raise NotImplementedError

    def inside(self) -> set[Key]:
        raise NotImplementedError


class LruBook(Book):
    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.stack: list[Key] = []  # most recent last

    def request(self, key: Key) -> bool:
        hit = key in self.stack
        if hit:
            self.stack.remove(key)
        elif len(self.stack) == self.room:
            self.stack.pop(0)
        self.stack.append(key)
        return hit

    def delete(self, key: Key) -> None:
        if key in self.stack:
            self.stack.remove(key)

    def inside(self) -> set[Key]:
        return set(self.stack)


class FifoBook(LruBook):
    def request(self, key: Key) -> bool:
        if key in self.stack:
            return True
        if len(self.stack) == self.room:
            self.stack.pop(0)
        self.stack.append(key)
        return False


class ClockBook(Book):
    """A ring of frames with a bit each, and a hand. A frame is taken out of the ring with its block, and put in behind the hand."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.ring: list[list[Any]] = []  # [key, bit]
        self.hand = 0

    def request(self, key: Key) -> bool:
        for frame in self.ring:
            if frame[0] == key:
                frame[1] = 1
                return True
        if len(self.ring) == self.room:
            while self.ring[self.hand][1]:
                self.ring[self.hand][1] = 0
                self.hand = (self.hand + 1) % len(self.ring)
            self._take_out(self.hand)
        self.ring.insert(self.hand, [key, 0])
        self.hand += 1
        if self.hand == len(self.ring):
            self.hand = 0
        return False

    def _take_out(self, index: int) -> None:
        del self.ring[index]
        if index < self.hand:
            self.hand -= 1
        if self.hand == len(self.ring):
            self.hand = 0
            # the hand stands before the first frame, and what comes next goes to the end of the ring

    def delete(self, key: Key) -> None:
        for index, frame in enumerate(self.ring):
            if frame[0] == key:
                self._take_out(index)
                return

    def inside(self) -> set[Key]:
        return {frame[0] for frame in self.ring}


class SieveBook(Book):
    """Algorithm 1 of the paper, with a list for the queue (its head is the list's end) and the hand as an object in it."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.queue: list[Key] = []
        self.visited: dict[Key, bool] = {}
        self.hand: Key | None = None

    def request(self, key: Key) -> bool:
        if key in self.queue:
            self.visited[key] = True
            return True
        if len(self.queue) == self.room:
            victim = self.hand if self.hand is not None else self.queue[0]
            while self.visited[victim]:
                self.visited[victim] = False
                victim = self._towards_head(victim) or self.queue[0]
            self.hand = self._towards_head(victim)
            self.queue.remove(victim)
        self.queue.append(key)
        self.visited[key] = False
        return False

    def _towards_head(self, key: Key) -> Key | None:
        index = self.queue.index(key) + 1
        return self.queue[index] if index < len(self.queue) else None

    def delete(self, key: Key) -> None:
        if key in self.queue:
            if self.hand == key:
                self.hand = self._towards_head(key)
            self.queue.remove(key)

    def inside(self) -> set[Key]:
        return set(self.queue)


class S3FifoBook(Book):
    """Algorithm 1 of the paper; lists whose first is the tail. See `tierstore/policies/s3fifo.py` for what the paper leaves open."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.small: list[Key] = []
        self.main: list[Key] = []
        self.ghost: list[Key] = []
        self.freq: dict[Key, int] = {}

    def request(self, key: Key) -> bool:
        if key in self.small or key in self.main:
            self.freq[key] = min(self.freq[key] + 1, 3)
            return True
        if len(self.small) + len(self.main) == self.room:
            self._evict()
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)
        self.freq[key] = 0
        return False

    def _evict(self) -> None:
        if len(self.small) >= 0.1 * self.room or not self.main:
            self._evict_small()
        else:
            self._evict_main()

    def _evict_small(self) -> None:
        while self.small:
            key = self.small.pop(0)
            if self.freq[key] > 1:
                self.main.append(key)
                self.freq[key] = 0
                if len(self.main) > 0.9 * self.room:
                    self._evict_main()
                    return
            else:
                self.ghost.append(key)
                while len(self.ghost) > 0.9 * self.room:
                    self.ghost.pop(0)
                return
        self._evict_main()

    def _evict_main(self) -> None:
        while True:
            key = self.main.pop(0)
            if self.freq[key] == 0:
                return
            self.freq[key] -= 1
            self.main.append(key)

    def delete(self, key: Key) -> None:
        for queue in (self.small, self.main):
            if key in queue:
                queue.remove(key)

    def inside(self) -> set[Key]:
        return {*self.small, *self.main}


class ArcBook(Book):
    """Figure 4 of the paper; lists whose last is the most recently used."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.t1: list[Key] = []
        self.t2: list[Key] = []
        self.b1: list[Key] = []
        self.b2: list[Key] = []
        self.p = 0.0

    def request(self, key: Key) -> bool:
        c = self.room
        if key in self.t1 or key in self.t2:
            (self.t1 if key in self.t1 else self.t2).remove(key)
            self.t2.append(key)
            return True
        if key in self.b1:
            self.p = min(c, self.p + max(len(self.b2) / len(self.b1), 1))
            self._replace(key)
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            self._replace(key)
            self.b2.remove(key)
            self.t2.append(key)
        else:
            if len(self.t1) + len(self.b1) == c:
                if len(self.t1) < c:
                    self.b1.pop(0)
                    self._replace(key)
                else:
                    self.t1.pop(0)
            elif sum(map(len, (self.t1, self.t2, self.b1, self.b2))) >= c:
                if sum(map(len, (self.t1, self.t2, self.b1, self.b2))) == 2 * c:
                    self.b2.pop(0)
                self._replace(key)
            self.t1.append(key)
        return False

    def _replace(self, key: Key) -> None:
        if len(self.t1) + len(self.t2) < self.room:
            return  # something was deleted, and there is room
        if self.t1 and ((key in self.b2 and len(self.t1) == self.p) or len(self.t1) > self.p or not self.t2):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def delete(self, key: Key) -> None:
        for part in (self.t1, self.t2):
            if key in part:
                part.remove(key)

    def inside(self) -> set[Key]:
        return {*self.t1, *self.t2}


BOOKS: dict[str, type[Book]] = {
    "lru": LruBook,
    "fifo": FifoBook,
    "clock": ClockBook,
    "sieve": SieveBook,
    "s3fifo": S3FifoBook,
    "arc": ArcBook,
}


# -- the same requests to both --------------------------------------------------------------------------------------------


class Both:
    """Blocks of one page each; the scheduler and a textbook per tier."""

    def __init__(self, name: str, *, gpu: int, ram: int, num_blocks: int, on: Tier) -> None:
        self.sim = Sim(gpu=gpu, ram=ram, policy=resolve(name))
        self.on = on
        self.books = {Tier.GPU: BOOKS[name](gpu), Tier.RAM: BOOKS[name](ram)}
        self.keys: dict[int, Key] = {}
        self.records: dict[int, Record] = {}
        for number in range(num_blocks):
            self._put(number, 0)

    def _put(self, number: int, life: int) -> None:
        self.keys[number] = (number, life)
        self.records[number] = self.sim.put(f"{number} {life}", 1, tier=self.on)

    def request(self, number: int, *, write: bool = False) -> None:
        self.sim.use(self.records[number], write=write)
        if not self.books[Tier.GPU].request(self.keys[number]):
            self.books[Tier.RAM].request(self.keys[number])

    def delete(self, number: int) -> None:
        self.sim.scheduler.forget(self.records[number])
        self.sim.settle()
        for book in self.books.values():
            book.delete(self.keys[number])
        self._put(number, self.keys[number][1] + 1)

    def check(self, *tiers: Tier) -> None:
        for tier in tiers:
            held = {self.keys[number] for number, record in self.records.items() if record.copy(tier).valid}
            assert held == self.books[tier].inside(), tier


BLOCKS = st.one_of(st.integers(0, 3), st.integers(0, 15))
CALLS = st.lists(st.tuples(BLOCKS, st.sampled_from(["read", "read", "read", "write", "write", "delete"])), max_size=150)


@pytest.mark.parametrize("name", sorted(BOOKS))
@given(CALLS, st.integers(1, 12))
def test_the_device_holds_what_the_textbook_holds(name: str, calls: list[tuple[int, str]], room: int) -> None:
    both = Both(name, gpu=room, ram=20, num_blocks=16, on=Tier.RAM)
    for number, call in calls:
        if call == "delete":
            both.delete(number)
        else:
            both.request(number, write=call == "write")
        both.check(Tier.GPU)


@pytest.mark.parametrize("name", sorted(BOOKS))
@given(st.lists(BLOCKS, max_size=150), st.integers(1, 5), st.integers(2, 11))
def test_ram_holds_what_the_textbook_holds(name: str, numbers: list[int], gpu: int, ram: int) -> None:
    """RAM's requests are the misses on the device."""
    both = Both(name, gpu=gpu, ram=ram, num_blocks=16, on=Tier.NVME)
    for number in numbers:
        both.request(number)
        both.check(Tier.GPU, Tier.RAM)


@pytest.mark.parametrize("name", sorted(set(BOOKS) - {"s3fifo"}))
@given(st.lists(BLOCKS, max_size=300), st.integers(2, 12))
def test_the_textbooks_agree_with_a_cache_simulator(name: str, numbers: list[int], room: int) -> None:
    """A second opinion, where that library is installed. Its S3-FIFO is another one: it fills the main queue first."""
    theirs = pytest.importorskip("libcachesim")
    cache = {"lru": "LRU", "fifo": "FIFO", "clock": "Clock", "sieve": "Sieve", "arc": "ARC"}[name]
    other, book, request = getattr(theirs, cache)(room), BOOKS[name](room), theirs.Request()
    request.obj_size = 1
    for number in numbers:
        request.obj_id = number + 1
        assert other.get(request) == book.request((number, 0))


# -- lru, in bytes and on both tiers ------------------------------------------------------------------------------------------


class TwoTierLru:
    """LRU by bytes on two tiers, the lower one with write-back, as a person would write it down.

    A write makes the upper copy the only good one; the lower tier keeps that block's place, `kept`, for the write-back, and gives kept
    places up, oldest first, when all good copies are gone and it still lacks room. The victims are the least recently used that make room
    together; of these the clean ones leave at once, and a dirty one, once written back, stays after all if there is room by then.
    """

    def __init__(self, gpu: int, ram: int, sizes: dict[int, int]) -> None:
        self.room = {Tier.GPU: gpu, Tier.RAM: ram}
        self.sizes = sizes
        self.gpu: OrderedDict[int, bool] = OrderedDict()  # block -> dirty; least recently used first
        self.ram: OrderedDict[int, bool] = OrderedDict()
        self.kept: OrderedDict[int, None] = OrderedDict()
        self.moved = {"h2d": 0, "d2h": 0, "read": 0, "write": 0}

    def use(self, block: int, *, write: bool) -> None:
        if block not in self.gpu:
            self._make_room_on_gpu(self.sizes[block])
            if block not in self.ram:
                self._make_room_in_ram(self.sizes[block])
                self.moved["read"] += self.sizes[block]
                self.ram[block] = False
            self.ram.move_to_end(block)
            self.moved["h2d"] += self.sizes[block]
            self.gpu[block] = False
        self.gpu.move_to_end(block)
        if write:
            self.gpu[block] = True
            if block in self.ram:
                del self.ram[block]
                self.kept[block] = None

    def _free(self, tier: Tier) -> int:
        taken = self.gpu if tier is Tier.GPU else [*self.ram, *self.kept]
        return self.room[tier] - sum(self.sizes[block] for block in taken)

    def _make_room_on_gpu(self, size: int) -> None:
        victims: list[int] = []
        for block in self.gpu:
            if self._free(Tier.GPU) + sum(self.sizes[victim] for victim in victims) >= size:
                break
            victims.append(block)
        dirty = [block for block in victims if self.gpu[block]]
        for block in dirty:
            self._write_back(block)
        for block in [*(block for block in victims if block not in dirty), *dirty]:
            if self._free(Tier.GPU) < size or block not in dirty:
                del self.gpu[block]

    def _write_back(self, block: int) -> None:
        if block in self.kept:
            del self.kept[block]
        else:
            self._make_room_in_ram(self.sizes[block])
        self.moved["d2h"] += self.sizes[block]
        self.ram[block] = True
        self.gpu[block] = False

    def _make_room_in_ram(self, size: int) -> None:
        while self._free(Tier.RAM) < size:
            if not self.ram:
                self.kept.popitem(last=False)
                continue
            victim, dirty = self.ram.popitem(last=False)
            self.moved["write"] += self.sizes[victim] * dirty


class Weighing(Sim):
    """Counts the pages that cross each link."""

    def __init__(self, gpu: int, ram: int, sizes: dict[int, int]) -> None:
        super().__init__(gpu=gpu, ram=ram, policy=resolve("lru"))
        self.moved = {"h2d": 0, "d2h": 0, "read": 0, "write": 0}
        self.blocks = {number: self.put(f"{number}", size, tier=Tier.NVME) for number, size in sizes.items()}

    def complete(self, order: Any) -> None:
        if order.record is not None:
            self.moved[order.action.value.removeprefix("nvme_")] += order.nbytes // PAGE
        super().complete(order)

    def inside(self, tier: Tier) -> set[int]:
        return {number for number, record in self.blocks.items() if record.copy(tier).valid}


SIZES = st.lists(st.integers(1, 5), min_size=4, max_size=10)
USES = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=80)


def compare(sim: Weighing, book: TwoTierLru, uses: list[tuple[int, bool]], tiers: tuple[Tier, ...], links: tuple[str, ...]) -> None:
    for drawn, write in uses:
        number = drawn % len(book.sizes)
        sim.use(sim.blocks[number], write=write)
        book.use(number, write=write)
        for tier in tiers:
            assert sim.inside(tier) == set(book.gpu if tier is Tier.GPU else book.ram)
        assert [sim.moved[link] for link in links] == [book.moved[link] for link in links]


@given(SIZES, st.lists(st.integers(0, 9), max_size=80), st.integers(5, 16), st.integers(5, 24))
def test_lru_is_the_textbook_s_on_both_tiers(sizes: list[int], uses: list[int], gpu: int, ram: int) -> None:
    """Mixed sizes, read only: the same copies on both tiers, the same bytes on every link."""
    by_number = dict(enumerate(sizes))
    sim, book = Weighing(gpu, ram, by_number), TwoTierLru(gpu, ram, by_number)
    compare(sim, book, [(number, False) for number in uses], (Tier.GPU, Tier.RAM), ("h2d", "d2h", "read", "write"))


@given(SIZES, USES, st.integers(5, 16))
def test_lru_is_the_textbook_s_where_blocks_are_written(sizes: list[int], uses: list[tuple[int, bool]], gpu: int) -> None:
    """Mixed sizes, and room in RAM for every block."""
    by_number = dict(enumerate(sizes))
    sim, book = Weighing(gpu, sum(sizes), by_number), TwoTierLru(gpu, sum(sizes), by_number)
    compare(sim, book, uses, (Tier.GPU, Tier.RAM), ("h2d", "d2h", "read", "write"))


@given(USES, st.integers(1, 6), st.integers(2, 8))
def test_lru_on_the_device_is_the_textbook_s_however_little_ram_has(uses: list[tuple[int, bool]], gpu: int, ram: int) -> None:
    """Equal blocks, written, and RAM full. RAM itself is no textbook then: what is on its way there cannot leave, so that others do."""
    by_number = dict.fromkeys(range(10), 1)
    sim, book = Weighing(gpu, ram, by_number), TwoTierLru(gpu, ram, by_number)
    compare(sim, book, uses, (Tier.GPU,), ("h2d", "d2h"))
