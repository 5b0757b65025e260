"""The whole store against a dull dict of tensors.

Two actors, the main thread and a worker, call whatever they like and keep leases across calls. After every call budgets hold,
leased tensors stay where they are, and what is read is what the model says. `TIERSTORE_TEST_DEVICE` chooses the device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import queue
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.helpers import Hostile, Watched, check_invariants, dump
from tierstore import TierStore
from tierstore.catalog import ITEM_BYTES, PAGE, PAIRED, lay_out
from tierstore.errors import (
    BlockExistsError,
    BlockNotFoundError,
    CapacityError,
    FrozenError,
    LeaseError,
    LeaseTimeoutError,
    SizeError,
    TensorError,
    TierFullError,
)
from tierstore.mover import operations
from tierstore.policies import Policy, resolve
from tierstore.residency import Tier
from tierstore.sync import CommitHandle, Use
from tierstore.tiers.device import DTYPES
from tierstore.tiers.device import NAMES as DTYPE_NAMES

DEVICE = os.environ.get("TIERSTORE_TEST_DEVICE", "cpu")
PATIENCE_S = 30
"""What takes longer hangs."""

T = TypeVar("T")
TOTALS: Counter[str] = Counter()
"""What happened in all examples together."""


class HangError(AssertionError):
    """A call that never returns."""


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaNs compare, and dtypes without arithmetic too."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(raw(left), raw(right))


def make_tensor(dtype: str, shape: tuple[int, ...], layout: int, seed: int) -> torch.Tensor:
    """Any bits that the dtype can have, in a tensor that may not be contiguous."""
    kind = DTYPES[dtype]
    outer = tuple(size + 1 for size in shape) if layout == 2 else shape[::-1] if layout == 1 else shape
    values = torch.randint(
        0, 2 if dtype == "BOOL" else 256, (math.prod(outer) * kind.itemsize,), dtype=torch.uint8, generator=generator(seed)
    )
    tensor = values.view(kind).reshape(outer)
    if layout == 1:
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if layout == 2:
        return tensor[tuple(slice(1, None) for _ in shape)]
    return tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_file(tensors: dict[str, torch.Tensor], shift: int) -> bytes:
    """A safetensors file, as any program may write one: nothing in it is aligned."""
    header: dict[str, Any] = {"__metadata__": {"pad": "x" * shift}}
    end = 0
    for name, tensor in tensors.items():
        dtype = DTYPE_NAMES[tensor.dtype]
        shape = [*tensor.shape[:-1], 2 * tensor.shape[-1]] if dtype in PAIRED else list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + raw(tensor).numel()]}
        end += raw(tensor).numel()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(raw(tensor).numpy().tobytes() for tensor in tensors.values())


def renewed(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Other bits of the same dtype and shape."""
    values = torch.randint(
        0, 2 if tensor.dtype == torch.bool else 256, (raw(tensor).numel(),), dtype=torch.uint8, generator=generator(seed)
    )
    return values.view(tensor.dtype).reshape(tensor.shape)


@dataclass
class Model:
    """What a block should be."""

    tensors: dict[str, torch.Tensor]
    single: bool
    frozen: bool

    @property
    def nbytes(self) -> int:
        total = 0
        for tensor in self.tensors.values():
            total += -(-tensor.numel() * tensor.element_size() // 256) * 256
        return max(PAGE, -(-total // PAGE) * PAGE)

    def copy(self) -> Model:
        return Model({name: tensor.clone() for name, tensor in self.tensors.items()}, self.single, self.frozen)

    def check(self, name: str, found: object) -> None:
        mapping = {name: found} if self.single else found
        assert isinstance(mapping, dict)
        assert list(mapping) == list(self.tensors), f"{name!r} has other tensors"
        for key, expected in self.tensors.items():
            value = mapping[key]
            assert isinstance(value, torch.Tensor)
            assert same(value, expected), f"tensor {key!r} of block {name!r} is {value}, not {expected}"


@dataclass(eq=False)
class Held:
    """A lease that is out."""

    context: Use
    names: tuple[str, ...]
    writes: frozenset[str]
    tensors: dict[str, dict[str, torch.Tensor]]


@dataclass(eq=False)
class Actor:
    """A thread that may own leases: the main thread, or one that does what it is told."""

    name: str
    inline: bool
    leases: list[Held] = field(default_factory=list)
    tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        if not self.inline:
            self.thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self.thread.start()

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            call, future = task
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def reads(self, name: str) -> bool:
        return any(name in held.names for held in self.leases)

    def writes(self, name: str) -> bool:
        return any(name in held.writes for held in self.leases)

    def stop(self) -> None:
        if not self.inline:
            self.tasks.put(None)
            self.thread.join()


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda name: not name.startswith("__"))
SHAPES = st.one_of(
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.integers(0, 12000).map(lambda size: (size,)),
)
TENSORS = st.tuples(st.sampled_from(sorted(ITEM_BYTES)), SHAPES, st.integers(0, 2)).map(
    lambda drawn: (drawn[0], drawn[1] or ((1,) if drawn[0] in PAIRED else ()), drawn[2])
)
WHO = st.booleans()
PICK = st.integers(0, 50)


class StoreMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.store: TierStore | None = None
        self.directory: str | None = None
        self.actors = {True: Actor("main", True), False: Actor("worker", False)}
        self.blocks: dict[str, Model] = {}
        self.blank: dict[str, Model] = {}  # declared, and without content: of these only the shapes count
        self.declared: set[str] = set()  # those that fresh leases write and spent ones use up
        self.committed: dict[str, Model] = {}
        self.commits: list[tuple[CommitHandle, dict[str, Model]]] = []
        self.holds: dict[str, str] = {}
        self.tight = False
        self.hinted = False
        self.seed = 0
        self.models: dict[Path, bytes] = {}
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    # -- opening and closing -----------------------------------------------------------------------------------------------

    @initialize(
        gpu=st.integers(8, 64),
        ram=st.integers(12, 64),
        nvme=st.integers(0, 3),
        limit=st.integers(40, 400),
        blocks=st.integers(0, 24),
        policy=st.sampled_from(["lru", "lookahead", "static", "hostile"]),
        keep=st.integers(1, 2),
        direct=st.booleans(),
    )
    def open(self, gpu: int, ram: int, nvme: int, limit: int, blocks: int, policy: str, keep: int, direct: bool) -> None:
        self.policy, self.keep, self.direct = policy, keep, direct
        if nvme:
            self.directory = str(Path(self.temporary.name, "swap"))
            self.tight = nvme == 3
        self.limit_bytes = limit * PAGE if self.tight else 256 << 20
        self._open(gpu, ram)
        for number in range(blocks):  # enough to overflow, from the beginning
            self._put(f"block {number}", [("F32", (1 + number % 5 * 1000,), 0)], "ram", number % 2 == 0, False, True)

    def _open(self, gpu: int, ram: int) -> None:
        policy: Policy = Hostile(self.seed) if self.policy == "hostile" else resolve(self.policy)
        self.gpu_bytes, self.ram_bytes = gpu * PAGE, (ram + 4) * PAGE
        self.store = TierStore(
            self.gpu_bytes,
            self.ram_bytes + (16 * PAGE if DEVICE == "cuda" else 0),
            self.directory,
            device=DEVICE,
            nvme_limit=self.limit_bytes if self.directory else None,
            policy=Watched(policy),
            keep=self.keep if self.directory else 1,
            direct_io="auto" if self.direct or not self.directory else False,
        )
        self.room = self.store.engine.placement.capacity_bytes(Tier.RAM)
        assert sorted(self.store) == sorted(self.blocks)

    def _close(self) -> None:
        store, self.store = self.store, None
        if store is None:
            return
        stats = store.stats()
        TOTALS["evictions"] += stats.tiers["gpu"].evictions + stats.tiers["ram"].evictions
        TOTALS["nvme reads"] += stats.links["nvme_read"].transfers
        TOTALS["write-backs"] += stats.links["d2h"].bytes_by_kind.get("write-back", 0) + stats.links["nvme_write"].bytes_by_kind.get(
            "write-back", 0
        )
        TOTALS["prefetches"] += sum(link.bytes_by_kind.get("prefetch", 0) for link in stats.links.values())
        TOTALS["compactions"] += stats.compactions
        TOTALS["commits"] += stats.commits
        TOTALS["blank"] += len(self.blank)
        self._watched(store, store.close)

    @rule(gpu=st.integers(8, 128), ram=st.integers(12, 128), leased=st.booleans(), again=st.integers(0, 2))
    def reopen(self, gpu: int, ram: int, leased: bool, again: int) -> None:
        """What was not committed is gone."""
        if again:
            return
        if not leased:
            self._release_all()
        self._finish_commits()
        self._close()
        for actor in self.actors.values():
            for held in actor.leases:  # harmless after the end
                self._on(actor, held.context.__exit__, None, None, None)
            actor.leases.clear()
        self.holds.clear()
        self.blank.clear()
        self.blocks = {name: block.copy() for name, block in self.committed.items()}
        largest = max((block.nbytes for block in self.blocks.values()), default=0) // PAGE
        self._open(max(gpu, largest), max(ram, largest))

    def teardown(self) -> None:
        try:
            if self.store is not None and self.store.engine.failure is None:
                self._release_all()
                self._finish_commits()
                for name, block in self.blocks.items():
                    block.check(name, self._read(name))
            self._close()
            for path, content in self.models.items():
                assert path.read_bytes() == content, "a model file was written"
        finally:
            for actor in self.actors.values():
                actor.stop()
            self.temporary.cleanup()

    # -- calling ---------------------------------------------------------------------------------------------------------

    def _on(self, actor: Actor, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        call = functools.partial(function, *arguments, **options)
        assert self.store is None or self.store.engine.failure is None, self.store.engine.failure
        if actor.inline:
            return self._watched(self.store, call) if self.store is not None else call()
        future: Future[T] = Future()
        actor.tasks.put((call, future))
        try:
            return future.result(PATIENCE_S)
        except TimeoutError as error:
            if future.done() and future.exception() is error:
                raise
            raise HangError(dump(self.store.engine) if self.store is not None else "the store is closed") from None

    def _watched(self, store: TierStore, call: Callable[[], T]) -> T:
        """Call in this thread; if that never returns, the engine is made to fail, which ends every wait."""
        engine, found = store._engine, []
        assert engine is not None

        def give_up() -> None:
            found.append(dump(engine))
            engine.loop.call_soon_threadsafe(engine._fail, HangError(found[0]))

        timer = threading.Timer(PATIENCE_S, give_up)
        timer.start()
        try:
            return call()
        except Exception:
            if found:
                raise HangError(found[0]) from None
            raise
        finally:
            timer.cancel()

    @property
    def open_store(self) -> TierStore:
        assert self.store is not None
        return self.store

    def _other(self, actor: Actor) -> Actor:
        return self.actors[not actor.inline]

    def _names(self, *picks: int) -> tuple[str, ...]:
        names = list(self.blocks)
        return tuple(dict.fromkeys(names[pick % len(names)] for pick in picks)) if names else ()

    @contextlib.contextmanager
    def _may_be_full(self) -> Iterator[None]:
        """A tight drive may refuse anything; then nothing has changed."""
        try:
            yield
        except TierFullError:
            assert self.tight
            TOTALS["full"] += 1

    @property
    def _leased(self) -> bool:
        return any(actor.leases for actor in self.actors.values())

    @property
    def _write_leased(self) -> bool:
        return any(held.writes for actor in self.actors.values() for held in actor.leases)

    # -- blocks ------------------------------------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        tensors=st.lists(TENSORS, min_size=1, max_size=4),
        tier=st.sampled_from(["gpu", "ram", "ram", "nvme"]),
        single=st.booleans(),
        frozen=st.integers(0, 9).map(lambda number: number == 0),
        who=WHO,
    )
    def put_block(
        self, name: str, tensors: list[tuple[str, tuple[int, ...], int]], tier: str, single: bool, frozen: bool, who: bool
    ) -> None:
        self._put(name, tensors, tier, single, frozen, who)

    def _put(self, name: str, tensors: list[tuple[str, tuple[int, ...], int]], tier: str, single: bool, frozen: bool, who: bool) -> None:
        if tier == "nvme" and self.directory is None:
            tier = "ram"
        if tier == "gpu" and self._leased:
            tier = "ram"  # it may have to wait for the other's lease
        values: dict[str, torch.Tensor] = {}
        for number, (dtype, shape, layout) in enumerate(tensors):
            self.seed += 1
            values[name if single else f"{name}/{number}"] = make_tensor(dtype, shape, layout, self.seed)
            if single:
                break
        model = Model({key: value.clone() for key, value in values.items()}, single, frozen)
        given = values[name] if single else values
        actor = self.actors[who]
        with self._may_be_full():
            try:
                self._on(actor, self.open_store.put, name, given, tier=tier, frozen=frozen)
            except BlockExistsError:
                assert name in self._all
                return
            except TierFullError:
                raise
            except CapacityError:
                used = sum(block.nbytes for block in self._all.values())
                too_large = model.nbytes > min(self.gpu_bytes, self.room)
                assert too_large or self.holds or (self.directory is None and used + model.nbytes > self.room)
                assert name not in self.open_store
                return
            assert name not in self._all
            self.blocks[name] = model
            self.declared.discard(name)
            for value in values.values():
                if value.dtype is not torch.float4_e2m1fn_x2:
                    value.zero_()  # the store has its own copy

    @rule(
        tensors=st.lists(TENSORS, min_size=1, max_size=5),
        where=st.lists(st.integers(0, 2), min_size=5, max_size=5),
        taken=st.integers(0, 7),
        shift=st.integers(0, 600),
        who=WHO,
    )
    def adopt(self, tensors: list[tuple[str, tuple[int, ...], int]], where: list[int], taken: int, shift: int, who: bool) -> None:
        """Of a model file, a tensor to each block that `where` says. Sometimes a block's name is taken: then nothing is adopted."""
        self.seed += 1
        values = {f"{self.seed}/{number}": make_tensor(dtype, shape, 0, self.seed) for number, (dtype, shape, _) in enumerate(tensors)}
        path = Path(self.temporary.name, f"model {self.seed}.safetensors")
        path.write_bytes(model_file(values, shift))
        self.models[path] = path.read_bytes()
        home = {tensor: f"adopted {self.seed}.{where[number]}" for number, tensor in enumerate(values)}
        if taken == 0 and self._all:
            home[next(reversed(home))] = next(iter(self._all))
        planned = {block: Model({}, single=False, frozen=False) for block in sorted(set(home.values()))}
        for tensor, value in values.items():
            planned[home[tensor]].tensors[tensor] = value
        before = sorted(self.open_store)
        try:
            names = self._on(self.actors[who], self.open_store.adopt, path, layout=home.get)
        except BlockExistsError:
            assert not planned.keys().isdisjoint(self._all)
        except SizeError:
            largest = max(model.nbytes for model in planned.values())
            homes = sum(block.nbytes for name, block in self._all.items() if not self.open_store.info(name).adopted)
            no_passage = self.directory is None and homes + largest > self.room
            assert self.holds or no_passage or largest > min(self.gpu_bytes, self.room)
        else:
            assert sorted(names) == sorted(planned)
            assert planned.keys().isdisjoint(self._all)
            assert all(self.open_store.info(name).adopted and not self.open_store.info(name).dirty for name in names)
            self.blocks |= planned
            TOTALS["adopted"] += len(names)
            return
        assert sorted(self.open_store) == before

    @property
    def _homeless(self) -> bool:
        """Without a directory, adopted blocks find no room in RAM where others have filled it."""
        return self.directory is None and bool(self.models) and sum(block.nbytes for block in self._all.values()) > self.room

    @rule(pick=PICK, who=WHO)
    def delete(self, pick: int, who: bool) -> None:
        actor = self.actors[who]
        for name in self._names(pick):
            if self._other(actor).reads(name):
                return
            if actor.reads(name):
                with pytest.raises(LeaseError):
                    self._on(actor, self.open_store.delete, name)
                return
            self._on(actor, self.open_store.delete, name)
            del self.blocks[name]
            self.holds.pop(name, None)
            assert name not in self.open_store
            with pytest.raises(BlockNotFoundError):
                self.open_store.info(name)

    # -- blocks without content ----------------------------------------------------------------------------------------------

    @property
    def _all(self) -> dict[str, Model]:
        return self.blocks | self.blank

    @rule(numel=st.integers(1, 8000), who=WHO)
    def declare(self, numel: int, who: bool) -> None:
        self.seed += 1
        name = f"declared {self.seed}"
        store, model = self.open_store, Model({name: torch.zeros(numel)}, single=True, frozen=False)
        block = lay_out(name, [(name, "F32", (numel,))], single=True)
        try:
            self._on(self.actors[who], lambda: store._run(operations.declare(store.engine, block, threading.get_ident())))
        except CapacityError:
            used = sum(block.nbytes for block in self._all.values())
            too_large = model.nbytes > min(self.gpu_bytes, self.room)
            assert too_large or self.holds or (self.directory is None and used + model.nbytes > self.room)
            assert name not in store
            return
        self.blank[name] = model
        self.declared.add(name)

    def _pick_declared(self, pick: int, known: Collection[str]) -> str | None:
        names = [name for name in sorted(known) if name in self.declared]
        return names[pick % len(names)] if names else None

    @rule(pick=PICK, who=WHO, keep=st.booleans(), fail=st.integers(0, 4), spent=st.booleans())
    def write_whole(self, pick: int, who: bool, keep: bool, fail: int, spent: bool) -> None:
        """A fresh lease: what was there does not matter, and nothing may be."""
        actor, name = self.actors[who], self._pick_declared(pick, self._all)
        if name is None:
            return
        before = self.blank.pop(name, None)
        if before is not None:
            self.blocks[name] = before
        held = self._lease(actor, (name,), frozenset({name}), fresh=True, spent=spent)
        if held is None:
            lost = self._has_no_content(name)
            assert lost or before is None, "what nobody has written has content"
            if lost:
                self.blank[name] = self.blocks.pop(name)
            return
        if fail:
            self._change(actor, held)
        if keep and fail and not spent and len(actor.leases) < 3:
            actor.leases.append(held)
            return
        self._on(actor, held.context.__exit__, None if fail else ValueError, None, None)
        TOTALS["written whole"] += 1
        if (spent or not fail) and self._has_no_content(name) and not actor.reads(name):
            self.blank[name] = self.blocks.pop(name)
        elif fail:
            assert not spent or actor.reads(name), f"{name!r} was used up, and is still there"
        else:
            assert before is None, f"{name!r} has content that nobody has written"

    @rule(pick=PICK, who=WHO, fail=st.integers(0, 4))
    def use_up(self, pick: int, who: bool, fail: int) -> None:
        actor, name = self.actors[who], self._pick_declared(pick, self.blocks)
        if name is None:
            return
        outer = actor.reads(name)
        held = self._lease(actor, (name,), frozenset({name}), spent=True)
        if held is None:
            return
        self._on(actor, held.context.__exit__, None if fail else ValueError, None, None)
        TOTALS["used up"] += 1
        assert self._has_no_content(name) == (fail > 0 and not outer)
        if fail and not outer:
            self.blank[name] = self.blocks.pop(name)

    @rule(laps=st.integers(1, 3), who=WHO, some=st.integers(1, 7))
    def step(self, laps: int, who: bool, some: int) -> None:
        """Write gradients and use them up beside the blocks that are there, as a training step does."""
        self._release_all()
        if not self.declared & self._all.keys():
            for number in range(3):
                self.declare(1000 + 2000 * number, who)
        for _ in range(laps):
            count = min(some, len(self.declared & self._all.keys()))
            for index in range(count):
                self.write_whole(index, who, False, 1 + index, False)
            for name in list(self.blocks)[:8]:
                held = self._lease(self.actors[who], (name,), frozenset())
                if held is not None:
                    self._on(self.actors[who], held.context.__exit__, None, None, None)
            for index in range(count):
                self.use_up(index, who, index)

    def _has_no_content(self, name: str) -> bool:
        info = self.open_store.info(name)
        with self.open_store.engine.lock:
            blank = self.open_store.engine.scheduler.names[name].blank
        assert not (blank and (info.tiers or info.dirty))  # but what has content may be on its way between two tiers
        return blank

    @precondition(lambda self: bool(self.blank))
    @rule(pick=PICK, who=WHO, gone=st.booleans())
    def look_at_nothing(self, pick: int, who: bool, gone: bool) -> None:
        actor, store, names = self.actors[who], self.open_store, sorted(self.blank)
        name = names[pick % len(names)]
        assert store.info(name).tiers == ()
        store.prefetch(name)
        for call in (
            lambda: store.read(name),
            lambda: store.write(name, self.blank[name].tensors[name]),
            lambda: store.use(name).__enter__(),
            lambda: store.hold(name, "gpu"),
        ):
            with pytest.raises((LeaseError, CapacityError), match=r"has no content|cannot be held"):
                self._on(actor, call)
        if self.holds.get(name) not in ("gpu", "ram"):
            self._on(actor, store.evict, name)
        if gone:
            self._on(actor, store.delete, name)
            del self.blank[name]
            self.holds.pop(name, None)

    # -- leases ------------------------------------------------------------------------------------------------------------

    def _lease(
        self, actor: Actor, names: tuple[str, ...], writes: frozenset[str], *, fresh: bool = False, spent: bool = False
    ) -> Held | None:
        """Take a lease, and check what it yields; None where it is rightly refused."""
        other = self._other(actor)
        timeout = 0.05 if other.leases else PATIENCE_S * 2
        if fresh or spent:
            engine = self.open_store.engine
            context = Use(engine, names, writes, timeout, fresh=names if fresh else (), spent=names if spent else ())
        else:
            context = self.open_store.use(*names, write=writes, timeout=timeout)
        try:
            found = self._on(actor, context.__enter__)
        except FrozenError:
            assert any(self.blocks[name].frozen for name in writes)
            return None
        except LeaseTimeoutError:
            if not other.leases:
                raise HangError(dump(self.open_store.engine)) from None
            return None
        except TierFullError:
            assert self.tight
            return None
        except CapacityError:
            own = {name: self.blocks[name].nbytes for held in actor.leases for name in held.names}
            total = sum((own | {name: self.blocks[name].nbytes for name in names}).values())
            assert total > self.gpu_bytes or own or self.holds or self._homeless
            return None
        except LeaseError:
            assert any(actor.reads(name) and not actor.writes(name) for name in writes)
            return None
        values = (found,) if len(names) == 1 else found
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in zip(names, values, strict=True):
            assert not other.writes(name), f"{name!r} was leased beside a writer"
            assert name not in writes or not other.reads(name), f"{name!r} was leased for writing beside a reader"
            if not fresh:
                self.blocks[name].check(name, value)
            tensors[name] = {name: value} if self.blocks[name].single else value
            for tensor in tensors[name].values():
                assert tensor.data_ptr() % 256 == 0
                assert tensor.device.type == DEVICE
        return Held(context, names, writes, tensors)

    def _change(self, actor: Actor, held: Held) -> None:
        """Write into the leased tensors."""
        for name in sorted(held.writes):
            for key, tensor in held.tensors[name].items():
                self.seed += 1
                value = renewed(tensor, self.seed)
                self._on(actor, tensor.copy_, value)
                self.blocks[name].tensors[key] = value.clone()

    @rule(picks=st.lists(PICK, min_size=1, max_size=4), writes=st.integers(0, 15), who=WHO, keep=st.booleans(), fail=st.booleans())
    def use(self, picks: list[int], writes: int, who: bool, keep: bool, fail: bool) -> None:
        actor, names = self.actors[who], self._names(*picks)
        if not names:
            return
        held = self._lease(actor, names, frozenset(name for index, name in enumerate(names) if writes >> index & 1))
        if held is None:
            return
        self._change(actor, held)
        if keep and len(actor.leases) < 3:
            actor.leases.append(held)
        else:
            error = ValueError if fail else None
            self._on(actor, held.context.__exit__, error, None, None)

    @rule(laps=st.integers(1, 4), write=st.booleans())
    def sweep(self, laps: int, write: bool) -> None:
        """Use all blocks in turn, as a training step does."""
        self._release_all()
        for _ in range(laps):
            for name, block in list(self.blocks.items()):
                held = self._lease(self.actors[True], (name,), frozenset({name} if write and not block.frozen else ()))
                if held is not None:
                    self._change(self.actors[True], held)
                    self._on(self.actors[True], held.context.__exit__, None, None, None)

    @precondition(lambda self: self._leased)
    @rule(who=WHO, index=st.integers(0, 5))
    def release(self, who: bool, index: int) -> None:
        actor = self.actors[who] if self.actors[who].leases else self.actors[not who]
        held = actor.leases.pop(index % len(actor.leases))
        self._on(actor, held.context.__exit__, None, None, None)

    def _release_all(self) -> None:
        for actor in self.actors.values():
            while actor.leases:
                held = actor.leases.pop()
                self._on(actor, held.context.__exit__, None, None, None)

    # -- the host's own access ---------------------------------------------------------------------------------------------

    def _read(self, name: str, actor: Actor | None = None) -> object:
        return self._on(actor or self.actors[True], self.open_store.read, name)

    @rule(pick=PICK, who=WHO)
    def read(self, pick: int, who: bool) -> None:
        actor = self.actors[who]
        for name in self._names(pick):
            if actor.writes(name):
                with pytest.raises(LeaseError):
                    self._read(name, actor)
            elif not self._other(actor).writes(name):
                self.blocks[name].check(name, self._read(name, actor))

    @rule(pick=PICK, who=WHO, part=st.integers(0, 15), wrong=st.integers(0, 9))
    def write(self, pick: int, who: bool, part: int, wrong: int) -> None:
        actor = self.actors[who]
        for name in self._names(pick):
            block = self.blocks[name]
            if self._other(actor).reads(name):
                return
            self.seed += 1
            values = {key: renewed(tensor, self.seed) for index, (key, tensor) in enumerate(block.tensors.items()) if part >> index & 1}
            if not values:
                return
            if wrong == 0:
                values[next(iter(values))] = torch.zeros(3, 3, 3, 3, 3)
            given = next(iter(values.values())) if block.single else values
            refused: type[Exception] | None = TensorError if wrong == 0 else FrozenError if block.frozen else None
            if refused is None and actor.reads(name):
                refused = LeaseError
            with self._may_be_full(), contextlib.suppress(CapacityError) if self._homeless else contextlib.nullcontext():
                if refused is not None:
                    with pytest.raises(refused):
                        self._on(actor, self.open_store.write, name, given)
                else:
                    self._on(actor, self.open_store.write, name, given)
                    block.tensors.update({key: value.clone() for key, value in values.items()})

    # -- placement by hand -------------------------------------------------------------------------------------------------

    @rule(picks=st.lists(PICK, min_size=1, max_size=4))
    def prefetch(self, picks: list[int]) -> None:
        if self.blocks:
            self.hinted = True
            self.open_store.prefetch(*self._names(*picks))

    @rule(pick=PICK, who=WHO)
    def evict(self, pick: int, who: bool) -> None:
        actor = self.actors[who]
        for name in self._names(pick):
            if self._other(actor).reads(name):
                return
            with self._may_be_full():
                if actor.reads(name) or self.holds.get(name) in ("gpu", "ram"):
                    with pytest.raises(LeaseError):
                        self._on(actor, self.open_store.evict, name)
                    return
                self._on(actor, self.open_store.evict, name)
                if self.policy == "lru" and not self.hinted:  # otherwise it may be brought back at once
                    assert "gpu" not in self.open_store.info(name).tiers

    @rule(pick=PICK, tier=st.sampled_from(["gpu", "ram", "nvme"]), who=WHO)
    def hold(self, pick: int, tier: str, who: bool) -> None:
        actor = self.actors[who]
        for name in self._names(pick):
            if self._leased or (tier == "nvme" and self.directory is None):
                return
            with self._may_be_full():
                try:
                    self._on(actor, self.open_store.hold, name, tier)
                except TierFullError:
                    raise
                except CapacityError:
                    tight = self.blocks[name].nbytes + max(block.nbytes for block in self._all.values()) > self.room
                    assert self.holds or tight or self._homeless
                    return
                self.holds[name] = tier
                assert self.open_store.info(name).hold == tier
                if tier != "nvme":
                    assert tier in self.open_store.info(name).tiers

    @rule(pick=PICK)
    def unhold(self, pick: int) -> None:
        for name in self._names(pick):
            self.open_store.unhold(name)
            self.holds.pop(name, None)

    # -- durability --------------------------------------------------------------------------------------------------------

    @rule(who=WHO)
    def flush(self, who: bool) -> None:
        actor = self.actors[who]
        if self._write_leased:
            return
        with self._may_be_full():
            self._on(actor, self.open_store.flush)
            assert not any(self.open_store.info(name).dirty for name in self._all)

    @rule(wait=st.booleans(), who=WHO)
    def commit(self, wait: bool, who: bool) -> None:
        actor = self.actors[who]
        if self.directory is None or self._write_leased:
            return
        snapshot = {name: block.copy() for name, block in self.blocks.items()}
        if wait:
            self._finish_commits()
            with self._may_be_full():
                generation = self._on(actor, self.open_store.commit, {"blocks": len(snapshot)})
                self.committed = snapshot
                commit = self.open_store.committed
                assert commit is not None
                assert (commit.generation, commit.metadata) == (generation, {"blocks": len(snapshot)})
        elif len(self.commits) < 3:
            handle = self._on(actor, self.open_store.commit, wait=False)
            assert isinstance(handle, CommitHandle)
            self.commits.append((handle, snapshot))

    @precondition(lambda self: bool(self.commits))
    @rule()
    def finish_commits(self) -> None:
        self._finish_commits()

    def _finish_commits(self) -> None:
        for handle, snapshot in self.commits:
            with self._may_be_full():
                try:
                    handle.result(PATIENCE_S)
                except TimeoutError:
                    raise HangError(dump(self.open_store.engine)) from None
                self.committed = snapshot
        self.commits.clear()

    # -- what always holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        if self.store is None:
            return
        engine = self.store.engine
        check_invariants(engine)
        self._check_budgets()
        arena = engine.device.tensor.data_ptr()
        for actor in self.actors.values():
            for held in actor.leases:
                for name, tensors in held.tensors.items():
                    record = engine.scheduler.names[name]
                    for spec in record.block.tensors:
                        tensor = tensors[spec.name]
                        assert tensor.numel() == 0 or tensor.data_ptr() == arena + record.gpu.offset + spec.offset, f"{name!r} has moved"
                        assert same(tensor, self.blocks[name].tensors[spec.name]), f"{name!r} changed under its lease"
        assert all(self._has_no_content(name) == (name in self.blank) for name in self.declared & self._all.keys())
        for name in random.Random(self.seed).sample(sorted(self.blocks), min(2, len(self.blocks))):
            if not any(actor.writes(name) for actor in self.actors.values()):
                self.blocks[name].check(name, self._read(name))

    def _check_budgets(self) -> None:
        assert self.store is not None
        engine, tiers = self.store.engine, self.store.stats().tiers
        assert engine.device.nbytes == tiers["gpu"].capacity_bytes == self.gpu_bytes
        assert tiers["gpu"].peak_bytes <= self.gpu_bytes
        assert engine.host.nbytes + engine.transfer.nbytes == tiers["ram"].capacity_bytes
        assert tiers["ram"].peak_bytes <= tiers["ram"].capacity_bytes <= self.ram_bytes + (16 * PAGE if DEVICE == "cuda" else 0)
        if self.directory is not None:
            on_disk = 0
            for entry in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):
                    on_disk += entry.stat().st_blocks * 512
            assert on_disk <= self.limit_bytes
            assert tiers["nvme"].peak_bytes <= tiers["nvme"].capacity_bytes


EXAMPLES = {"default": 40, "ci": 150, "nightly": 3000}


@pytest.mark.timeout(24 * 3600)
def test_the_store_is_a_dict_of_tensors() -> None:
    TOTALS.clear()
    examples = EXAMPLES[os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")]
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(TOTALS))
    for what in ("evictions", "nvme reads", "write-backs", "compactions", "commits", "written whole", "used up", "adopted"):
        assert TOTALS[what], f"the machine saw no {what}: {dict(TOTALS)}"
