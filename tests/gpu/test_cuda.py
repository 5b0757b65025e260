"""The CUDA path: exact under streaming, without host waits, and free of races when copies are delayed at random."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch

from tierstore import TierStore
from tierstore.catalog import lay_out
from tierstore.mover import operations
from tierstore.mover.streams import CudaCopies, Report
from tierstore.requests import Action, Order, Record
from tierstore.residency import Event, Tier
from tierstore.sync import Use

pytestmark = pytest.mark.cuda

KIB = 1 << 10
MIB = 1 << 20
ELEMENTS = 64 * KIB
"""fp32 elements of a weight: 256 KiB each, and two moments of the same size."""


def make_blocks(store: TierStore, num_blocks: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Blocks of a weight and two moments; returns the resident copies of the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference: dict[str, dict[str, torch.Tensor]] = {}
    for number in range(num_blocks):
        tensors = {"weight": torch.randn(ELEMENTS, generator=generator), "m": torch.zeros(ELEMENTS), "v": torch.zeros(ELEMENTS)}
        store.put(f"block {number}", tensors)
        reference[f"block {number}"] = {name: value.to("cuda") for name, value in tensors.items()}
    return reference


def update(tensors: dict[str, torch.Tensor], step: int) -> None:
    """An AdamW-like update whose gradient is a function of the weight, so that one stale byte spreads."""
    weight, m, v = tensors["weight"], tensors["m"], tensors["v"]
    gradient = torch.sin(weight * (step + 1))
    m.mul_(0.9).add_(gradient, alpha=0.1)
    v.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
    weight.mul_(0.999).addcdiv_(m, v.sqrt().add_(1e-8), value=-0.01)


def train(store: TierStore, reference: dict[str, dict[str, torch.Tensor]], steps: int) -> None:
    for step in range(steps):
        for name in reference:
            with store.use(name, write=True, timeout=60) as tensors:
                update(tensors, step)
            update(reference[name], step)


def assert_equal(store: TierStore, reference: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, expected in reference.items():
        got = store.read(name)
        assert isinstance(got, dict)
        for tensor, value in expected.items():
            assert torch.equal(got[tensor], value.cpu()), f"{tensor} of {name} differs"


def assert_streamed(store: TierStore, *, nvme: bool = True) -> None:
    stats = store.stats()
    assert stats.tiers["gpu"].evictions > 0
    assert stats.links["d2h"].bytes_by_kind["write-back"] > 0
    if nvme:
        assert stats.links["nvme_read"].bytes > 0
        assert stats.links["nvme_write"].bytes > 0
    for tier in stats.tiers.values():
        assert tier.peak_bytes <= tier.capacity_bytes


@pytest.fixture(params=["lru", "lookahead", "static"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("page_locked", [True, False])
def test_streamed_updates_equal_resident_ones(tmp_path: Path, policy: str, page_locked: bool) -> None:
    with TierStore(gpu=5 * MIB, ram=14 * MIB, nvme=tmp_path / "swap", device="cuda", policy=policy, page_locked=page_locked) as store:
        reference = make_blocks(store, 24)
        train(store, reference, 6)
        assert_streamed(store)
        assert_equal(store, reference)
        assert (store.stats().page_locked_bytes > 0) == page_locked
        store.commit()
    with TierStore(gpu=5 * MIB, ram=14 * MIB, nvme=tmp_path / "swap", device="cuda") as store:
        assert_equal(store, reference)


def test_two_tiers(policy: str) -> None:
    with TierStore(gpu=5 * MIB, ram=40 * MIB, device="cuda", policy=policy) as store:
        reference = make_blocks(store, 24)
        train(store, reference, 6)
        assert_streamed(store, nvme=False)
        assert_equal(store, reference)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_training_thread_never_synchronises_for_blocks_in_ram() -> None:
    with TierStore(gpu=10 * MIB, ram=64 * MIB, device="cuda") as store:
        reference = make_blocks(store, 24)
        train(store, reference, 3)  # the period is known from here on
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(store, reference, 5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_streamed(store, nvme=False)
        assert store.stats().waits.keys() <= {"space", "copy"}
        assert_equal(store, reference)


def test_device_memory_is_flat_after_warm_up(tmp_path: Path) -> None:
    with TierStore(gpu=5 * MIB, ram=14 * MIB, nvme=tmp_path / "swap", device="cuda") as store:
        for number in range(24):
            store.put(f"block {number}", torch.randn(3 * ELEMENTS))
        before = torch.cuda.memory_allocated()
        assert before >= 5 * MIB
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            for number in range(24):
                with store.use(f"block {number}", write=True) as tensor:
                    tensor.add_(1)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        assert torch.cuda.max_memory_allocated() == before


class Hostile(CudaCopies):
    """Delays every copy at random, and fills extents with NaN before they are loaded and after they were given back."""

    def __init__(self, *arguments: object, seed: int = 0) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.random = random.Random(seed)
        self.delays = 0

    def _copy(self, order: Order, ram: torch.Tensor, skip: int) -> None:
        if order.action is Action.H2D:
            self._device.tensor[order.offset_gpu + skip : order.offset_gpu + skip + ram.numel()].fill_(255)
        if self.random.random() < 0.5:
            torch.cuda._sleep(self.random.choice((100_000, 1_000_000, 3_000_000)))
            self.delays += 1
        super()._copy(order, ram, skip)

    def _compact(self, order: Order, ordered: Report, done: Report) -> None:
        if order.tier is Tier.GPU:
            with torch.cuda.stream(self._h2d):
                torch.cuda._sleep(20_000_000)
        super()._compact(order, ordered, done)

    def poison(self, offset: int, nbytes: int) -> None:
        with torch.cuda.stream(self._h2d):
            self._wait_for_uses(self._h2d, offset, offset + nbytes, writes=False)
            self._device.tensor[offset : offset + nbytes].fill_(255)
            event = torch.cuda.Event(blocking=True)
            event.record(self._h2d)
        with self._lock:  # who fills the extent himself has to wait for this too
            self._note_use(offset, nbytes, self._h2d, event)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.opening.CudaCopies", Hostile)


def poison_what_leaves(store: TierStore) -> None:
    placement, copies = store.engine.placement, store.engine.copies
    assert isinstance(copies, Hostile)
    drop = placement.drop

    def drop_and_poison(record: Record, tier: Tier, event: Event = Event.DROP) -> None:
        offset = record.copy(tier).offset
        drop(record, tier, event)
        if tier is Tier.GPU:
            copies.poison(offset, record.nbytes)

    placement.drop = drop_and_poison  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("page_locked", [True, False])
def test_race_hunt(tmp_path: Path, hostile: None, policy: str, page_locked: bool, seed: int) -> None:
    with TierStore(gpu=5 * MIB, ram=14 * MIB, nvme=tmp_path / "swap", device="cuda", policy=policy, page_locked=page_locked) as store:
        copies = store.engine.copies
        assert isinstance(copies, Hostile)
        copies.random.seed(seed)
        reference = make_blocks(store, 20, seed)
        poison_what_leaves(store)
        side = torch.cuda.Stream()
        choose = random.Random(seed)
        for step in range(5):
            for name in reference:
                stream = choose.choice((torch.cuda.current_stream(), side))
                with torch.cuda.stream(stream):
                    if choose.random() < 0.3:
                        torch.cuda._sleep(1_000_000)
                    with store.use(name, write=True, timeout=60) as tensors:
                        update(tensors, step)
                update(reference[name], step)
            if choose.random() < 0.5:
                store.commit({"step": step}, wait=choose.random() < 0.5)
        torch.cuda.synchronize()
        assert copies.delays > 0
        assert_streamed(store)
        assert_equal(store, reference)


class Gradients:
    """Blocks that are written whole, used up, and have no content in between.

    Attributes:
        wrong: On the device: how many elements were not what had been written, each time.
    """

    def __init__(self, store: TierStore, sizes: list[int], choose: random.Random) -> None:
        self.store = store
        self.choose = choose
        self.values: dict[str, float | None] = {}
        self.wrong: list[torch.Tensor] = []
        for number, numel in enumerate(sizes):
            name = f"gradient {number}"
            block = lay_out(name, [(name, "F32", (numel,))], single=True)
            store._run(operations.declare(store.engine, block, threading.get_ident()))
            self.values[name] = None

    def lease(self, name: str, *, fresh: bool = False, spent: bool = False) -> Use:
        names = [name]
        return Use(self.store.engine, (name,), names, 60, fresh=names if fresh else (), spent=names if spent else ())

    def turn(self, number: int) -> None:
        """Write one of them whole, or use one up; now and then it is written back first."""
        name = self.choose.choice(sorted(self.values))
        value = self.values[name]
        if value is None or self.choose.random() < 0.2:
            with self.lease(name, fresh=True) as tensor:
                tensor.fill_(float(number))
            self.values[name] = float(number)
            return
        if self.choose.random() < 0.3:
            self.store.evict(name)
        with self.lease(name, spent=True) as tensor:
            self.wrong.append((tensor != value).sum())
        self.values[name] = None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["lru", "lookahead"])
def test_what_is_written_whole_waits_for_what_used_its_extent(tmp_path: Path, hostile: None, policy: str, seed: int) -> None:
    """Right behind evictions whose copies out are queued, moves, and copies in that nobody comes to use; on two streams, of many sizes."""
    with TierStore(gpu=5 * MIB, ram=16 * MIB, nvme=tmp_path / "swap", device="cuda", policy=policy) as store:
        copies = store.engine.copies
        assert isinstance(copies, Hostile)
        copies.random.seed(seed)
        choose = random.Random(seed)
        reference = make_blocks(store, 10, seed)
        gradients = Gradients(store, [ELEMENTS * size for size in (1, 1, 2, 3, 5, 8)], choose)
        poison_what_leaves(store)
        side = torch.cuda.Stream()
        for number in range(150):
            with torch.cuda.stream(choose.choice((torch.cuda.current_stream(), side))):
                if choose.random() < 0.3:
                    torch.cuda._sleep(1_000_000)
                draw = choose.random()
                if draw < 0.2:
                    store.prefetch(choose.choice(sorted(reference)))
                if draw < 0.4:
                    name = choose.choice(sorted(reference))
                    with store.use(name, write=True, timeout=60) as tensors:
                        update(tensors, number)
                        update(reference[name], number)  # inside, so that its next turn, on whichever stream, comes behind it
                else:
                    gradients.turn(number)
        torch.cuda.synchronize()
        assert copies.delays > 0
        assert sum(map(int, gradients.wrong)) == 0, "elements of gradients are not what was written"
        for name, value in gradients.values.items():
            if value is not None:
                kept = store.read(name)
                assert isinstance(kept, torch.Tensor)
                assert bool((kept == value).all()), f"{name} is not what was written"
        assert_equal(store, reference)


def test_mixed_sizes_move_together_on_the_device(hostile: None) -> None:
    """Held blocks of several sizes are moved, overlapping ranges and delayed copies included, and keep their bytes."""
    sizes = [7 * MIB, 14 * MIB, 3 * MIB, 4 * KIB, 20 * MIB, 11 * MIB]
    with TierStore(gpu=65 * MIB, ram=256 * MIB, device="cuda") as store:
        reference = {}
        for number, nbytes in enumerate(sizes):
            reference[f"held {number}"] = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
            store.put(f"held {number}", reference[f"held {number}"])
            store.put(f"gap {number}", torch.zeros(MIB, dtype=torch.uint8))
        store.put("large", torch.full((8 * MIB,), 9, dtype=torch.uint8))
        store.put("all", torch.full((63 * MIB,), 5, dtype=torch.uint8))
        for number in range(len(sizes)):
            store.hold(f"held {number}", "gpu")
            store.hold(f"gap {number}", "gpu")
            with store.use(f"held {number}", write=True) as tensor:  # dirty: what is moved has to be written back later
                tensor.add_(1)
            reference[f"held {number}"].add_(1)
        for number in range(len(sizes)):
            store.unhold(f"gap {number}")
        store.delete("gap 0")
        with store.use("large", timeout=60) as large:
            copy = large.clone()
        assert store.stats().compactions > 0
        for name in reference:
            store.unhold(name)
        with store.use("all", timeout=60) as everything:  # the copies out must wait for the moves, which are still under way
            assert bool((everything == 5).all())
        assert bool((copy == 9).all())
        for name, expected in reference.items():
            with store.use(name, timeout=60) as tensor:
                assert torch.equal(tensor.cpu(), expected)


def test_a_lease_on_another_stream_sees_what_the_first_wrote() -> None:
    with TierStore(gpu=8 * MIB, ram=16 * MIB, device="cuda") as store:
        store.put("block", torch.zeros(ELEMENTS))
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        for turn in range(1, 20):
            with torch.cuda.stream(first), store.use("block", write=True) as tensor:
                torch.cuda._sleep(2_000_000)
                tensor.fill_(turn)
            with torch.cuda.stream(second), store.use("block") as tensor:
                seen = tensor.clone()
            second.synchronize()
            assert bool((seen == turn).all())


def test_values_from_the_device_and_back() -> None:
    with TierStore(gpu=8 * MIB, ram=32 * MIB, device="cuda") as store:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            late = torch.full((ELEMENTS,), 3.0, device="cuda")
            store.put("in ram", late)
            store.put("on gpu", late, tier="gpu")
        assert store.info("on gpu").tiers == ("gpu",)
        for name in ("in ram", "on gpu"):
            assert bool((store.read(name) == 3).all())
        store.write("on gpu", torch.full((ELEMENTS,), 4.0))
        assert bool((store.read("on gpu") == 4).all())
        with store.use("in ram", write=True) as tensor:
            torch.cuda._sleep(20_000_000)
            tensor.add_(1)
        assert bool((store.read("in ram") == 4).all())


def test_several_threads_lease_on_their_own_streams(tmp_path: Path, hostile: None) -> None:
    num_threads, num_turns = 4, 30
    errors: list[BaseException] = []
    with TierStore(gpu=6 * MIB, ram=10 * MIB, nvme=tmp_path / "swap", device="cuda") as store:
        for number in range(12):
            store.put(f"block {number}", torch.zeros(4 * ELEMENTS))

        def work(seed: int) -> None:
            choose = random.Random(seed)
            try:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for _ in range(num_turns):
                        with store.use(f"block {choose.randrange(12)}", write=True, timeout=120) as tensor:
                            tensor.add_(1)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        total = 0.0
        for number in range(12):
            value = store.read(f"block {number}")
            assert isinstance(value, torch.Tensor)
            assert bool((value == value[0]).all())
            total += float(value[0])
        assert total == num_threads * num_turns
