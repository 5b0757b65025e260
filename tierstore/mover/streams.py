"""Copies between the host arena and the device arena.

Two kinds with one interface: CUDA side streams ordered by events, and threads where the device is the CPU. An order is
reported twice: `ordered`, when device work issued from now on will see it done, and `done`, when the bytes have landed and the
host may reuse the source. On the CPU both come together.

[Note: Reusing an extent]
A copy out of an extent, or a kernel that reads it, may still be queued when Python returns. Behind each such use an event is
recorded and kept by stream and by the range it concerns (`_uses`), the latest of each; whoever writes into the range later has its
stream wait for all events that overlap it. Nothing waits on the host. `_ready` holds, by offset, the event behind the copy that
filled an extent: a lease has the compute stream wait for it, and the copy back waits for both.

Copies in and moves follow one another on one stream, so what fills an extent there is behind all that it did before. A lease that
writes all of its extent itself is not: there, a block may still be read that has been evicted or moved away, or filled that nobody came
to use, each of a length of its own. So moves are noted as uses of where they come from, and a copy in as one when the next begins at
the same place and ends sooner; `take` waits for all of them. An event is never recorded twice, so it cannot be reused while somebody
may still wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from ctypes import memmove
from functools import partial
from typing import Any, Protocol

import torch
from sortedcontainers import SortedDict

from tierstore.catalog import PAGE
from tierstore.pace import between_ns
from tierstore.requests import Action, Order
from tierstore.residency import Tier
from tierstore.threads import Threads
from tierstore.tiers.device import DeviceArena, flat_bytes
from tierstore.tiers.ram import HostArena

log = logging.getLogger("tierstore")

Report = Callable[[Order, BaseException | None], None]

RUN_AHEAD = 256
"""Leases released by the host whose device work may still be queued."""

PRUNE_AT = 256
"""Extents with noted uses above which finished ones are looked for."""

LANE_BYTES = 16 << 20
LANE_SHARE = 64
"""The lane is at most this fraction of the device's budget."""

REST_S = 0.003
"""For which a copy that has landed is left to be found by who uses the store."""

FEW_USES = 4
"""Of different streams or lengths, noted for extents that begin at one place, above which finished ones are looked for."""


class Copies(Protocol):
    """Carries out H2D, D2H and COMPACT orders."""

    asynchronous: bool
    """Whether copies are ordered by events, so that `ordered` comes before `done`."""

    hurried: Callable[[], bool]
    """Whether somebody waits; set by the engine."""

    timing: Callable[[], bool]
    """Whether copies are to be timed; set by the engine."""

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        """Carry the order out. Called by one thread at a time; `done` may come from any thread, `ordered` before it.

        H2D orders, and those that move blocks together on the device, take effect in the order in which they are started: an extent
        may be filled right behind the move that brings it to its place.
        """
        ...

    def took(self, order: Order) -> float | None:
        """Seconds for which a copy that has ended was at work on its link; None: not timed, or by the clock as well. Asked once."""
        ...

    def poll(self) -> None:
        """Report what has landed. Called by who may call `start`; nobody need call it, it comes sooner so."""
        ...

    def lease(self, offsets: Iterable[tuple[int, int]]) -> object:
        """Have the caller's current stream wait for what is under way on extents (offset, bytes). Returns that stream."""
        ...

    def take(self, offsets: Iterable[tuple[int, int]]) -> None:
        """Have the caller's current stream wait for whatever else used these ranges before: it fills them itself."""
        ...

    def note_use(self, offsets: Iterable[tuple[int, int]], stream: object) -> None:
        """Note that a stream, as `lease` returned it, uses the extents up to here. Any thread; does not wait."""
        ...

    def release(self, offsets: Iterable[tuple[int, int]]) -> int:
        """Note that the caller's current stream uses the extents up to here. Returns nanoseconds spent at the run-ahead cap."""
        ...

    def mark(self) -> object | None:
        """Mark where the caller's current stream is; None: there is none, and the clock will do. See `pace`, [Note: Marks]."""
        ...

    def between(self, first: Any, second: Any) -> float | None:
        """Seconds from one mark to another; None: not known yet."""
        ...

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Copy device bytes at `offset` to a host tensor (uint8), and wait for it. Any thread but the training loop's."""
        ...

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Copy a tensor's elements, row-major, to the device at `offset`, and wait for it."""
        ...

    def close(self) -> None: ...


class OnCpu:
    """What needs no ordering where the device is the CPU: leases, and the host's own reads and writes."""

    asynchronous = False

    def __init__(self, device: DeviceArena) -> None:
        self._device = device
        self.hurried: Callable[[], bool] = lambda: True
        self.timing: Callable[[], bool] = lambda: False

    def took(self, order: Order) -> float | None:
        return None

    def poll(self) -> None:
        pass

    def lease(self, offsets: Iterable[tuple[int, int]]) -> object:
        return None

    def take(self, offsets: Iterable[tuple[int, int]]) -> None:
        pass

    def note_use(self, offsets: Iterable[tuple[int, int]], stream: object) -> None:
        pass

    def release(self, offsets: Iterable[tuple[int, int]]) -> int:
        return 0

    def mark(self) -> object | None:
        return None

    def between(self, first: Any, second: Any) -> float | None:
        return between_ns(first, second)

    def read(self, offset: int, target: torch.Tensor) -> None:
        target.copy_(self._device.tensor[offset : offset + target.numel()])

    def write(self, offset: int, source: torch.Tensor) -> None:
        flat = flat_bytes(source)
        self._device.tensor[offset : offset + flat.numel()].copy_(flat)


class ThreadCopies(OnCpu):
    """The device is the CPU: one thread per direction copies."""

    def __init__(self, device: DeviceArena, host: HostArena) -> None:
        super().__init__(device)
        self._host = host
        self._pools = {
            Action.H2D: Threads("tierstore-h2d", 1),
            Action.D2H: Threads("tierstore-d2h", 1),
        }

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        if order.action is Action.COMPACT:
            arena = self._device.tensor if order.tier is Tier.GPU else self._host.tensor
            start_move(self._pools[Action.H2D], arena, order, ordered, done)
            return
        pool = self._pools[order.action]
        future = pool.submit(self._carry_out, order)

        def report(future: Future[None]) -> None:
            error = future.exception()
            if error is None:
                ordered(order, None)
            done(order, error)

        future.add_done_callback(report)

    def _carry_out(self, order: Order) -> None:
        gpu = self._device.tensor[order.offset_gpu : order.offset_gpu + order.nbytes]
        ram = self._host.tensor[order.offset_ram : order.offset_ram + order.nbytes]
        if order.action is Action.H2D:
            gpu.copy_(ram)
        else:
            ram.copy_(gpu)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown()


def start_move(pool: Threads, arena: torch.Tensor, order: Order, ordered: Report, done: Report) -> None:
    """Carry out a compaction in host memory.

    What is booked must come to be, or nobody knows which bytes are where. So where the thread fails, or there is none, the
    moves that are left are made right here: on the engine's thread, or on the dying one.
    """
    left = deque(order.moves)

    def move() -> None:
        base = arena.data_ptr()
        while left:
            record, source, target = left[0]
            memmove(base + target, base + source, record.nbytes)  # allows ranges to overlap, and releases the GIL
            left.popleft()

    def report(future: Future[None]) -> None:
        if future.exception() is not None:
            move()
        ordered(order, None)
        done(order, None)

    try:
        future = pool.submit(move)
    except (OSError, RuntimeError) as error:
        log.warning("moving blocks together on the engine's thread: %s", error)
        move()
        ordered(order, None)
        done(order, None)
    else:
        future.add_done_callback(report)


def lane_bytes(gpu_bytes: int) -> int:
    """Of a GPU's budget, the part through which blocks are moved."""
    return min(LANE_BYTES, gpu_bytes // LANE_SHARE // PAGE * PAGE)


def slide(arena: torch.Tensor, lane: torch.Tensor, source: int, target: int, nbytes: int) -> None:
    """Move a block within `arena`, on the current stream; where it was and where it will be may overlap.

    What one copy reads and writes must not overlap: it takes as much as the block moves by. Where that is little, and the copies would
    be as many as the block has pages, it goes through `lane`, memory of its own.
    """
    shift = abs(source - target)
    step = min(nbytes, max(shift, lane.numel()))
    starts = range(0, nbytes, step)
    for start in starts if target < source else reversed(starts):
        length = min(step, nbytes - start)
        piece = arena[source + start : source + start + length]
        if length > shift:
            piece = lane[:length].copy_(piece)
        arena[target + start : target + start + length].copy_(piece)


class CudaCopies:
    """Two fixed side streams, one per direction, and one waiter thread behind each."""

    asynchronous = True

    def __init__(self, device: DeviceArena, host: HostArena, transfer: HostArena, ring: tuple[int, int], lane: int = 0) -> None:
        """Start the streams and their threads.

        Args:
            device, host: The arenas.
            transfer: Page-locked transfer space.
            ring: (offset, bytes of one slot) in it: four slots through which extents that are not page-locked are copied.
            lane: Bytes at the end of the device arena, in which no extents lie, through which blocks are moved by less than their length.
        """
        self.hurried: Callable[[], bool] = lambda: True
        self.timing: Callable[[], bool] = lambda: False
        self._timed: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}  # order -> before and behind the copy
        self._device = device
        self._host = host
        self._at = device.device
        self._index = self._at.index
        self._known: dict[int, torch.cuda.Stream] = {}  # callers' streams by their handle
        self._h2d = torch.cuda.Stream(self._at)
        self._d2h = torch.cuda.Stream(self._at)
        self._transfer = transfer
        self._ring = ring
        self._lane = device.tensor[device.nbytes - lane :]
        self._ready: dict[int, tuple[int, torch.cuda.Event]] = {}  # offset -> (end, event)
        self._uses: SortedDict[int, dict[tuple[int, int], torch.cuda.Event]] = SortedDict()  # offset -> (stream, end) -> event
        self._longest = 0  # bytes of the longest range ever noted in it
        self._pruned_to = 0
        self._lock = threading.Lock()
        self._run_ahead: deque[torch.cuda.Event] = deque()
        self._flights: dict[Action, deque[_Flight]] = {Action.H2D: deque(), Action.D2H: deque()}
        self._waiters = {
            action: _Waiter(f"tierstore-{action.value}-done", self._at, self._is_hurried) for action in (Action.H2D, Action.D2H)
        }
        self._host_moves = Threads("tierstore-move", 1)
        self._staged = {
            Action.H2D: Threads("tierstore-ring-h2d", 1),
            Action.D2H: Threads("tierstore-ring-d2h", 1),
        }

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        if order.action is Action.COMPACT:
            self._compact(order, ordered, done)
            return
        stream = self._h2d if order.action is Action.H2D else self._d2h
        pieces = list(self._host.pieces(order.offset_ram, order.nbytes))
        if not all(locked for _, _, locked in pieces):
            self._stage(order, ordered, done)
            return
        with torch.cuda.stream(stream):
            self._order_before(order, stream)
            begin = self._begin(stream)
            for offset, nbytes, _ in pieces:
                self._copy(order, self._host.tensor[offset : offset + nbytes], offset - order.offset_ram)
            event = self._record_behind(order, stream, begin)
        ordered(order, None)
        flight = _Flight(event, partial(done, order))
        self._flights[order.action].append(flight)
        self._waiters[order.action].wait_for(flight)

    def _is_hurried(self) -> bool:
        return self.hurried()

    def took(self, order: Order) -> float | None:
        timed = self._timed.pop(order.number, None)
        return None if timed is None else self.between(*timed)

    def poll(self) -> None:
        for flights in self._flights.values():
            while flights:
                try:
                    if not flights[0].event.query():
                        break
                except RuntimeError as error:  # CUDA is lost to this process
                    flights.popleft().land(error)
                else:
                    flights.popleft().land(None)

    # -- one copy ----------------------------------------------------------------------------------------------------------

    def _order_before(self, order: Order, stream: torch.cuda.Stream) -> None:
        start, end = order.offset_gpu, order.offset_gpu + order.nbytes
        self._wait_for_uses(stream, start, end, writes=order.action is Action.H2D)
        ready = self._ready.get(start)
        if order.action is Action.D2H and ready is not None:
            stream.wait_event(ready[1])

    def _begin(self, stream: torch.cuda.Stream) -> torch.cuda.Event | None:
        if not self.timing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _record_behind(self, order: Order, stream: torch.cuda.Stream, begin: torch.cuda.Event | None) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=begin is not None, blocking=True)
        event.record(stream)
        if begin is not None:
            self._timed[order.number] = begin, event
        if order.action is Action.H2D:
            if len(self._ready) > PRUNE_AT:
                for offset in [offset for offset, (_, ready) in list(self._ready.items()) if ready.query()]:
                    self._ready.pop(offset, None)
            self._note_ready(order.offset_gpu, order.nbytes, event)
        else:
            with self._lock:
                self._note_use(order.offset_gpu, order.nbytes, stream, event)
        return event

    def _copy(self, order: Order, ram: torch.Tensor, skip: int) -> None:
        """Queue the copy between `ram` (uint8) and the device extent from its byte `skip` on, on the current stream."""
        gpu = self._device.tensor[order.offset_gpu + skip : order.offset_gpu + skip + ram.numel()]
        if order.action is Action.H2D:
            gpu.copy_(ram, non_blocking=True)
        else:
            ram.copy_(gpu, non_blocking=True)

    def _wait_for_uses(self, stream: torch.cuda.Stream, start: int, end: int, *, writes: bool) -> None:
        """Have `stream` wait for every unfinished use that overlaps [start, end).

        Args:
            writes: The stream fills the range next, so that whoever waits for it need not wait for these uses again.
        """
        with self._lock:
            for offset in list(self._uses.irange(start - self._longest, end, inclusive=(False, False))):
                uses = self._uses[offset]
                for (key, stop), event in list(uses.items()):
                    if start < stop:
                        over = event.query()
                        if not over:
                            stream.wait_event(event)
                        if over or (writes and start <= offset and stop <= end):
                            del uses[key, stop]
                if not uses:
                    del self._uses[offset]

    def _note_use(self, offset: int, nbytes: int, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Under `_lock`."""
        here: dict[tuple[int, int], torch.cuda.Event] = self._uses.setdefault(offset, {})
        self._longest = max(self._longest, nbytes)
        here[stream.cuda_stream, offset + nbytes] = event
        if len(here) > FEW_USES:
            for key in [key for key, other in here.items() if other.query() and other is not event]:
                del here[key]
        if len(self._uses) > PRUNE_AT and len(self._uses) > 2 * self._pruned_to:
            for other, uses in list(self._uses.items()):
                for key, noted in list(uses.items()):
                    if noted.query():
                        del uses[key]
                if not uses:
                    del self._uses[other]
            self._pruned_to = len(self._uses)

    def _note_ready(self, offset: int, nbytes: int, event: torch.cuda.Event) -> None:
        earlier = self._ready.get(offset)
        self._ready[offset] = (offset + nbytes, event)
        self._note_fill_beyond(earlier, offset, nbytes)

    def _note_fill_beyond(self, earlier: tuple[int, torch.cuda.Event] | None, offset: int, nbytes: int) -> None:
        """What filled more than the extent at `offset`, and is no longer `_ready` there.

        A use of the same range that is noted on that stream came later, and is the one to wait for.
        """
        if earlier is not None and earlier[0] > offset + nbytes and not earlier[1].query():
            with self._lock:
                if (self._h2d.cuda_stream, earlier[0]) not in self._uses.get(offset, ()):
                    self._note_use(offset, earlier[0] - offset, self._h2d, earlier[1])

    # -- extents that are not page-locked -----------------------------------------------------------------------------------

    def _stage(self, order: Order, ordered: Report, done: Report) -> None:
        """Copy through the page-locked ring, on a thread of its own: the host has to wait between the two hops."""

        def carry_out() -> None:
            torch.cuda.set_device(self._at)
            stream = self._h2d if order.action is Action.H2D else self._d2h
            start, size = self._ring
            start += 0 if order.action is Action.H2D else 2 * size
            slots = [self._transfer.tensor[start + turn * size : start + (turn + 1) * size] for turn in range(2)]
            under_way: deque[tuple[torch.cuda.Event, torch.Tensor, torch.Tensor]] = deque()
            with torch.cuda.stream(stream):
                self._order_before(order, stream)
                begin = self._begin(stream)
                for number, skip in enumerate(range(0, order.nbytes, size)):
                    if len(under_way) == len(slots):
                        self._finish_hop(order, *under_way.popleft())
                    length = min(size, order.nbytes - skip)
                    slot = slots[number % 2][:length]
                    extent = self._host.tensor[order.offset_ram + skip : order.offset_ram + skip + length]
                    if order.action is Action.H2D:
                        slot.copy_(extent)
                    self._copy(order, slot, skip)
                    event = torch.cuda.Event(blocking=True)
                    event.record(stream)
                    under_way.append((event, slot, extent))
                while under_way:
                    self._finish_hop(order, *under_way.popleft())
                self._record_behind(order, stream, begin)

        def report(future: Future[None]) -> None:
            error = future.exception()
            if error is None:
                ordered(order, None)
            done(order, error)

        self._staged[order.action].submit(carry_out).add_done_callback(report)

    @staticmethod
    def _finish_hop(order: Order, event: torch.cuda.Event, slot: torch.Tensor, extent: torch.Tensor) -> None:
        event.synchronize()
        if order.action is Action.D2H:
            extent.copy_(slot)

    # -- moves -----------------------------------------------------------------------------------------------------------------

    def _compact(self, order: Order, ordered: Report, done: Report) -> None:
        if order.tier is Tier.RAM:
            start_move(self._host_moves, self._host.tensor, order, lambda *_: None, done)
            return
        stream = self._h2d
        with torch.cuda.stream(stream):
            for record, source, target in order.moves:
                nbytes = record.nbytes
                self._wait_for_uses(stream, source, source + nbytes, writes=False)
                self._wait_for_uses(stream, target, target + nbytes, writes=True)
                earlier = self._ready.pop(source, None)  # filled on this same stream
                slide(self._device.tensor, self._lane, source, target, nbytes)
                event = torch.cuda.Event(blocking=True)
                event.record(stream)
                self._note_ready(target, nbytes, event)
                self._note_fill_beyond(earlier, source, nbytes)
                with self._lock:
                    self._note_use(source, nbytes, stream, event)
        ordered(order, None)
        done(order, None)

    # -- leases -----------------------------------------------------------------------------------------------------------------

    def _callers_stream(self) -> torch.cuda.Stream:
        """The caller's current stream. torch's own call makes an object each time, which takes several times as long."""
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        stream = self._known.get(handle)
        if stream is None:
            stream = self._known[handle] = torch.cuda.current_stream(self._at)
        return stream

    def lease(self, offsets: Iterable[tuple[int, int]]) -> object:
        stream = self._callers_stream()
        for offset, _ in offsets:
            ready = self._ready.get(offset)
            if ready is not None:
                if ready[1].query():
                    if self._ready.get(offset) is ready:
                        self._ready.pop(offset, None)
                else:
                    stream.wait_event(ready[1])
            with self._lock:
                for (key, _), event in self._uses.get(offset, {}).items():
                    if key != stream.cuda_stream and not event.query():
                        stream.wait_event(event)
        return stream

    def take(self, offsets: Iterable[tuple[int, int]]) -> None:
        stream = self._callers_stream()
        for offset, nbytes in offsets:
            end = offset + nbytes
            self._wait_for_uses(stream, offset, end, writes=False)
            for start, (stop, ready) in list(self._ready.items()):
                if start < end and offset < stop and not ready.query():
                    stream.wait_event(ready)

    def note_use(self, offsets: Iterable[tuple[int, int]], stream: object) -> None:
        assert isinstance(stream, torch.cuda.Stream)
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        with self._lock:
            for offset, nbytes in offsets:
                self._note_use(offset, nbytes, stream, event)

    def release(self, offsets: Iterable[tuple[int, int]]) -> int:
        stream = self._callers_stream()
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        with self._lock:
            for offset, nbytes in offsets:
                self._note_use(offset, nbytes, stream, event)
            self._run_ahead.append(event)
            oldest = self._run_ahead.popleft() if len(self._run_ahead) > RUN_AHEAD else None
        if oldest is not None and not oldest.query():
            start = time.perf_counter_ns()
            oldest.synchronize()
            return time.perf_counter_ns() - start
        return 0

    def mark(self) -> object | None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._callers_stream())
        return event

    def between(self, first: Any, second: Any) -> float | None:
        try:
            return float(first.elapsed_time(second)) / 1e3 if first.query() and second.query() else None
        except RuntimeError:  # CUDA is lost to this process
            return None

    # -- the host's own reads and writes ---------------------------------------------------------------------------------------

    def read(self, offset: int, target: torch.Tensor) -> None:
        with torch.cuda.device(self._at), torch.cuda.stream(self._d2h):
            self._wait_for_uses(self._d2h, offset, offset + target.numel(), writes=False)
            self._d2h.wait_stream(self._h2d)
            target.copy_(self._device.tensor[offset : offset + target.numel()])
            self._d2h.synchronize()

    def write(self, offset: int, source: torch.Tensor) -> None:
        with torch.cuda.device(self._at), torch.cuda.stream(self._h2d):
            flat = flat_bytes(source)  # on this stream: it may have to be gathered
            self._wait_for_uses(self._h2d, offset, offset + flat.numel(), writes=False)
            self._device.tensor[offset : offset + flat.numel()].copy_(flat)
            self._h2d.synchronize()

    def close(self) -> None:
        try:
            torch.cuda.synchronize(self._at)
        except RuntimeError as error:
            log.error("closing after a CUDA error: %s", error)
        for waiter in self._waiters.values():
            waiter.close()
        for pool in (self._host_moves, *self._staged.values()):
            pool.shutdown()
        del self._lane  # of the arena, which would live as long as this does


class _Flight:
    """A copy that was issued. Two may find that it has landed, who polls and the waiter's thread: it is reported once."""

    __slots__ = ("_report", "event")

    def __init__(self, event: torch.cuda.Event, report: Callable[[BaseException | None], None]) -> None:
        self.event = event
        self._report = [report]

    @property
    def landed(self) -> bool:
        return not self._report

    def land(self, error: BaseException | None) -> None:
        with contextlib.suppress(IndexError):  # as one step for all threads
            report = self._report.pop()
            report(error)


class _Waiter:
    """A thread that sleeps until copies have landed, in order, and says so.

    While nobody waits, whoever uses the store comes by often and finds out himself; to be told of each copy by a thread would cost him more
    than it saves. So the thread lets him go first, for a moment.

    Args:
        name: Of the thread.
        device: Whose events they are.
        hurried: Whether somebody waits.
    """

    def __init__(self, name: str, device: torch.device, hurried: Callable[[], bool]) -> None:
        self._queue: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._device = device
        self._hurried = hurried
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait_for(self, flight: _Flight) -> None:
        self._queue.put(flight)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        rested = 0.0
        while (flight := self._queue.get()) is not None:
            if flight.landed:
                continue
            error: BaseException | None = None
            try:
                flight.event.synchronize()
            except BaseException as failure:  # CUDA is lost to this process, but nobody may wait for ever
                error = failure
            if not flight.landed and time.perf_counter() - rested > REST_S and not self._hurried():
                time.sleep(REST_S)
                rested = time.perf_counter()
            try:
                flight.land(error)
            except Exception:
                log.exception("reporting a copy failed")
