"""`adopt`: blocks that lie in model files. What is read is what the file holds, bit for bit; the file is never written."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load_file, save_file

from tests.helpers import check_invariants
from tests.quiet import assert_quiet
from tierstore import AsyncTierStore, TierStore
from tierstore.catalog import ITEM_BYTES, PAIRED
from tierstore.cli import main
from tierstore.errors import (
    BlockExistsError,
    CapacityError,
    ModelFileError,
    OptionError,
    SizeError,
    TierstoreError,
    TransferError,
)
from tierstore.mover.budget import NUM_SLOTS, slot_bytes
from tierstore.nvme.local import LocalFiles
from tierstore.residency import Tier
from tierstore.tiers.device import DTYPES

Tensors = dict[str, torch.Tensor]
TWO_TIERS = pytest.mark.parametrize("tiers", ["two tiers", "three tiers"])


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(flat(one), flat(other))


def layers(count: int = 12, seed: int = 0) -> Tensors:
    """A model whose tensors lie at odd places, of sizes that no alignment fits. About 0.2 MB a layer."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {"embed.weight": torch.randn(501, 33, generator=generator)}
    for layer in range(count):
        found[f"layers.{layer}.up"] = torch.randn(301, 257, generator=generator).to(torch.bfloat16)
        found[f"layers.{layer}.down"] = torch.randn(111, 101, generator=generator)
        found[f"layers.{layer}.flag"] = torch.tensor([layer % 2 == 0, True, False])
    return found


class Watched:
    """A model on the drive, and what must stay of it."""

    def __init__(self, path: Path, tensors: Tensors, *, parts: int = 1) -> None:
        self.path = path
        self.tensors = tensors
        path.mkdir()
        names = sorted(tensors, key=lambda name: hashlib.md5(name.encode()).digest())  # scattered over the files
        shares = [names[part::parts] for part in range(parts)]
        self.files = [path / f"model-{part:05d}.safetensors" for part in range(parts)]
        for file, share in zip(self.files, shares, strict=True):
            save_file({name: tensors[name] for name in share}, file)
        placed = {name: file.name for file, share in zip(self.files, shares, strict=True) for name in share}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
        for file in self.files:
            os.utime(file, ns=(1_600_000_000_000_000_000, 1_600_000_000_000_000_000))
        self.state = self._look()

    def _look(self) -> list[tuple[str, int, str]]:
        return [(file.name, file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(self.path.iterdir())]

    def check_untouched(self) -> None:
        assert self._look() == self.state, "a model file was changed"

    def check(self, store: TierStore, changed: Tensors | None = None) -> None:
        """Every value, however it is asked for."""
        expected = {**self.tensors, **(changed or {})}
        for name in store:
            with store.use(name) as leased:
                for key, tensor in leased.items():
                    assert same(tensor, expected[key]), key
            found = store.read(name)
            assert isinstance(found, dict)
            assert all(same(tensor, expected[key]) for key, tensor in found.items())


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path / "model", layers(), parts=3)
    yield watched
    watched.check_untouched()


def open_store(tmp_path: Path, tiers: str = "three tiers", **options: Any) -> TierStore:
    """Room for two or three of some fourteen blocks on the device, and for four in RAM: far less than half the model."""
    nvme = tmp_path / "swap" if tiers == "three tiers" else None
    return TierStore(**{"gpu": "600KB", "ram": "1100KB", "nvme": nvme, "device": "cpu", **options})  # type: ignore[arg-type]


def ram_for(nbytes: int) -> int:
    """A budget of RAM that leaves at least so much for blocks beside transfer space."""
    return nbytes + NUM_SLOTS * slot_bytes(nbytes) + NUM_SLOTS * slot_bytes(NUM_SLOTS * slot_bytes(nbytes))


def assert_streamed(store: TierStore, model: Watched) -> None:
    stats = store.stats()
    total = sum(tensor.numel() * tensor.element_size() for tensor in model.tensors.values())
    assert stats.tiers["gpu"].capacity_bytes <= total / 2
    assert stats.tiers["ram"].capacity_bytes <= total / 2
    for tier in ("gpu", "ram"):
        assert stats.tiers[tier].peak_bytes <= stats.tiers[tier].capacity_bytes
        assert stats.tiers[tier].evictions > 5
    assert stats.links["nvme_read"].transfers > 5
    assert stats.models.requests > 5
    assert stats.models.shifted_bytes <= stats.models.read_bytes


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in ("tierstore.lock", "tierstore.pid"))


# -- reading ----------------------------------------------------------------------------------------------------------------


@TWO_TIERS
@pytest.mark.parametrize("direct_io", ["auto", False])
def test_all_is_as_the_files_have_it(tmp_path: Path, model: Watched, tiers: str, direct_io: bool | str) -> None:
    with open_store(tmp_path, tiers, direct_io=direct_io) as store:
        names = store.adopt(model.path)
        assert sorted(names) == sorted(store)
        assert names[-1] != "layers.9", "numbers sort as numbers"
        assert {name for name in names if name.startswith("layers.")} == {f"layers.{layer}" for layer in range(12)}
        for _ in range(2):
            model.check(store)
        assert_streamed(store, model)
        assert all(store.info(name).adopted and not store.info(name).dirty for name in names)
        stats = store.stats()
        assert stats.links["nvme_write"].bytes == 0
        assert (stats.models.shifted_bytes > 0) == (stats.models.shift_ns > 0) == (direct_io == "auto" and _takes_direct_io(model))
        check_invariants(store.engine)
        assert_quiet(store)
        if tiers == "three tiers":
            assert names_in(tmp_path / "swap") == []


def _takes_direct_io(model: Watched) -> bool:
    files = LocalFiles()
    try:
        return asyncio.run(files.direct_read_refusal(str(model.files[0]))) is None
    finally:
        files.close()


@TWO_TIERS
def test_requests_are_few(tmp_path: Path, tiers: str) -> None:
    """A block of many small tensors that lie together is one request, or as many as transfer space makes of it."""
    tensors = {f"layers.{layer}.{number:03d}": torch.randn(67, 3) for layer in range(4) for number in range(200)}
    model = Watched(tmp_path / "model", tensors)
    with open_store(tmp_path, tiers, ram="64MB") as store:
        store.adopt(model.path)
        for layer in range(4):
            store.hold(f"layers.{layer}", "ram")
        stats = store.stats().models
        if stats.shifted_bytes:
            assert stats.requests <= 8
            assert stats.shifted_bytes == 4 * 200 * 67 * 3 * 4
        model.check(store)
        model.check_untouched()


def test_every_dtype_of_the_format_in_one_file(tmp_path: Path) -> None:
    """Byte for byte, on the device, in RAM, from the drive, through the store's own shard and out again."""
    generator = random.Random(3)
    shapes: list[tuple[int, ...]] = [(3, 4), (), (0, 5), (7,), (129, 2)]
    tensors: Tensors = {}
    for dtype in ITEM_BYTES:
        for shape in shapes:
            if shape or dtype not in PAIRED:
                count = torch.Size(shape).numel() * ITEM_BYTES[dtype]
                values = torch.tensor([generator.randrange(2 if dtype == "BOOL" else 256) for _ in range(count)], dtype=torch.uint8)
                tensors[f"{dtype} {shape}"] = values.view(DTYPES[dtype]).reshape(shape)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        dtype = name.split()[0]
        stored = [*tensor.shape[:-1], 2 * tensor.shape[-1]] if dtype in PAIRED else list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": stored, "data_offsets": [end, end + flat(tensor).numel()]}
        end += flat(tensor).numel()
    text = json.dumps(header).encode()
    path = tmp_path / "all.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(flat(tensor).numpy().tobytes() for tensor in tensors.values()))
    loaded = load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items()), "this is the library's file too"
    whole, halves = "all", {name: f"half {index % 2}" for index, name in enumerate(tensors)}
    for layout in (lambda name: whole, halves.get):
        swap = tmp_path / f"swap {layout('F4 (3, 4)')}"
        with TierStore(gpu="64KiB", ram="512KiB", nvme=swap, device="cpu") as store:
            for name in store.adopt(path, layout=layout):
                with store.use(name) as leased:
                    assert all(same(leased[key], tensors[key]) for key in leased)
                store.evict(name)
                found = store.read(name)
                assert all(same(found[key], tensors[key]) for key in found)
                with store.use(name, write=True):  # from here on it is the store's
                    pass
                store.evict(name)
                assert not store.info(name).adopted
                found = store.read(name)
                assert all(same(found[key], tensors[key]) for key in found)
                store.write(name, {key: tensors[key] for key in found if key.endswith("(3, 4)")})
            store.commit()
        out = tmp_path / f"out {layout('F4 (3, 4)')}"
        result = CliRunner().invoke(main, ["export", str(swap), str(out)])
        assert result.exit_code == 0, result.output
        exported = load_file(out / "model-00001-of-00001.safetensors")
        assert all(same(exported[name], tensor) for name, tensor in tensors.items())


@TWO_TIERS
def test_threads_share_adopted_blocks(tmp_path: Path, model: Watched, tiers: str) -> None:
    failures: list[BaseException] = []
    with open_store(tmp_path, tiers) as store:
        names = store.adopt(model.path)

        def work(seed: int) -> None:
            generator = random.Random(seed)
            try:
                for _ in range(40):
                    name = generator.choice(names)
                    with store.use(name) as leased:
                        for key, tensor in leased.items():
                            assert same(tensor, model.tensors[key]), key
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert_streamed(store, model)
        assert store.engine.slots.peak_in_use <= store.engine.slots.num_slots
        assert_quiet(store)


def test_the_async_face(tmp_path: Path, model: Watched) -> None:
    async def scenario() -> None:
        async with AsyncTierStore(gpu="600KB", ram="1100KB", device="cpu") as store:
            await store.adopt(model.path, layout=lambda name: name.split(".")[0])

    with pytest.raises(SizeError):
        asyncio.run(scenario())

    async def smaller() -> None:
        async with AsyncTierStore(gpu="600KB", ram="1100KB", device="cpu") as store:
            names = await store.adopt(model.path)
            await store.prefetch(*names[:2])
            for name in names:
                async with store.use(name) as leased:
                    assert all(same(tensor, model.tensors[key]) for key, tensor in leased.items())

    asyncio.run(smaller())


def test_nothing_but_headers_is_read(tmp_path: Path) -> None:
    """A folder of 100 GB: sparse files, so that a payload could be read too, but slowly."""
    folder = tmp_path / "huge"
    folder.mkdir()
    placed: dict[str, str] = {}
    for number in range(20):
        name = f"model-{number:05d}.safetensors"
        header, end = {}, 0
        for layer in range(4):
            for part in range(8):
                tensor = f"layers.{4 * number + layer}.part{part}.weight"
                placed[tensor] = name
                header[tensor] = {"dtype": "BF16", "shape": [5000, 15700], "data_offsets": [end, end + 157_000_000]}
                end += 157_000_000
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    read: list[int] = []
    load = LocalFiles.load

    async def counted(self: LocalFiles, path: str, nbytes: int) -> bytes:
        data = await load(self, path, nbytes)
        read.append(len(data))
        return data

    with pytest.MonkeyPatch.context() as patch, TierStore(gpu="1GB", ram="1500MB", nvme=tmp_path / "swap", device="cpu") as store:
        with pytest.raises(SizeError, match=r"layers\.0"):  # of 1.3 GB each
            store.adopt(folder)
        assert not list(store)
        patch.setattr(LocalFiles, "load", counted)
        before, resident = store.stats(), _resident_bytes()
        names = store.adopt(folder, layout=lambda name: name.removesuffix(".weight"))
        assert len(names) == 640
        assert sum(store.info(name).nbytes for name in names) > 100 * 10**9
        assert sum(read) < 1_000_000
        assert store.stats().models.read_bytes == before.models.read_bytes == 0
        assert _resident_bytes() - resident < 8 << 20
        store.commit()
        (manifest,) = [name for name in names_in(tmp_path / "swap") if name != "CURRENT"]
        assert manifest.startswith("manifest-")
        assert (tmp_path / "swap" / manifest).stat().st_size < 1_000_000
        assert store.stats().tiers["nvme"].used_bytes < 1_100_000
        with store.use(names[5]) as leased:
            assert not leased["layers.0.part5.weight"].any()


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


# -- what is refused, whole -------------------------------------------------------------------------------------------------------


@TWO_TIERS
def test_all_or_none(tmp_path: Path, model: Watched, tiers: str) -> None:
    with open_store(tmp_path, tiers) as store:
        store.put("layers.7", torch.ones(3))

        def refused(kind: type[TierstoreError], *, layout: Any = "layers") -> Any:
            with pytest.raises(kind) as caught:
                store.adopt(model.path, layout=layout)
            assert list(store) == ["layers.7"]
            assert_quiet(store)
            return caught.value

        error = refused(BlockExistsError)
        assert error.block == "layers.7"
        assert error.path in map(str, model.files)
        assert error.tensor.startswith("layers.7.")
        error = refused(SizeError, layout=lambda name: "everything")
        assert error.block == "everything"
        assert error.tensor in model.tensors
        assert error.path in map(str, model.files)
        refused(OptionError, layout=lambda name: None)
        refused(OptionError, layout=3)
        refused(ModelFileError, layout=lambda name: f"optimizer/{name}")
        (model.path / "model.safetensors.index.json").unlink()
        model.files[1].rename(model.path / "gone")
        (model.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": model.files[1].name}}))
        assert refused(ModelFileError).tensor == "x"
        (model.path / "gone").rename(model.files[1])
        model.state = model._look()
        store.delete("layers.7")
        assert len(store.adopt(next(str(file) for file in model.files))) > 0
        with pytest.raises(BlockExistsError):
            store.adopt(model.files[0])


def test_a_block_that_is_too_large_for_ram_alone(tmp_path: Path, model: Watched) -> None:
    with open_store(tmp_path, gpu="8MB", ram="700KB") as store:
        with pytest.raises(SizeError) as caught:
            store.adopt(model.path, layout=lambda name: "everything")
        assert caught.value.tier == "ram"
        assert caught.value.remedy.startswith("raise ram=")


def test_no_write_begins_before_there_is_a_home_for_it(tmp_path: Path, model: Watched) -> None:
    """Without a directory: a block that is on the device, and not in RAM, gets an extent there before it is leased for writing."""
    with open_store(tmp_path, "two tiers", policy="lru") as store:
        names = store.adopt(model.path)
        for name in names[:6]:  # RAM has dropped the first of them by then, one by one
            with store.use(name):
                pass
            for other in names[7:11]:
                store.hold(other, "ram")
                store.unhold(other)
            with store.use(name, write=True) as leased:
                check_invariants(store.engine)
                assert not store.info(name).adopted
                for key, tensor in leased.items():
                    assert same(tensor, model.tensors[key]), key
            check_invariants(store.engine)
            store.delete(name)
        assert_quiet(store)


# -- the first write ---------------------------------------------------------------------------------------------------------


@TWO_TIERS
def test_the_first_write_makes_a_block_the_stores_own(tmp_path: Path, model: Watched, tiers: str) -> None:
    changed: Tensors = {}
    with open_store(tmp_path, tiers, policy="lru") as store:  # which brings nothing back by itself
        names = store.adopt(model.path)
        for round_ in range(2):
            for name in ("layers.3", "layers.4"):
                with store.use(name, write=True) as leased:
                    leased[f"{name}.down"].mul_(1.5)
                    changed[f"{name}.down"] = leased[f"{name}.down"].clone()
                assert not store.info(name).adopted
            value = torch.randn(111, 101)
            store.write("layers.5", {"layers.5.down": value})
            changed["layers.5.down"] = value
            assert not store.info("layers.5").adopted
            for name in names:
                store.evict(name)
            store.flush()  # what has left the device may still be on its way to RAM
            for name in names:
                expected = ("nvme",) if tiers == "three tiers" or store.info(name).adopted else ("ram",)
                assert store.info(name).tiers == expected, (round_, name)
            model.check(store, changed)
        assert sum(store.info(name).adopted for name in names) == len(names) - 3
        assert_streamed(store, model)
        check_invariants(store.engine)
        assert_quiet(store)


def test_a_write_to_a_part_of_a_block_that_nobody_has_read(tmp_path: Path, model: Watched) -> None:
    """The rest comes from the model file, through one piece of transfer space; several at once wait for one another and end."""
    value = torch.randn(111, 101)
    with open_store(tmp_path) as store:
        store.adopt(model.path)
        threads = [threading.Thread(target=store.write, args=(f"layers.{n}", {f"layers.{n}.down": value + n})) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert store.stats().links["nvme_read"].bytes == 0
        model.check(store, {f"layers.{n}.down": value + n for n in range(10)})
        assert_quiet(store)


def test_without_a_directory_what_is_written_needs_room_in_ram(tmp_path: Path, model: Watched) -> None:
    """It stays there; what is adopted passes through what is left; and where nothing is left, an error says so."""
    with open_store(tmp_path, "two tiers") as store:
        names = list(store.adopt(model.path))
        written = []
        with pytest.raises(CapacityError, match=r"ram="):
            for name in names:
                with store.use(name, write=True):
                    pass
                written.append(name)
        assert 2 <= len(written) < 6
        assert_quiet(store)
        for name in written:
            with store.use(name) as leased:
                assert all(same(tensor, model.tensors[key]) for key, tensor in leased.items())
        store.delete(written.pop())
        names = [name for name in store]  # noqa: C416
        for name in names:
            with store.use(name):
                pass
        model.check(store)
        assert_quiet(store)


@pytest.mark.parametrize("how", ["use", "write", "put", "declared by both"])
def test_what_is_written_leaves_room_for_what_is_read(tmp_path: Path, model: Watched, how: str) -> None:
    """Without a directory: what would take the last room in RAM is refused, not what passes through it."""
    with open_store(tmp_path, "two tiers") as store:
        names = list(store.adopt(model.path))
        written: Tensors = {}
        value = torch.arange(111 * 101, dtype=torch.float32).reshape(111, 101)
        with pytest.raises(CapacityError) as caught:
            for number, name in enumerate(names * 2):
                if how == "put" or (how == "declared by both" and number % 2):
                    store.put(f"mine {number}", torch.full((30_000,), number))
                elif f"{name}.down" not in store.info(name).tensors:
                    continue
                elif how == "write":
                    store.write(name, {f"{name}.down": value})
                    written[f"{name}.down"] = value
                else:
                    with store.use(name, write=True) as leased:
                        leased[f"{name}.down"].copy_(value)
                    written[f"{name}.down"] = value
        error = caught.value
        assert error.tier == "ram"
        assert "pass through" in str(error)
        assert error.need
        assert error.have
        assert "ram=" in str(error.remedy)
        assert "nvme=" in str(error.remedy)
        assert len(store) > len(names) or len(written) >= 2
        for name in [name for name in store if name.startswith("mine")]:
            found = store.read(name)
            assert isinstance(found, torch.Tensor)
            assert torch.equal(found, torch.full((30_000,), int(name.split()[1])))
        for round_ in range(2):
            for name in names:
                with store.use(name) as leased:
                    assert all(same(tensor, {**model.tensors, **written}[key]) for key, tensor in leased.items()), (round_, name)
                found = store.read(name)
                assert isinstance(found, dict)
                assert all(same(tensor, {**model.tensors, **written}[key]) for key, tensor in found.items())
        if store.info(names[-1]).adopted:
            for name in [name for name in store if not store.info(name).adopted]:
                store.delete(name)
            with store.use(names[-1], write=True):  # there is room again
                pass
        check_invariants(store.engine)
        assert_quiet(store)


def test_a_model_is_not_adopted_where_it_could_not_pass(tmp_path: Path, model: Watched) -> None:
    with open_store(tmp_path, "two tiers") as store:
        number = 0
        with pytest.raises(CapacityError):
            while True:
                store.put(f"mine {number}", torch.zeros(40_000))
                number += 1
        with pytest.raises(SizeError) as caught:
            store.adopt(model.path)
        assert caught.value.tier == "ram"
        assert len(store) == number
        store.delete("mine 0")
        store.delete("mine 1")
        names = store.adopt(model.path)
        for name in names:
            store.read(name)
            with store.use(name):
                pass


class Passing(RuleBasedStateMachine):
    """Two tiers, blocks of many sizes: whatever was done or refused, every block can be read and leased."""

    @initialize(sizes=st.lists(st.integers(1, 60), min_size=3, max_size=8), room=st.integers(60, 200))
    def begin(self, sizes: list[int], room: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name, "m.safetensors")
        self.expected: dict[str, torch.Tensor] = {f"b{index}": torch.full((size * 1024,), float(index)) for index, size in enumerate(sizes)}
        save_file({f"{name}.t": value for name, value in self.expected.items()}, path)
        largest = max(sizes)
        ram = 4096 * max(room, largest)
        self.store = TierStore(gpu=4096 * (largest + 8), ram=ram_for(ram), device="cpu")
        assert self.store.engine.placement.arenas[Tier.RAM].capacity_bytes >= 4096 * largest
        self.store.adopt(path)

    def _attempt(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except CapacityError as error:
            return not (error.need and error.have and error.remedy)  # a refusal is one that says why
        return True

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        value = torch.rand_like(self.expected[name])
        adopted = self.store.info(name).adopted
        if data.draw(st.booleans()):
            done = self._attempt(lambda: self.store.write(name, self._as_put(name, value)))
        else:

            def lease() -> None:
                with self.store.use(name, write=True) as leased:
                    (leased if isinstance(leased, torch.Tensor) else leased[f"{name}.t"]).copy_(value)

            done = self._attempt(lease)
        if done:
            self.expected[name] = value
        assert done or (adopted and not self._fits(name, self.store.info(name).nbytes)), "it would have fitted"
        assert self.store.info(name).adopted == (adopted and not done)

    def _as_put(self, name: str, value: torch.Tensor) -> Any:
        return value if name.startswith("own") else {f"{name}.t": value}

    @rule(size=st.integers(1, 40), number=st.integers(0, 5))
    def put(self, size: int, number: int) -> None:
        name, value = f"own{number}", torch.rand(size * 1024)
        if name in self.expected:
            return
        if self._attempt(lambda: self.store.put(name, value)):
            self.expected[name] = value
        else:
            assert not self._fits(name, value.nbytes), "it would have fitted"

    def _fits(self, name: str, nbytes: int) -> bool:
        """Whether a block may stay in RAM: the largest of those that may not has to pass through beside it."""
        others = [self.store.info(other) for other in self.expected if other != name]
        passing = [info.nbytes for info in others if info.adopted and info.hold != "ram"]
        staying = [info.nbytes for info in others if not info.adopted or info.hold == "ram"]
        capacity = self.store.engine.placement.arenas[Tier.RAM].capacity_bytes
        return sum(staying) + nbytes + max(passing, default=0) <= capacity

    @rule(data=st.data(), tier=st.sampled_from(["ram", "gpu", None]))
    def hold(self, data: st.DataObject, tier: str | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        if tier is None:
            self.store.unhold(name)
        elif self._attempt(lambda: self.store.hold(name, tier)):
            self.store.unhold(name) if tier == "gpu" else None  # else others may not come to the device

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if len(self.expected) > 1:
            name = data.draw(st.sampled_from(sorted(self.expected)))
            self.store.delete(name)
            del self.expected[name]

    @invariant()
    def all_is_there(self) -> None:
        if not hasattr(self, "store"):
            return
        for name, value in self.expected.items():
            for call in (self.store.read, lambda name: _leased(self.store, name)):
                found: Any = call(name)
                assert torch.equal(found if isinstance(found, torch.Tensor) else found[f"{name}.t"], value), name
        check_invariants(self.store.engine)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()


def _leased(store: TierStore, name: str) -> Any:
    with store.use(name) as tensors:
        return tensors.clone() if isinstance(tensors, torch.Tensor) else {key: tensor.clone() for key, tensor in tensors.items()}


TestPassing = Passing.TestCase
TestPassing.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


def test_a_put_takes_the_room_of_what_can_be_read_again(tmp_path: Path, model: Watched) -> None:
    with open_store(tmp_path, "two tiers") as store:
        names = store.adopt(model.path)
        for name in names[:6]:
            with store.use(name):
                pass
        store.put("mine", torch.arange(100_000, dtype=torch.float32))
        model_names = [name for name in store if name != "mine"]
        for name in model_names:
            with store.use(name) as leased:
                assert all(same(tensor, model.tensors[key]) for key, tensor in leased.items())
        assert torch.equal(store.read("mine"), torch.arange(100_000, dtype=torch.float32))  # type: ignore[arg-type]


@TWO_TIERS
def test_holds_and_deletes(tmp_path: Path, model: Watched, tiers: str) -> None:
    with open_store(tmp_path, tiers) as store:
        names = store.adopt(model.path)
        store.hold("layers.0", "gpu")
        store.hold("layers.1", "ram")
        for name in names:
            with store.use(name):
                pass
        assert "gpu" in store.info("layers.0").tiers
        assert "ram" in store.info("layers.1").tiers
        with store.use("layers.1", write=True) as leased:
            leased["layers.1.down"].zero_()
        model.check(store, {"layers.1.down": torch.zeros(111, 101)})
        store.unhold("layers.1")
        for name in names:
            store.unhold(name)
            store.delete(name)
        assert not list(store)
        assert store.adopt(model.path) == names
        model.check(store)
        assert_quiet(store)


# -- commits -----------------------------------------------------------------------------------------------------------------


def test_a_commit_remembers_what_was_adopted(tmp_path: Path, model: Watched) -> None:
    with open_store(tmp_path, keep=2) as store:
        names = store.adopt(model.path)
        store.commit({"step": 0})
        assert names_in(tmp_path / "swap") == ["CURRENT", "manifest-00000001.json"]
        with store.use("layers.2", write=True) as leased:
            leased["layers.2.down"].zero_()
        store.read("layers.1")
        store.commit({"step": 1})
    changed = {"layers.2.down": torch.zeros(111, 101)}
    manifest = json.loads((tmp_path / "swap" / "manifest-00000002.json").read_bytes())
    blocks = {block["name"]: block for block in manifest["blocks"]}
    assert manifest["format"] == 2
    assert blocks["layers.2"]["adopted"] is None
    assert blocks["layers.1"]["chunks"], "learned at its first read"
    assert blocks["layers.0"]["chunks"] is None
    for generation, expected in ((1, {}), (2, changed)):
        with open_store(tmp_path, keep=2, generation=generation) as store:
            assert store.committed is not None
            assert list(store) == list(names)
            assert store.info("layers.2").adopted == (generation == 1)
            model.check(store, expected)
            assert_streamed(store, model)
    with open_store(tmp_path, keep=2) as store, pytest.raises(BlockExistsError, match="a commit remembers"):
        store.adopt(model.path)


def test_a_store_without_adopted_blocks_is_of_the_first_format(tmp_path: Path, model: Watched) -> None:
    with open_store(tmp_path) as store:
        store.put("a", torch.ones(3))
        store.commit()
    assert json.loads((tmp_path / "swap" / "manifest-00000001.json").read_bytes())["format"] == 1
    with open_store(tmp_path) as store:
        store.adopt(model.path)
        store.commit()
        for name in list(store):
            store.delete(name)
        store.put("b", torch.ones(3))
        store.commit()
    assert json.loads((tmp_path / "swap" / "manifest-00000003.json").read_bytes())["format"] == 1


def test_nothing_is_lost_without_a_commit(tmp_path: Path, model: Watched, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        store.adopt(model.path)
        model.check(store)
    assert "only commit() keeps that" not in caplog.text
    with open_store(tmp_path) as store:
        assert not list(store)
        store.adopt(model.path)
        with store.use("layers.0", write=True):
            pass
    assert "with 1 block(s) changed" in caplog.text


# -- files that change ----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Path, bytes], None]] = {
    "gone": lambda path, data: path.unlink(),
    "longer": lambda path, data: path.write_bytes(data + b"x"),
    "cut": lambda path, data: path.write_bytes(data[:-1]),
    "touched": lambda path, data: os.utime(path),
    "replaced": lambda path, data: (path.with_name("new").write_bytes(data), os.replace(path.with_name("new"), path))[0] and None,
    "a directory": lambda path, data: (path.unlink(), path.mkdir())[0],
}
if hasattr(os, "mkfifo"):
    CHANGES["a pipe"] = lambda path, data: (path.unlink(), os.mkfifo(path))[0]
    CHANGES["a link"] = lambda path, data: (path.rename(path.with_name("other")), path.symlink_to(path.with_name("other")))[0] and None  # type: ignore[func-returns-value]


def put_back(path: Path, data: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    for other in ("other", "new"):
        path.with_name(other).unlink(missing_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(1_600_000_000_000_000_000, 1_600_000_000_000_000_000))


@TWO_TIERS
@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_while_the_store_is_open(tmp_path: Path, model: Watched, tiers: str, how: str) -> None:
    victim = model.files[1]
    data = victim.read_bytes()
    with open_store(tmp_path, tiers) as store:
        names = store.adopt(model.path)
        model.check(store)
        for name in names:
            store.evict(name)
        CHANGES[how](victim, data)
        refused = 0
        for name in names:
            for call in (lambda name=name: store.read(name), lambda name=name: store.use(name).__enter__()):  # type: ignore[misc]
                inside = [key for key in store.info(name).tensors if key in load_names(data)]
                if not inside:
                    continue
                assert_refused(call, victim, name)
                refused += 1
        assert refused >= 10
        put_back(victim, data)
        model.check(store)
        assert_quiet(store)


def assert_refused(call: Callable[[], object], victim: Path, block: str) -> None:
    """The error says which file and which block."""
    with pytest.raises(ModelFileError) as caught:
        call()
    assert caught.value.path == str(victim)
    assert str(victim) in str(caught.value)
    assert caught.value.block == block


def load_names(data: bytes) -> set[str]:
    (length,) = struct.unpack("<Q", data[:8])
    return set(json.loads(data[8 : 8 + length])) - {"__metadata__"}


@TWO_TIERS
def test_bits_that_change_behind_the_files_back(tmp_path: Path, model: Watched, tiers: str) -> None:
    """Length and time are as before; the checksums of the first read tell."""
    victim = model.files[0]
    data = victim.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    with open_store(tmp_path, tiers) as store:
        names = store.adopt(model.path)
        model.check(store)
        for name in names:
            store.evict(name)
        place = start + random.Random(1).randrange(len(data) - start)
        put_back(victim, data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        header = json.loads(data[8:start])
        (hit,) = [name for name, entry in header.items() if _holds(entry, place - start)]
        for name in names:
            damaged = hit in store.info(name).tensors
            for call in (lambda name=name: store.read(name), lambda name=name: store.use(name).__enter__().clear()):  # type: ignore[misc]
                if damaged:
                    with pytest.raises(ModelFileError, match="was read from it first") as caught:
                        call()
                    assert caught.value.path in map(str, model.files)
        put_back(victim, data)
        model.check(store)


def _holds(entry: dict[str, Any], place: int) -> bool:
    begin, end = entry.get("data_offsets", (0, 0))
    return bool(begin <= place < end)


SAME_CONTENT = ("touched", "replaced")


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("read_before", [True, False])
def test_a_file_that_has_changed_when_the_directory_is_opened(
    tmp_path: Path, model: Watched, how: str, read_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """All that lies elsewhere is there. What lies in a file of another length or header, or in none, is refused by its name."""
    victim = model.files[2]
    data = victim.read_bytes()
    with open_store(tmp_path) as store:
        names = store.adopt(model.path)
        store.put("adapter", torch.arange(7))
        with store.use("layers.2", write=True):  # from here on it is the store's
            pass
        if read_before:
            for name in names:
                store.read(name)
        store.commit()
    CHANGES[how](victim, data)
    caplog.clear()
    with open_store(tmp_path) as store:
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        if how not in SAME_CONTENT:
            assert [str(victim) in line for line in warnings] == [True]
        else:
            assert [str(victim) in line and "cannot be checked" in line for line in warnings] == [True] * (not read_before)
        assert torch.equal(store.read("adapter"), torch.arange(7))  # type: ignore[arg-type]
        refused = 0
        for name in names:
            inside = store.info(name).adopted and set(store.info(name).tensors) & load_names(data)
            for call in (lambda name=name: store.read(name), lambda name=name: leased(store, name)):  # type: ignore[misc]
                if inside and how not in SAME_CONTENT:
                    assert_refused(call, victim, name)
                    refused += 1
                else:
                    assert all(same(tensor, model.tensors[key]) for key, tensor in call().items())
        assert (refused >= 10) == (how not in SAME_CONTENT)
        assert_quiet(store)
        with store.use("adapter", write=True) as tensor:
            tensor.add_(1)
        store.commit()
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(tmp_path / "swap"), str(out), "--only", "adapter"])
    assert result.exit_code == 0, result.output
    put_back(victim, data)
    with open_store(tmp_path) as store:
        assert torch.equal(store.read("adapter"), torch.arange(7) + 1)  # type: ignore[arg-type]
        store.delete("adapter")
        model.check(store)


def leased(store: TierStore, name: str) -> Tensors:
    with store.use(name) as tensors:
        return {key: tensor.clone() for key, tensor in tensors.items()}


def test_another_header_of_the_same_length_is_told_at_opening(tmp_path: Path, model: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """Length and time are as before, and nothing was read before: the tensors are others all the same."""
    victim = model.files[1]
    data = victim.read_bytes()
    with open_store(tmp_path) as store:
        names = store.adopt(model.path)
        store.commit()
    put_back(victim, data.replace(b'"BF16"', b'"F16" '))
    assert victim.stat().st_size == len(data)
    with open_store(tmp_path) as store:
        assert "another header" in caplog.text
        hit = [name for name in names if set(store.info(name).tensors) & load_names(data)]
        for name in names:
            if name not in hit:
                store.read(name)
                continue
            for call in (lambda name=name: store.read(name), lambda name=name: leased(store, name)):  # type: ignore[misc]
                with pytest.raises(ModelFileError, match="another header") as caught:
                    call()
                assert (caught.value.path, caught.value.block) == (str(victim), name)
        put_back(victim, data)
        model.check(store)


def test_a_drive_that_is_there_again_serves_without_opening_anew(tmp_path: Path, model: Watched) -> None:
    with open_store(tmp_path) as store:
        names = store.adopt(model.path)
        store.commit()
    model.path.rename(tmp_path / "away")
    with open_store(tmp_path) as store:
        for name in names:
            with pytest.raises(ModelFileError, match="is gone"):
                store.read(name)
        (tmp_path / "away").rename(model.path)
        model.check(store)
        assert_streamed(store, model)


def test_what_was_touched_is_committed_as_it_is_now(tmp_path: Path, model: Watched, caplog: pytest.LogCaptureFixture) -> None:
    data = model.files[0].read_bytes()
    with open_store(tmp_path) as store:
        store.adopt(model.path)
        model.check(store)
        store.commit()
    os.utime(model.files[0])
    with open_store(tmp_path) as store:
        store.commit()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    manifest = json.loads((tmp_path / "swap" / "manifest-00000002.json").read_bytes())
    times = {path: time for block in manifest["blocks"] for path, _, time, *_ in block["adopted"]["files"]}
    assert times[str(model.files[0])] == model.files[0].stat().st_mtime_ns
    put_back(model.files[0], data)


@pytest.mark.parametrize("how", CHANGES)
def test_a_commit_says_that_a_model_file_has_changed(tmp_path: Path, model: Watched, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and it stands: what is the store's own is in it."""
    victim = model.files[1]
    data = victim.read_bytes()
    with open_store(tmp_path, keep=2) as store:
        store.adopt(model.path)
        store.put("adapter", torch.arange(7))
        store.commit()
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        CHANGES[how](victim, data)
        assert store.commit() == 2
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert str(victim) in warning
        assert "generation 2" in warning
        store.commit()
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    with open_store(tmp_path) as store:
        assert torch.equal(store.read("adapter"), torch.arange(7))  # type: ignore[arg-type]
    put_back(victim, data)


def test_a_file_that_comes_back_with_the_store_open_and_was_never_read(
    tmp_path: Path, model: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can know whether its bytes are the same: that is said, once."""
    victim = model.files[0]
    data = victim.read_bytes()
    with open_store(tmp_path) as store:
        store.adopt(model.path)
        store.commit()
    victim.unlink()
    with open_store(tmp_path) as store:
        assert any(_refuses(lambda name=name: store.read(name)) for name in store)  # type: ignore[misc]
        victim.write_bytes(data)
        caplog.clear()
        model.check(store)
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert str(victim) in warning
        assert "have no checksums" in warning
    put_back(victim, data)


def test_bits_that_changed_between_two_openings(tmp_path: Path, model: Watched) -> None:
    victim = model.files[0]
    data = victim.read_bytes()
    with open_store(tmp_path) as store:
        store.adopt(model.path)
        model.check(store)
        store.commit()
    put_back(victim, data[:-1] + bytes([data[-1] ^ 1]))
    with open_store(tmp_path) as store:
        hit = [name for name in store if _refuses(lambda name=name: store.read(name))]  # type: ignore[misc]
        assert len(hit) == 1
        assert _refuses(lambda: store.use(hit[0]).__enter__())
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "swap"), "--json"])
    assert result.exit_code == 1
    (damaged,) = json.loads(result.stdout)["generations"][0]["damaged"]
    assert damaged["block"] == hit[0]
    put_back(victim, data)


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ModelFileError:
        return True
    return False


@TWO_TIERS
@pytest.mark.native_files
def test_a_file_that_cannot_be_read(tmp_path: Path, model: Watched, tiers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the drive is one of the drive; afterwards the same call succeeds."""
    with open_store(tmp_path, tiers) as store:
        names = store.adopt(model.path)
        preadv = os.preadv

        def failing(descriptor: int, buffers: Any, offset: int) -> int:
            raise OSError(5, "the drive is broken")

        with monkeypatch.context() as patch:
            patch.setattr("tierstore.nvme.local._PREADV", failing)
            for call in (lambda: store.read(names[3]), lambda: store.use(names[3]).__enter__(), lambda: store.hold(names[3], "ram")):
                with pytest.raises(TransferError, match="the drive is broken") as caught:
                    call()
                assert caught.value.block == names[3]
        store.unhold(names[3])

        def interrupted(descriptor: int, buffers: Any, offset: int) -> int:
            kind = random.random()
            if kind < 0.2:
                raise InterruptedError
            (buffer,) = buffers
            short = max(4096, len(buffer) // 2 // 4096 * 4096)
            return (
                preadv(descriptor, [buffer[:short]], offset) if kind < 0.5 and len(buffer) > short else preadv(descriptor, buffers, offset)
            )

        with monkeypatch.context() as patch:
            patch.setattr("tierstore.nvme.local._PREADV", interrupted)
            model.check(store)
        assert_quiet(store)


@TWO_TIERS
@pytest.mark.native_files
@pytest.mark.parametrize("call", ["read", "use"])
def test_a_file_that_is_written_while_it_is_read(
    tmp_path: Path, model: Watched, tiers: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first read, when there is no checksum yet: what may be half of each state is not served, nor remembered."""
    data = {path: path.read_bytes() for path in model.files}
    preadv = os.preadv

    def racing(descriptor: int, buffers: Any, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        for path in model.files:
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        return count

    with open_store(tmp_path, tiers) as store:
        names = store.adopt(model.path)
        with monkeypatch.context() as patch:
            patch.setattr("tierstore.nvme.local._PREADV", racing)
            with pytest.raises(ModelFileError, match="written to since"):
                store.read(names[2]) if call == "read" else store.use(names[2]).__enter__()
        for path, content in data.items():
            put_back(path, content)
        model.check(store)
        assert_quiet(store)


# -- tools ---------------------------------------------------------------------------------------------------------------------


def test_the_tools_know_adopted_blocks(tmp_path: Path, model: Watched) -> None:
    swap, out = str(tmp_path / "swap"), tmp_path / "out"
    with open_store(tmp_path) as store:
        names = store.adopt(model.path)
        with store.use("layers.2", write=True) as leased:
            leased["layers.2.down"].zero_()
        store.read("layers.1")
        store.commit()
    changed = {**model.tensors, "layers.2.down": torch.zeros(111, 101)}

    def run(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if "--json" in arguments else result.output

    (generation,) = run("inspect", swap, "--json")["generations"]
    for block in generation["blocks"]:
        own = block["name"] == "layers.2"
        assert (block["adopted"] is None) == own
        assert (block["file"] is None) != own
        assert block["problem"] is None
        assert own or set(block["adopted"]) <= set(map(str, model.files))
    text = run("inspect", swap, "--tensors")
    assert "adopted" in text
    report = run("verify", swap, "--json")
    assert report["good"]
    assert set(report["generations"][0]["unchecked"]) == set(names) - {"layers.1", "layers.2"}
    assert report["payload_bytes_read"] == report["generations"][0]["payload_bytes"]
    for options in ([], ["--link", "--force"]):
        run("export", swap, str(out), *options)
        exported: Tensors = {}
        for path in out.glob("*.safetensors"):
            exported.update(load_file(path))
        assert exported.keys() == changed.keys()
        assert all(same(exported[name], tensor) for name, tensor in changed.items())
    with TierStore(gpu="600KB", ram="1100KB", device="cpu") as store:  # an export is a model again
        store.adopt(out)
        for name in store:
            with store.use(name) as leased:
                assert all(same(tensor, changed[key]) for key, tensor in leased.items())
    data = model.files[0].read_bytes()
    os.utime(model.files[0])
    report = run("verify", swap, "--json")
    assert report["good"]
    assert any(str(model.files[0]) in note for note in report["notes"])
    assert "damaged" not in run("inspect", swap)
    model.files[0].write_bytes(data + b"x")
    report = run("verify", swap, "--json", code=1)
    damaged = report["generations"][0]["damaged"]
    assert any(str(model.files[0]) in one["file"] + "".join(one["problems"]) for one in damaged)
    assert {key for one in damaged for key in one["tensors"]} >= load_names(data) - {"layers.2.up", "layers.2.down", "layers.2.flag"}
    assert "damaged" in run("inspect", swap)
    assert str(model.files[0]) in run("export", swap, str(tmp_path / "no"), code=1)
    assert not (tmp_path / "no").exists()
    run("export", swap, str(tmp_path / "no"), "--only", "layers.2")
    put_back(model.files[0], data)
