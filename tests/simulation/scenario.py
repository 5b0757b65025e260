"""What a run does: sizes, policy, faults, and what each thread and task calls. Drawn from a seed, and plain enough to be pasted.

A call is a tuple: its name and its arguments, times in microseconds.

    ("use", (("b0", True), ("b1", False)), timeout or None, pause, (calls made inside the lease ...))
                                                             instead of True: FRESH, SPENT or SCRATCH, which is both
    ("prefetch" | "hold" | "put" | "declare" | "read" | "write" | "evict" | "delete" | "unhold" | "flush" | "commit" | "sleep", ...)
    ("cancel", after, call)                                  tasks only: the call is cancelled if it takes longer
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Call = tuple[Any, ...]
Calls = tuple[Call, ...]
How = bool | str
"""What a lease is to a block: for reading, for writing, or one of these."""
FRESH, SPENT, SCRATCH = "fresh", "spent", "scratch"

POLICIES = (*("lookahead",) * 8, *("static",) * 3, *("hostile",) * 3, "lru", "lru", "fifo", "clock", "sieve", "s3fifo", "arc")


@dataclass(frozen=True)
class BlockPlan:
    """A block: its length in pages of 4096 bytes, spread over this many tensors, and where it begins."""

    name: str
    pages: int
    tensors: int = 1
    tier: str = "ram"
    frozen: bool = False


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        blocks: Those that are there from the beginning.
        extra: Those that `put` calls may add.
        blanks: Those that are declared at the beginning, without content.
        gpu_pages, ram_pages: Budgets for blocks, in pages.
        nvme_pages: Limit of the directory; None: no limit. `nvme` False: two tiers.
        threads, tasks: What each of them calls.
        faults: The chance that an operation of a link or the drive fails.
        stuck: Transfers of one block that always fail: "read", "write" (drive), "h2d" or "d2h" (CPU device), and the block.
        slow, sticky: See `World`.
        orders: How many transfers a link takes at once.
        cuda: The device is a simulated GPU, with streams and events; else the CPU.
        locked_pages: With `cuda`: how much of RAM is page-locked, in segments of so many pages as the largest block has.
        close_after: Microseconds after which the store is closed under its users' hands; None: when all are done.
    """

    blocks: tuple[BlockPlan, ...]
    extra: tuple[BlockPlan, ...]
    gpu_pages: int
    ram_pages: int
    threads: tuple[Calls, ...]
    tasks: tuple[Calls, ...] = ()
    nvme: bool = True
    nvme_pages: int | None = None
    policy: str = "lookahead"
    faults: float = 0.0
    stuck: tuple[str, str] | None = None
    slow: float = 0.05
    sticky: float = 0.3
    orders: int = 8
    keep: int = 1
    checksum: bool = True
    cuda: bool = False
    locked_pages: int = 1 << 20
    close_after: int | None = None
    blanks: tuple[BlockPlan, ...] = ()

    @property
    def plans(self) -> tuple[BlockPlan, ...]:
        return (*self.blocks, *self.extra, *self.blanks)

    def plan(self, name: str) -> BlockPlan:
        return next(plan for plan in self.plans if plan.name == name)

    @property
    def num_calls(self) -> int:
        return sum(map(count_calls, (*self.threads, *self.tasks)))


def count_calls(calls: Calls) -> int:
    return sum(1 + (count_calls(call[4]) if call[0] == "use" else 0) for call in calls)


class _Draw:
    """Draws the parts of a scenario."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(f"scenario {seed}")
        self.blocks: list[BlockPlan] = []
        self.extra: list[BlockPlan] = []
        self.blanks: list[BlockPlan] = []
        self.gpu_pages = 0
        self.nvme = True
        self.only_nesting = False

    def pause(self) -> int:
        return self.random.choice((0, 0, 0, 5, 20, 100))

    def timeout(self) -> int | None:
        return self.random.choice((None,) * 8 + (0, 30, 300))

    def use(self, *names: str, write: bool | None = None, inside: Calls = ()) -> Call:
        wants = []
        for name in dict.fromkeys(names):
            frozen = self.plan(name).frozen
            wants.append((name, not frozen and (self.random.random() < 0.4 if write is None else write)))
        return ("use", tuple(wants), self.timeout(), self.pause(), inside)

    def plan(self, name: str) -> BlockPlan:
        return next(plan for plan in (*self.blocks, *self.extra) if plan.name == name)

    def name(self) -> str:
        return self.random.choice(self.blocks).name

    def fitting(self, most: int) -> list[str]:
        """Some blocks that fit on the device together."""
        chosen: list[str] = []
        left = self.gpu_pages
        for plan in self.random.sample(self.blocks, min(most, len(self.blocks))):
            if plan.pages <= left:
                left -= plan.pages
                chosen.append(plan.name)
        return chosen

    # -- shapes of workloads -----------------------------------------------------------------------------------------------------

    def training(self) -> list[Call]:
        """Forward, backward and a step that writes; now and then an evaluation in between."""
        layers = [plan.name for plan in self.blocks]
        calls: list[Call] = []
        for _ in range(self.random.randint(1, 3)):
            calls += [self.use(name, write=False) for name in layers]
            calls += [self.use(name, write=False) for name in reversed(layers)]
            calls += [self.use(name, write=True) for name in layers]
            if self.random.random() < 0.3:
                calls += [self.use(name, write=False) for name in layers]
            if self.nvme and self.random.random() < 0.5:
                calls.append(("commit", self.random.random() < 0.5))
        return calls

    def gradients(self) -> list[Call]:
        """Forward; backward, which writes gradients whole, or adds to them; a step that uses them up. All by one user, or by several."""
        pairs = [(plan, self.blanks[index % len(self.blanks)]) for index, plan in enumerate(self.blocks) if not plan.frozen]
        calls: list[Call] = []
        for _ in range(self.random.randint(1, 3)):
            calls += [self.use(plan.name, write=False) for plan in self.blocks[: self.random.randint(0, 4)]]
            for layer, gradient in reversed(pairs):
                calls.append(self.train((layer, False), (gradient, FRESH)))
                if self.random.random() < 0.2:
                    calls.append(self.train((gradient, self.random.choice((True, False, FRESH, SCRATCH)))))
            if self.random.random() < 0.3:
                calls.append(self.random.choice([("prefetch", self.blanks[0].name), ("evict", self.blanks[0].name), ("flush",)]))
            if self.nvme and self.random.random() < 0.4:
                calls.append(("commit", self.random.random() < 0.5))
            for layer, gradient in pairs:
                calls.append(self.train((layer, True), (gradient, SPENT)))
        return calls

    def train(self, *wants: tuple[BlockPlan, How], inside: Calls = ()) -> Call:
        """A lease of a layer beside its gradient; of the gradient alone where both do not fit."""
        fitting = wants if sum(plan.pages for plan, _ in wants) <= self.gpu_pages else wants[-1:]
        return ("use", tuple((plan.name, how) for plan, how in fitting), self.timeout(), self.pause(), inside)

    def with_a_blank(self) -> Call:
        """Any call on a block that has content now and then."""
        plan = self.random.choice(self.blanks)
        draw = self.random.random()
        if draw < 0.6:
            how = self.random.choice((FRESH, FRESH, FRESH, SPENT, SPENT, SCRATCH, True, False))
            inner = self.random.choice(self.blanks) if draw < 0.1 else None
            inside = (self.train((inner, self.random.choice((FRESH, SPENT, False)))),) if inner is not None else ()
            other = self.random.choice(self.blocks)
            return self.train((other, False), (plan, how), inside=inside) if draw < 0.3 else self.train((plan, how), inside=inside)
        calls: list[Call] = [("read", plan.name), ("evict", plan.name), ("prefetch", plan.name), ("write", plan.name, 9)]
        calls += [("delete", plan.name), ("declare", plan.name), ("declare", plan.name)]
        return self.random.choices(calls, [4, 6, 3, 2, 1, 2, 2])[0]

    def cyclic(self) -> list[Call]:
        return [self.use(plan.name, write=False) for _ in range(self.random.randint(2, 4)) for plan in self.blocks]

    def adapters(self) -> list[Call]:
        """Most blocks are only read, a few are written, as in a low-rank fine-tune."""
        calls: list[Call] = []
        for _ in range(self.random.randint(1, 4)):
            for index, plan in enumerate(self.blocks):
                calls.append(self.use(plan.name, write=index % 4 == 0))
        return calls

    def experts(self) -> list[Call]:
        """A few of many, at random, with a hint before they are needed."""
        calls: list[Call] = []
        for _ in range(self.random.randint(4, 10)):
            chosen = self.fitting(2)
            if chosen and self.random.random() < 0.5:
                calls.append(("prefetch", *chosen))
            if chosen:
                calls.append(self.use(*chosen))
        return calls

    def crowd(self) -> list[Call]:
        """Several blocks at once, as many as fit: whoever asks has to wait for others, and for room."""
        calls: list[Call] = []
        for _ in range(self.random.randint(4, 12)):
            chosen = self.fitting(self.random.choice((2, 3, 4, 8)))
            outer = chosen[: len(chosen) // 2]
            if outer and self.random.random() < 0.3:  # half of them first, the rest inside
                calls.append(self.use(*outer, inside=(self.use(*chosen[len(outer) :], write=False),)))
            elif chosen:
                calls.append(self.use(*chosen))
            if self.random.random() < 0.2:
                calls.append(self.any_call(2))
        return calls

    def nesting(self) -> list[Call]:
        """A lease inside a lease, while others commit: who waits for whom is all that matters."""
        calls: list[Call] = []
        for _ in range(self.random.randint(3, 8)):
            if self.random.random() < 0.4:
                calls.append(("commit", self.random.random() < 0.8) if self.nvme else ("flush",))
            else:
                calls.append(self.use(self.name(), inside=(self.use(self.name(), write=self.random.random() < 0.7),)))
        return calls

    def impatient(self) -> list[Call]:
        """Calls that are given up half-way (see `with_cancellations`), and a look at what became of them."""
        calls: list[Call] = []
        for _ in range(self.random.randint(3, 8)):
            name = self.name()
            given_up: list[Call] = [("write", name, 9), ("write", name, 0), ("evict", name), ("read", name), ("flush",), self.use(name)]
            if self.blanks:
                given_up += [self.with_a_blank() for _ in range(6)]
            if self.extra:
                given_up += [("put", self.extra[0].name), ("delete", self.extra[0].name)]
            calls.append(("cancel", self.random.choice((0, 1, 5, 20, 50, 100)), self.random.choice(given_up)))
            calls += [("read", name), self.use(name, write=False)]
        return calls

    def anything(self, depth: int = 0) -> list[Call]:
        """All calls there are, at random."""
        number = self.random.randint(3, 14) if depth == 0 else self.random.randint(1, 2)
        return [self.any_call(depth) for _ in range(number)]

    def any_call(self, depth: int) -> Call:
        draw = self.random.random()
        if self.blanks and self.random.random() < 0.4:
            return self.with_a_blank()
        name = self.name()
        if draw < 0.35:
            chosen = self.fitting(self.random.choice((1, 1, 2, 3))) or [self.blocks[0].name]
            inside = tuple(self.anything(depth + 1)) if depth < 2 and self.random.random() < 0.25 else ()
            return self.use(*chosen, inside=inside)
        kinds: list[Callable[[], Call]] = [
            lambda: ("read", name),
            lambda: ("write", name, self.random.randrange(4)),
            lambda: ("evict", name),
            lambda: ("prefetch", name, self.name()),
            lambda: ("flush",),
            lambda: ("sleep", self.random.choice((10, 50, 200))),
            lambda: ("hold", name, self.random.choice(("gpu", "ram", "nvme") if self.nvme else ("gpu", "ram"))),
            lambda: ("unhold", name),
        ]
        weights = [5, 5, 3, 3, 3, 1, 1, 2]
        if self.nvme:
            kinds.append(lambda: ("commit", self.random.random() < 0.5))
            weights.append(3)
        if self.extra:
            extra = self.random.choice(self.extra).name
            kinds += [lambda: ("put", extra), lambda: ("delete", extra), lambda: self.use(extra), lambda: ("read", extra)]
            weights += [4, 3, 3, 2]
        return self.random.choices(kinds, weights)[0]()

    def calls(self, *, task: bool = False) -> Calls:
        shapes = [self.training, self.cyclic, self.adapters, self.experts, self.crowd, self.crowd, *(self.anything,) * 4]
        if self.blanks:
            shapes += [self.gradients] * 8
        shape = self.random.choice(shapes + [self.impatient] * 4 if task else shapes)
        if self.only_nesting:
            shape = self.nesting
        calls = shape()
        if shape not in (self.anything, self.impatient, self.nesting) and self.random.random() < 0.5:
            often: Call = ("commit", self.random.random() < 0.5) if self.nvme else ("flush",)
            calls.insert(self.random.randrange(len(calls) + 1), self.random.choice((often, ("flush",))))
        return tuple(calls[:40])

    def with_cancellations(self, calls: Calls) -> Calls:
        if self.random.random() < 0.4:
            return calls
        after = (0, 1, 5, 20, 50, 100, 300)
        return tuple(("cancel", self.random.choice(after), call) if self._gives_up(call) else call for call in calls)

    def _gives_up(self, call: Call) -> bool:
        return call[0] != "cancel" and self.random.random() < 0.3


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    parts = _Draw(seed)
    rng = parts.random
    parts.nvme = rng.random() < 0.8
    frozen = rng.choice((0.0, 0.0, 0.3))
    tiers = ("gpu", "ram", "ram", "ram", "nvme") if parts.nvme else ("gpu", "ram", "ram")
    largest = rng.choice((1, 1, 2, 4))

    def plan(name: str) -> BlockPlan:
        return BlockPlan(name, rng.randint(1, largest), rng.choice((1, 1, 2)), rng.choice(tiers), rng.random() < frozen)

    parts.blocks = [plan(f"b{index}") for index in range(rng.randint(2, 8))]
    parts.extra = [plan(f"x{index}") for index in range(rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.4:
        parts.blanks = [replace(plan(f"g{index}"), tier="ram", frozen=False) for index in range(rng.randint(1, 4))]
    everything = [*parts.blocks, *parts.extra, *parts.blanks]
    total, most = sum(each.pages for each in everything), max(each.pages for each in everything)
    parts.gpu_pages = rng.randint(most, max(most, total + 1))
    ram_pages = rng.randint(most, total + 1) if parts.nvme else total + rng.randint(0, 3)
    parts.only_nesting = rng.random() < 0.1
    threads = tuple(parts.calls() for _ in range(rng.choice((1, 1, 2, 2, 3, 4))))
    tasks = tuple(parts.with_cancellations(parts.calls(task=True)) for _ in range(rng.choice((0, 0, 0, 1, 2, 3))))
    return Scenario(
        blocks=tuple(parts.blocks),
        extra=tuple(parts.extra),
        gpu_pages=parts.gpu_pages,
        ram_pages=ram_pages,
        threads=threads,
        tasks=tasks,
        nvme=parts.nvme,
        nvme_pages=rng.choice((None, None, None, 3 * total + 40)),
        policy=rng.choice(POLICIES),
        faults=rng.choice((0.0, 0.0, 0.01, 0.05)),
        stuck=(rng.choice(("read", "write", "h2d", "d2h")), rng.choice(parts.blocks).name) if rng.random() < 0.1 else None,
        slow=rng.choice((0.0, 0.05, 0.2)),
        sticky=rng.choice((0.0, 0.3, 0.8)),
        orders=rng.choice((1, 2, 8)),
        keep=rng.choice((1, 1, 2)),
        checksum=rng.random() < 0.8,
        cuda=rng.random() < 0.4,
        locked_pages=rng.choice((1 << 20, 1 << 20, ram_pages // 2)),
        close_after=rng.choice((None,) * 14 + (500,)),
        blanks=tuple(parts.blanks),
    )
