"""What the tests of the NVMe tier share: both ways to move bytes, payloads, and a file system that fails to order."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tierstore.catalog import Block, lay_out
from tierstore.nvme.files import File, FileStat, Operation, Outcome, Request, aligned_buffer
from tierstore.nvme.local import LocalFiles

MIB = 1 << 20


class FailingFiles(LocalFiles):
    """The machine's files, except that the operations in `failing` raise, each as often as its number says.

    Keys are method names: of the file system (`replace`), or of a file (`file.sync`). `log` has every call in order. With
    `short`, reads and writes move at most that many bytes; with `interrupt`, every second one is interrupted first.
    """

    def __init__(self, *, portable: bool | None = None) -> None:
        super().__init__(portable=portable)
        self.failing: dict[str, tuple[int, int]] = {}
        self.log: list[str] = []
        self.short: int | None = None
        self.interrupt = False

    def fail(self, operation: str, code: int = errno.EIO, times: int = 1) -> None:
        self.failing[operation] = (code, times)

    def pass_by(self, operation: str, path: str) -> None:
        self.log.append(f"{operation} {os.path.basename(path)}")
        code, times = self.failing.get(operation, (0, 0))
        if times:
            self.failing[operation] = (code, times - 1)
            raise OSError(code, os.strerror(code))

    def file(self, path: str, *, write: bool = False) -> File:
        return FailingFile(self, super().file(path, write=write), path)

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        self.pass_by("save", path)
        await super().save(path, data, sync=sync)

    async def replace(self, source: str, target: str) -> None:
        self.pass_by("replace", target)
        await super().replace(source, target)

    async def unlink(self, path: str) -> None:
        self.pass_by("unlink", path)
        await super().unlink(path)

    async def sync_directory(self, path: str) -> None:
        self.pass_by("sync_directory", path)
        await super().sync_directory(path)


class FailingFile:
    def __init__(self, files: FailingFiles, file: File, path: str) -> None:
        self.keeps_handle = file.keeps_handle
        self._files = files
        self._file = file
        self._path = path
        self._calls = 0

    async def create(self, nbytes: int) -> None:
        self._files.pass_by("file.create", self._path)
        await self._file.create(nbytes)

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        return await self._move("file.read", self._file.read, requests)

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        return await self._move("file.write", self._file.write, requests)

    async def _move(self, operation: str, move: Operation, requests: Sequence[Request]) -> list[Outcome]:
        try:
            self._files.pass_by(operation, self._path)
        except OSError as error:
            return [error] * len(requests)
        self._calls += 1
        if self._files.interrupt and self._calls % 2:
            return [InterruptedError()] * len(requests)
        short = self._files.short
        if short is not None:
            requests = [Request(r.offset, r.buffer[:short], r.then if len(r.buffer) <= short else None) for r in requests]
        return await move(requests)

    async def stat(self) -> FileStat:
        return await self._file.stat()

    async def sync(self, nbytes: int = 0) -> None:
        self._files.pass_by("file.sync", self._path)
        await self._file.sync(nbytes)

    async def close(self) -> None:
        await self._file.close()
        self._files.pass_by("file.close", self._path)

    def forget(self) -> None:
        self._file.forget()


@pytest.fixture(params=["positional", "portable"])
def files(request: pytest.FixtureRequest) -> FailingFiles:
    return FailingFiles(portable=request.param == "portable")


@pytest.fixture
def swap(tmp_path: Path) -> str:
    """A path for a directory that is not there yet."""
    return str(tmp_path / "swap")


def make_block(name: str = "w", nbytes: int = 3 * 4096) -> Block:
    return lay_out(name, [(f"{name}.weight", "F32", (nbytes // 4 - 64,)), (f"{name}.bias", "F32", (5,))])


def random_payload(block: Block, seed: int = 0) -> memoryview:
    """Bytes for the tensors, zeros for the rest, at a page-aligned address."""
    rng = random.Random(seed)
    payload = aligned_buffer(block.nbytes)
    for spec in block.tensors:
        payload[spec.offset : spec.offset + spec.nbytes] = rng.randbytes(min(spec.nbytes, 4096)).ljust(spec.nbytes, b"\x5a")
    return payload


@pytest.fixture(scope="session")
def block_of() -> Callable[..., Block]:
    return make_block


@pytest.fixture(scope="session")
def payload_of() -> Callable[..., memoryview]:
    return random_payload
