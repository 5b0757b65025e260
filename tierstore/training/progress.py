"""A progress display for any loop over a store: what the loop does, what tiers and links do, and what each step waited for.

    for batch in (bar := progress(store, loader, tokens=8192)):
        ...
        bar.update(loss=loss)

A step is the time from one request for a batch to the next. On a terminal the display redraws in place, at most four times a
second; elsewhere a plain line is printed now and then. After the third step, and after each that is slow, one line goes to the
log `tierstore`: what the step waited for most, why, and how to mend it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from tierstore.errors import ClosedError, OptionError, TensorError, TierstoreError
from tierstore.monitor.tui import TierDisplay, share_table
from tierstore.store import StoreBase
from tierstore.training.advice import Diagnosis, Expected, Wait, split
from tierstore.training.steps import Adviser, Step, StepMeter
from tierstore.units import format_duration

__all__ = ["Progress", "progress"]

T = TypeVar("T")

RATE_STEPS = 20
"""Recent steps that rates and shares are averaged over."""
WORTH_SHOWING = 0.01
"""A wait that has never taken this share of a step has no row."""
MOST_PARTS = 16
"""Parts of a batch whose shapes are looked at."""
WIDTH = 79
LABELS: dict[str, str] = {
    Wait.LOADER: "data loader",
    Wait.NVME: "nvme",
    Wait.SPACE: "room on gpu",
    Wait.LEASE: "leases",
    Wait.COMMIT: "commits",
    Wait.COPY: "copies",
    Wait.RUN_AHEAD: "gpu behind",
    Wait.COMPUTING: "computing",
}
"""What waits are called where there is little room, in the order in which they are shown."""

# Displays take turns on the one terminal that a process has, so which are open is the process's to know.
_NESTED = threading.local()


def progress(
    store: StoreBase,
    loader: Iterable[T],
    *,
    tokens: float | Callable[[T], float] | None = None,
    total: int | None = None,
    first: int = 0,
    accumulate: int = 1,
    expected: Expected | None = None,
    show: bool = True,
    console: Console | None = None,
    every_s: float = 0.25,
    plain_every_s: float = 5.0,
    transient: bool = False,
) -> Progress[T]:
    """Wrap a data loader so that a loop over it is watched. The store may hold anything, an attached model or not.

    Inside another watched loop of the same thread this one takes the terminal until it ends.

    Args:
        store: What the loop trains over; `TierStore` or `AsyncTierStore`.
        loader: Any iterable of batches. With a length, what is left is told too.
        tokens: Tokens of a batch, or a function of the batch that tells them as a number on the host. None: samples are
            counted where the tensors of a batch agree on their first dimension, else steps.
        total: Batches to expect, where the loader has no length.
        first: Steps that were done before, as by a process that this one goes on after: what is told counts from there.
        accumulate: Batches to one step of the optimizer: a step is measured over so many.
        expected: Rates of this machine's links, if they were measured.
        show: Draw or print; False: only the lines in the log.
        console: Where to; by default standard output.
        every_s: Least time between two redraws on a terminal.
        plain_every_s: Least time between two lines elsewhere.
        transient: Take the display off the terminal at the end.

    Raises:
        OptionError: `tokens`, `total`, `first` or `accumulate` that make no sense.
    """
    return Progress(
        store,
        loader,
        tokens=tokens,
        total=_length(loader) if total is None else total,
        first=first,
        accumulate=accumulate,
        adviser=Adviser(expected if expected is not None else Expected(), first=first),
        display=TierDisplay(
            store,
            console=console,
            every_s=every_s,
            plain_every_s=plain_every_s,
            plain_rates=True,
            transient=transient,
            clock=store.engine.clock,
        )
        if show
        else None,
    )


class Progress(Generic[T]):
    """A loader whose iteration is watched; made by `progress`. For one thread. May be iterated again, but not twice at once.

    Attributes:
        diagnosis: The last one that was told.
    """

    def __init__(
        self,
        store: StoreBase,
        loader: Iterable[T],
        *,
        tokens: float | Callable[[T], float] | None,
        total: int | None,
        first: int,
        accumulate: int,
        adviser: Adviser,
        display: TierDisplay | None,
    ) -> None:
        """See `progress`."""
        if not (tokens is None or callable(tokens) or (isinstance(tokens, int | float) and tokens > 0)):
            raise OptionError("tokens= is not understood", need="a positive number, or a function of a batch", have=repr(tokens))
        for option, value in (("accumulate", accumulate), ("total", total)):
            if value is not None and (type(value) is not int or value < (option == "accumulate")):
                raise OptionError(f"{option}= is not understood", need="a whole number of batches", have=repr(value))
        if type(first) is not int or first < 0:
            raise OptionError("first= is not understood", need="a whole number of steps", have=repr(first))
        self.diagnosis: Diagnosis | None = None
        self._store = store
        self._loader = loader
        self._tokens = tokens
        self._num_steps = None if total is None else -(-total // accumulate)
        self._first = first
        self._accumulate = accumulate
        self._adviser = adviser
        self._display = display
        self._values = _Values()
        self._clock = store.engine.clock
        self._meter = StepMeter(store, self._clock)
        self._step = 0  # of this iteration
        self._items: list[float | None] = []  # of the batches of the step under way
        self._recent: deque[Step] = deque(maxlen=RATE_STEPS)
        self._rows: dict[str, None] = {}  # what steps were seen to spend time on: a row once shown stays
        self._said = ""  # the last plain line of this iteration, without tiers and links
        self._open = False
        self._blind = False  # the store is closed: the loop may go on, but there is nothing to watch

    @property
    def num_steps(self) -> int:
        """Steps that have ended, over all iterations."""
        return self._meter.num_steps

    def update(self, loss: float | torch.Tensor | None = None, **values: float | torch.Tensor) -> None:
        """Have the display show the loss, and whatever else by its name. Costs no wait for the device.

        Args:
            loss: A number, or a tensor with one element; one on a device is read once the device has computed it.
            values: Others, e.g. `lr=`.

        Raises:
            TensorError: A tensor with more than one element.
        """
        if loss is not None:
            self._values.note("loss", loss)
        for name, value in values.items():
            self._values.note(name, value)

    def __iter__(self) -> Iterator[T]:
        if self._open:
            raise OptionError("this progress() is being iterated already", remedy="make one for each loop")
        source = iter(self._loader)
        with self._watched():
            while True:
                before_ns = self._clock.now_ns()
                try:
                    batch = next(source)
                except StopIteration:
                    break
                self._meter.loaded(self._clock.now_ns() - before_ns)
                items = self._count(batch)
                yield batch
                del batch  # the loader makes the next one beside it otherwise
                self._items.append(items)
                if len(self._items) == self._accumulate:
                    self._end_step()

    # -- steps ---------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """From the first request for a batch until the loop ends, however it does: the display is closed then."""
        self._step, self._said, self._blind = 0, "", False
        open_here: list[Progress[Any]] = _NESTED.__dict__.setdefault("open", [])
        process = os.getpid()
        if open_here:
            open_here[-1]._give_way()
        open_here.append(self)
        self._open = True
        try:
            if self._display is not None:
                self._display.resume()
            self._begin_step()
            yield
        finally:
            # Not in a data loader's worker that was forked meanwhile, nor where an abandoned loop ends with the interpreter.
            if process == os.getpid() and not sys.is_finalizing():
                self._open = False
                innermost = open_here[-1] is self
                open_here.remove(self)
                try:
                    self._finish(show=innermost)
                finally:
                    if innermost and open_here and open_here[-1]._display is not None:
                        open_here[-1]._display.resume()

    def _give_way(self) -> None:
        """Another display draws from here on, and what its loop waits for is not this one's."""
        self._meter.disturbed = True
        if self._display is not None:
            self._display.pause()

    def _begin_step(self) -> None:
        self._items = []
        if not self._blind:
            try:
                self._meter.begin()
            except ClosedError:
                self._blind = True

    def _end_step(self) -> None:
        self._step += 1
        if self._blind:
            return
        try:
            counts = [count for count in self._items if count is not None]
            step = self._meter.end(math.fsum(counts) if len(counts) == self._accumulate else None)
            diagnosis = self._adviser.look(self._meter, step)
            self._meter.remember(step)
            if not step.disturbed:
                self._recent.append(step)
            self.diagnosis = diagnosis or self.diagnosis
            if self._display is not None and (self._display.due or diagnosis is not None):
                self._draw()
        except ClosedError:
            self._blind = True
        self._begin_step()  # drawing is not part of it

    def _finish(self, *, show: bool) -> None:
        display = self._display
        if display is None:
            return
        try:
            if show and not self._blind and self._step:
                with contextlib.suppress(TierstoreError):  # what ended the loop may have ended the store
                    self._draw(last=True)
        finally:
            display.__exit__(None, None, None)

    def _count(self, batch: T) -> float | None:
        if callable(self._tokens):
            return float(self._tokens(batch))
        return float(self._tokens) if self._tokens is not None else first_dimension(batch)

    # -- what is shown -------------------------------------------------------------------------------------------------------

    def _draw(self, *, last: bool = False) -> None:
        """Show the present state.

        Args:
            last: Nothing follows: wait for values that the device has yet to compute, and print no line twice.
        """
        assert self._display is not None
        spent = _shares(self._recent)
        whole = math.fsum(step.seconds for step in self._recent) / max(1, len(self._recent))
        shares = {name: seconds / whole if whole else 0.0 for name, seconds in spent.items()}
        self._rows.update(dict.fromkeys(name for name, share in shares.items() if share >= WORTH_SHOWING))
        names = [name for name in (*LABELS, *self._rows) if name in self._rows and name != Wait.COMPUTING]
        names = list(dict.fromkeys(names))
        waits = [f"{LABELS.get(name, name)} {shares[name]:.0%}" for name in names if shares.get(name, 0.0) >= WORTH_SHOWING]
        rows = [(LABELS.get(name, name), spent.get(name, 0.0), shares.get(name, 0.0)) for name in (*names, Wait.COMPUTING)]
        words = self._words(whole, wait=last)
        plain = "  ".join([*(f"{word} {value}".strip() for word, value in words), f"waits: {', '.join(waits) or 'none'}"])
        if last and self._display.plain and plain == self._said:
            return
        self._said = plain
        self._display.update(self._headline(words), plain=plain, below=self._below(rows), force=True)

    def _words(self, whole: float, *, wait: bool) -> list[tuple[str, str]]:
        """The headline: pairs of a word and a value; the word may be empty.

        Args:
            whole: Seconds of a step.
            wait: For values that the device has yet to compute.
        """
        step = f"{self._first + self._step:,}"
        if self._num_steps is not None:
            step += f"/{self._first + self._num_steps:,}"
        words = [("step", step), *((name, _number(value)) for name, value in self._values.read(wait=wait).items())]
        if whole > 0:
            counts = [step.items for step in self._recent if step.items is not None]
            if len(counts) == len(self._recent):
                unit = "samples/s" if self._tokens is None else "tokens/s"
                words.append(("", f"{_number(math.fsum(counts) / len(counts) / whole)} {unit}"))
            else:
                words.append(("", f"{_number(1 / whole)} steps/s"))
            words.append(("", f"{format_duration(whole)}/step"))
            if self._num_steps is not None and self._num_steps > self._step:
                words.append(("", f"{format_duration(whole * (self._num_steps - self._step))} left"))
        return words

    def _headline(self, words: list[tuple[str, str]]) -> RenderableType:
        line = Text()
        for word, value in words:
            line.append(f"{word} " if word else "", style="dim").append(value, style="bold" if word else "").append("   ")
        line.rstrip()
        if not self._num_steps:
            return line
        return Group(line, ProgressBar(total=self._first + self._num_steps, completed=self._first + self._step, width=WIDTH))

    def _below(self, rows: list[tuple[str, float, float]]) -> RenderableType:
        parts: list[RenderableType] = [Text(), share_table("a step", rows)]
        if self.diagnosis is not None:
            parts += [Text(), Text(str(self.diagnosis), style="yellow" if self.diagnosis.remedy else "dim")]
        return Group(*parts)


class _Values:
    """What the loop has said of itself, read without stopping it.

    [Note: Reading a loss]
    `item()` on the compute stream waits for all that is queued there, the whole step. So an event is recorded behind what
    computes the value, and the value is read on a stream of its own once that has happened. The host may be steps ahead, and the newest
    value never ready when somebody looks: therefore one older value is kept until it is.
    """

    def __init__(self) -> None:
        self._newest: dict[str, _Pending] = {}
        self._older: dict[str, _Pending] = {}
        self._shown: dict[str, float] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def note(self, name: str, value: float | torch.Tensor) -> None:
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            need, have = "one element", f"shape {tuple(value.shape)}"
            raise TensorError(f"{name}= cannot be shown", need=need, have=have, remedy="give its mean")
        if not isinstance(value, torch.Tensor) or value.device.type != "cuda":
            self._shown[name] = float(value.item() if isinstance(value, torch.Tensor) else value)
            self._newest.pop(name, None)
            self._older.pop(name, None)
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(value.device))
        self._newest[name] = pending = _Pending(value.detach(), event)
        self._older.setdefault(name, pending)

    def read(self, *, wait: bool = False) -> dict[str, float]:
        """The newest values that are ready; if `wait`, the newest."""
        for name, newest in list(self._newest.items()):
            if wait or newest.event.query():
                self._shown[name] = self._item(newest)
                del self._newest[name], self._older[name]
            elif (older := self._older[name]) is not newest and older.event.query():
                self._shown[name] = self._item(older)
                self._older[name] = newest
        return self._shown

    def _item(self, pending: _Pending) -> float:
        device = pending.value.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_event(pending.event)
        with torch.cuda.stream(stream):
            return float(pending.value.item())


@dataclass(frozen=True, slots=True)
class _Pending:
    value: torch.Tensor
    event: torch.cuda.Event


def first_dimension(batch: object) -> int | None:
    """Samples of a batch: the length that the first dimensions of all its tensors (or arrays) have; None where they differ."""
    lengths = set(_lengths(batch, depth=3))
    return lengths.pop() if len(lengths) == 1 else None


def _lengths(batch: object, depth: int) -> Iterator[int]:
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):
        if shape:
            yield int(shape[0])
    elif depth and isinstance(batch, Mapping | tuple | list):
        for part in itertools.islice(batch.values() if isinstance(batch, Mapping) else batch, MOST_PARTS):
            yield from _lengths(part, depth - 1)


def _length(loader: object) -> int | None:
    """Its batches. Loaders over data without a length have `__len__`, and raise."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _shares(steps: Collection[Step]) -> dict[str, float]:
    """Seconds that a step spends on each thing, on average."""
    spent: dict[str, float] = {}
    for step in steps:
        for name, seconds in split(step.facts()).items():
            spent[name] = spent.get(name, 0.0) + seconds / len(steps)
    return spent


def _number(value: float) -> str:
    """Four digits, of steady width where most numbers are."""
    size = abs(value)
    if 1000 <= size < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".") if 0.01 <= size < 1000 else f"{value:.3g}"
