"""The product's own CUDA path, `CudaCopies`, on simulated streams: no GPU is needed to see a missing wait.

`Streams` stands in for `torch.cuda` in `tierstore.mover.streams` while a run lasts. A stream is a queue of copies, kernels, events to
record and events to wait for, each of which takes simulated time; different streams run side by side. A copy reads its source when
it begins, holds its destination poisoned until it ends, and checks then that nobody touched either.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.simulation.links import Pace, is_poison, label, poison
from tests.simulation.scenario import Scenario
from tests.simulation.world import Actor, BrokenPromiseError, World
from tierstore.catalog import PAGE
from tierstore.mover import streams
from tierstore.mover.streams import CudaCopies, Report
from tierstore.requests import Order
from tierstore.tiers.device import DeviceArena
from tierstore.tiers.ram import HostArena

KERNEL_NS = 60_000
"""The longest a kernel takes."""


class Recording:
    """One recording of an event: complete once its stream has come to it."""

    def __init__(self) -> None:
        self.complete = False
        self.complete_ns = 0
        self.then: list[Callable[[], None]] = []


class Stream:
    """See `torch.cuda.Stream`."""

    machine: Streams

    def __init__(self, _device: object, name: str = "") -> None:
        self.cuda_stream = len(self.machine.streams)
        self.name = name or f"side stream {self.cuda_stream}"
        self._queue: deque[Callable[[], bool]] = deque()
        self._busy = False
        self.machine.streams.append(self)

    @property
    def idle(self) -> bool:
        return not self._busy and not self._queue

    def enqueue(self, begin: Callable[[], bool]) -> None:
        """`begin` starts it and says whether it is over at once; if not, `proceed` is called when it is."""
        self._queue.append(begin)
        if not self._busy:
            self._advance()

    def proceed(self) -> None:
        self._busy = False
        self._advance()

    def _advance(self) -> None:
        while self._queue and not self._busy:
            self._busy = True
            if self._queue.popleft()():
                self._busy = False
        if self.idle:
            self.machine.stirred()

    def wait_event(self, event: Event) -> None:
        recording = event.recording

        def begin() -> bool:
            if recording is None or recording.complete:
                return True
            recording.then.append(self.proceed)
            return False

        self.enqueue(begin)

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        event = Event()
        event.record(self)
        event.synchronize()


class Event:
    """See `torch.cuda.Event`."""

    def __init__(self, *, blocking: bool = False, enable_timing: bool = False) -> None:
        self.recording: Recording | None = None
        self._machine: Streams | None = None
        self._timed = enable_timing

    def elapsed_time(self, other: Event) -> float:
        assert self._timed
        assert other._timed
        assert self.recording is not None
        assert other.recording is not None
        return (other.recording.complete_ns - self.recording.complete_ns) / 1e6

    def record(self, stream: Stream) -> None:
        recording = self.recording = Recording()
        self._machine = stream.machine

        def begin() -> bool:
            recording.complete = True
            recording.complete_ns = stream.machine.world.clock.now_ns()
            for then in recording.then:
                then()
            stream.machine.stirred()
            return True

        stream.enqueue(begin)

    def query(self) -> bool:
        return self.recording is None or self.recording.complete

    def synchronize(self) -> None:
        if self._machine is not None:
            self._machine.wait(self.query, "an event of a stream")


class Memory:
    """A tensor of which copies to and from the device go through the current stream."""

    def __init__(self, machine: Streams, real: torch.Tensor, *, on_device: bool) -> None:
        self._machine = machine
        self.real = real
        self.on_device = on_device

    def __getitem__(self, piece: slice) -> Memory:
        return Memory(self._machine, self.real[piece], on_device=self.on_device)

    def numel(self) -> int:
        return self.real.numel()

    def data_ptr(self) -> int:
        return self.real.data_ptr()

    def copy_(self, source: Memory | torch.Tensor, *, non_blocking: bool = False) -> Memory:
        theirs = source if isinstance(source, Memory) else Memory(self._machine, source, on_device=False)
        if self.on_device or theirs.on_device:
            self._machine.copy(self.real, theirs.real)
        else:
            self.real.copy_(theirs.real)
        return self


class Streams:
    """The simulated device: its streams, and who issues work to which."""

    def __init__(self, world: World, pace: Pace) -> None:
        self.world = world
        self.pace = pace
        self.streams: list[Stream] = []
        self.stream_type = type("BoundStream", (Stream,), {"machine": self})
        self._current: dict[Actor | None, list[Stream]] = {}
        self._waiting: list[Actor] = []

    # -- what `torch.cuda` has ---------------------------------------------------------------------------------------------------

    def current_stream(self) -> Stream:
        """Every actor has a stream of its own to begin with."""
        actor = self.world.current
        stack = self._current.setdefault(actor, [])
        if not stack:
            stack.append(self.stream_type(None, actor.name if actor is not None else "events"))
        return stack[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        stack = self._current.setdefault(self.world.current, [])
        stack.append(stream)
        try:
            yield
        finally:
            stack.pop()

    def synchronize(self) -> None:
        self.wait(lambda: all(stream.idle for stream in self.streams), "all streams")

    # -- work --------------------------------------------------------------------------------------------------------------------

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        stream, world = self.current_stream(), self.world

        def begin() -> bool:
            before = source.clone()
            poison(target)

            def end() -> None:
                if not torch.equal(source, before):
                    raise BrokenPromiseError(f"the source of a copy on {stream.name} changed before it had landed")
                if not is_poison(target):
                    raise BrokenPromiseError(f"the destination of a copy on {stream.name} was written before it had landed")
                target.copy_(before)
                stream.proceed()

            world.after(self.pace.duration_ns(world, target.numel()), f"a copy on {stream.name} has landed", end)
            return False

        stream.enqueue(begin)

    def kernel(self, work: Callable[[], None]) -> None:
        """Work on the device, on the current stream; it happens when its turn comes."""
        stream, world = self.current_stream(), self.world

        def begin() -> bool:
            def end() -> None:
                work()
                stream.proceed()

            world.after(world.jitter(KERNEL_NS), "", end)
            return False

        stream.enqueue(begin)

    def wait(self, condition: Callable[[], bool], doing: str) -> None:
        me = self.world.current
        if me is None:
            raise BrokenPromiseError(f"an event would have to wait: {doing}")
        self._waiting.append(me)
        self.world.wait_until(condition, doing)
        self._waiting.remove(me)

    def stirred(self) -> None:
        for actor in self._waiting:
            self.world.notify(actor)


class Pool:
    """A thread pool of one thread, as an actor that lives as long as it has work."""

    def __init__(self, machine: Streams, name: str) -> None:
        self._world = machine.world
        self._name = name
        self._jobs: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._actor: Actor | None = None

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.append((future, call, args))
        if self._actor is None:
            self._actor = self._world.spawn(self._name, self._work)
        return future

    def _work(self) -> None:
        while self._jobs:
            future, call, args = self._jobs.popleft()
            self._world.sleep(self._world.jitter(20_000))
            try:
                result = call(*args)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        self._actor = None

    def shutdown(self) -> None:
        if self._actor is not None:
            self._world.join(self._actor)


class Waiter:
    """The thread that waits for copies in order and says so, as an actor that lives as long as it has work."""

    def __init__(self, machine: Streams, name: str) -> None:
        self._pool = Pool(machine, name)

    def wait_for(self, flight: Any) -> None:
        def wait() -> None:
            flight.event.synchronize()
            flight.land(None)

        self._pool.submit(wait)

    def close(self) -> None:
        self._pool.shutdown()


class _Host:
    """The RAM arena as the copies see it: the first `page_locked_bytes` in segments, the rest pageable."""

    def __init__(self, machine: Streams, arena: HostArena, page_locked_bytes: int, segment_bytes: int) -> None:
        self.tensor = Memory(machine, arena.tensor, on_device=False)
        self._locked = page_locked_bytes
        self._segment = segment_bytes

    def pieces(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, bool]]:
        end = offset + nbytes
        while offset < end:
            locked = offset < self._locked
            stop = min(end, (offset // self._segment + 1) * self._segment, self._locked) if locked else end
            yield offset, stop - offset, locked
            offset = stop


class SimulatedCuda(CudaCopies):
    """`CudaCopies` itself; only what it runs on is simulated.

    Attributes:
        under_way: Orders that are not done.
    """

    num_faults = 0

    def __init__(
        self,
        machine: Streams,
        device: DeviceArena,
        host: HostArena,
        transfer: HostArena,
        ring: tuple[int, int],
        lane: int,
        scenario: Scenario,
    ) -> None:
        self.under_way: dict[int, Order] = {}
        self.machine = machine
        segment = max(plan.pages for plan in scenario.plans)
        memory = Memory(machine, device.tensor, on_device=True)
        gpu: Any = SimpleNamespace(device=SimpleNamespace(index=0), tensor=memory, nbytes=device.nbytes)
        ram: Any = _Host(machine, host, scenario.locked_pages * PAGE, segment * PAGE)
        ring_space: Any = SimpleNamespace(tensor=Memory(machine, transfer.tensor, on_device=False))
        super().__init__(gpu, ram, ring_space, ring, lane)

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        self.machine.world.note(f"issues {label(order)}")
        self.under_way[order.number] = order

        def finished(order: Order, error: BaseException | None) -> None:
            self.under_way.pop(order.number, None)
            done(order, error)

        super().start(order, ordered, finished)

    def read(self, offset: int, target: torch.Tensor) -> None:
        wrapped: Any = Memory(self.machine, target, on_device=False)
        super().read(offset, wrapped)


@contextmanager
def simulated_cuda(machine: Streams) -> Iterator[None]:
    """`tierstore.mover.streams` sees the simulated device instead of torch's."""
    cuda = SimpleNamespace(
        Stream=machine.stream_type,
        Event=Event,
        stream=machine.on,
        device=lambda _: contextlib.nullcontext(),
        current_stream=lambda _: machine.current_stream(),
        set_device=lambda _: None,
        synchronize=lambda _: machine.synchronize(),
    )
    raw = SimpleNamespace(_cuda_getCurrentRawStream=lambda _: machine.current_stream().cuda_stream)
    with (
        mock.patch.object(streams, "torch", SimpleNamespace(cuda=cuda, _C=raw, device=torch.device, Tensor=torch.Tensor)),
        mock.patch.object(streams, "Threads", lambda name, _: Pool(machine, name)),
        mock.patch.object(streams, "_Waiter", lambda name, *_: Waiter(machine, name)),
    ):
        yield
