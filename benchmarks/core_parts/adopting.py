"""Reading adopted models from a cold cache, beside a bare threaded read of the same files."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.core_parts.measure import MIB, Plan, Row
from tierstore import AsyncTierStore
from tierstore.catalog import PAGE
from tierstore.nvme.local import LocalFiles

THREADS = 4
"""As many as the store reads its own shards with, and as it has reads of model files with the drive; two more move bytes meanwhile."""


class Bare:
    """Reads whole files with `preadv` on threads, a slot at a time, past the page cache if the file system allows it.

    Into the very memory that the store reads into: how fast a virtual drive is depends on how that memory lies in the machine's.
    """

    def __init__(self, paths: list[Path], memory: memoryview, slot_bytes: int, *, direct: bool) -> None:
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._descriptors = [os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for path in paths]
        self._pool = ThreadPoolExecutor(THREADS)
        self._local = threading.local()
        self._threads = itertools.count()
        self._jobs = [
            (descriptor, offset)
            for descriptor, path in zip(self._descriptors, paths, strict=True)
            for offset in range(0, path.stat().st_size, slot_bytes)
        ]

    def seconds(self) -> float:
        start = time.perf_counter()
        list(self._pool.map(self._read, self._jobs))
        return time.perf_counter() - start

    def _read(self, job: tuple[int, int]) -> None:
        mine = self._local.__dict__
        if "buffer" not in mine:
            start = next(self._threads) * self._slot_bytes
            mine["buffer"] = self._memory[start : start + self._slot_bytes]
        descriptor, offset = job
        os.preadv(descriptor, [mine["buffer"]], offset)

    def close(self) -> None:
        self._pool.shutdown()
        for descriptor in self._descriptors:
            os.close(descriptor)


def ordered(plan: Plan) -> list[Row]:
    """Files as most programs write them: a layer's tensors lie together, and nothing is aligned."""
    return _measure(plan, "layers in one piece", scattered=False)


def scattered(plan: Plan) -> list[Row]:
    """Files sorted by the kind of tensor: each layer has a piece in each of nine places."""
    return _measure(plan, "layers in nine pieces", scattered=True)


def _measure(plan: Plan, what: str, *, scattered: bool) -> list[Row]:
    """In each turn a model is written anew: how fast a virtual drive is may depend on where the system has put a file, too."""
    rows: list[Row] = []
    for checksum in (True, False):
        seen = Seen()
        with plan.empty() as directory:
            for turn in range(plan.scaled(8, 2)):
                model = directory.with_name(f"model {turn}")
                paths = _write_model(plan, model, scattered=scattered)
                seen.direct = asyncio.run(_takes_direct_io(paths[0]))
                asyncio.run(_beside(plan, model, paths, checksum, seen, turn))
                shutil.rmtree(model)
        rows += seen.rows(f"{what}, checksums {'on' if checksum else 'off'}")
    return rows


@dataclass
class Seen:
    """What the turns of one row have given."""

    bare: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    shift_shares: list[float] = field(default_factory=list)
    model_bytes: int = 0
    read_bytes: int = 0
    requests: int = 0
    blocks: int = 0
    direct: bool = False

    def rows(self, what: str) -> Iterator[Row]:
        detail = {
            "bare_bytes_per_s": self.bare,
            "model_bytes": self.model_bytes,
            "blocks": self.blocks,
            "direct_io": self.direct,
            "requests": self.requests,
            "read_bytes": self.read_bytes,
            "shift_share_of_a_thread": self.shift_shares,
        }
        for which, rates in (("first read", self.first), ("read again", self.again)):
            ratios = [one / other for one, other in zip(rates, self.bare, strict=True)]
            yield Row(f"{what}, {which}", "x bare", ratios, ">= 0.9", {**detail, "store_bytes_per_s": rates})


async def _takes_direct_io(path: Path) -> bool:
    files = LocalFiles()
    try:
        return await files.direct_read_refusal(str(path)) is None
    finally:
        files.close()


def _write_model(plan: Plan, folder: Path, *, scattered: bool) -> list[Path]:
    """Two files of decoder layers in bf16, about 100 MB each."""
    width = plan.scaled(2048, 64)
    layers = plan.scaled(12, 4)
    shapes = {
        "input_norm": (width,),
        "q": (width, width),
        "k": (width, width // 4),
        "v": (width, width // 4),
        "o": (width, width),
        "norm": (width,),
        "gate": (width * 11 // 4, width),
        "up": (width * 11 // 4, width),
        "down": (width, width * 11 // 4),
    }
    folder.mkdir()
    placed: dict[str, str] = {}
    paths = []
    for part in range(2):
        path = folder / f"model-{part:05d}.safetensors"
        mine = range(part * layers // 2, (part + 1) * layers // 2)
        order = [(layer, kind) for kind in shapes for layer in mine] if scattered else [(layer, kind) for layer in mine for kind in shapes]
        header, end = {}, 0
        for layer, kind in order:
            nbytes = 2 * _product(shapes[kind])
            header[f"layers.{layer}.{kind}"] = {"dtype": "BF16", "shape": shapes[kind], "data_offsets": [end, end + nbytes]}
            end += nbytes
            placed[f"layers.{layer}.{kind}"] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for piece in _noise(end):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        paths.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return paths


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _noise(nbytes: int) -> Iterator[bytes]:
    block = os.urandom(MIB)
    for start in range(0, nbytes, MIB):
        yield block[: min(MIB, nbytes - start)]


def _forget(paths: list[Path]) -> None:
    """Have the page cache give up what it has of these."""
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


async def _beside(plan: Plan, model: Path, paths: list[Path], checksum: bool, seen: Seen, turn: int) -> None:
    total = sum(path.stat().st_size for path in paths)
    ram = total * 17 // 16 + max(160 * MIB, total // 8)
    async with AsyncTierStore(max(total // 4, 64 * PAGE), ram, device=plan.device, policy="lru", checksum=checksum) as store:
        names = await store.adopt(model)
        engine = store.engine
        bare = Bare(paths, engine.transfer.memory, engine.slots.nbytes, direct=seen.direct)

        async def fetch() -> float:
            _forget(paths)
            start = time.perf_counter()
            await asyncio.gather(*(store.hold(name, "ram") for name in names))
            seconds = time.perf_counter() - start
            for name in names:
                await store.unhold(name)
                await store.evict(name)
            return total / seconds

        alone = [_alone(bare, paths, total)] if turn % 2 == 0 else []
        seen.first.append(await fetch())
        alone.append(_alone(bare, paths, total))
        before = store.stats().models
        seen.again.append(await fetch())
        after = store.stats().models
        alone += [_alone(bare, paths, total)] if turn % 2 else []
        bare.close()
    seen.bare.append(sum(alone) / len(alone))
    seen.shift_shares.append((after.shift_ns - before.shift_ns) / 1e9 / (total / seen.again[-1]))
    seen.requests, seen.read_bytes = after.requests - before.requests, after.read_bytes - before.read_bytes
    seen.model_bytes, seen.blocks = total, len(names)


def _alone(bare: Bare, paths: list[Path], total: int) -> float:
    _forget(paths)
    return total / bare.seconds()
