"""A directory somebody prepared: it is refused in bounded time and memory, and nothing outside it is touched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner, Result

from tests.durability.processes import Child
from tests.durability.watched import Canaries, changes, only_inside
from tests.quiet import tensor_of
from tierstore import TierStore
from tierstore.cli import main
from tierstore.errors import DirectoryError, OptionError, ShardError, SizeError
from tierstore.export.layout import INDEX
from tierstore.nvme import manifest as manifest_module
from tierstore.nvme import names
from tierstore.nvme.checksums import checksum
from tierstore.nvme.directory import Directory
from tierstore.nvme.manifest import MAX_MANIFEST_BYTES, decode_manifest, encode_manifest, encode_metadata
from tierstore.nvme.safetensors import MAX_HEADER_BYTES, MAX_VALUES, parse_header

if sys.platform != "win32":
    import resource

pytestmark = pytest.mark.timeout(60)  # what hangs has opened a pipe

GPU, RAM = 1 << 18, 1 << 20
MEMORY = 1 << 30
"""Bytes that refusing anything may take. Measured: 0.55 GiB for 8 million values, the most that are parsed."""


STORE = "0123456789abcdef"
"""Which one it is."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "swap"
    with patch("secrets.token_hex", lambda nbytes: STORE), TierStore(GPU, RAM, path, device="cpu", keep=2) as store:
        store.put("a", torch.arange(2000.0))
        store.put("b", torch.arange(2000.0))
        for step in range(2):
            with store.use("a", write=True) as a:
                a.add_(1)
            store.commit(step)
    return path


@pytest.fixture
def swap(pristine: Path, tmp_path: Path) -> Path:
    """A directory with generations 1 and 2."""
    shutil.copytree(pristine, tmp_path / "swap")
    return tmp_path / "swap"


@pytest.fixture
def canaries(tmp_path: Path) -> Iterator[Canaries]:
    canaries = Canaries(tmp_path / "outside")
    yield canaries
    canaries.check()


def open_store(path: Path, **options: Any) -> TierStore:
    return TierStore(GPU, RAM, path, device="cpu", **options)


def use_fully(path: Path) -> int:
    """Open, read, write and commit twice."""
    with open_store(path) as store:
        assert tensor_of(store, "b")[7] == 7
        for _ in range(2):
            with store.use("a", write=True) as a:
                a.add_(1)
            generation = store.commit("on")
        return generation


def snapshot(path: Path) -> dict[str, tuple[int, int]]:
    return {
        file.name: (file.lstat().st_size, file.lstat().st_ino) for file in path.iterdir() if file.name not in (names.LOCK, names.HOLDER)
    }


# -- manifests with a valid checksum --------------------------------------------------------------------------------------


FRAME_BYTES = len(',"checksum":"0123456789abcdef"}\n')


def sign(body: bytes) -> bytes:
    """Make a manifest of anything: what stands before its checksum, without the brace that ends it."""
    return body + f',"checksum":"{checksum(body):016x}"}}\n'.encode()


def manifest_with(**fields: str) -> bytes:
    """A manifest whose fields are these JSON texts, hostile or not."""
    texts = {"format": "1", "store": f'"{STORE}"', "generation": "2", "next_shard": "9", "metadata": "null", "blocks": "[]"} | fields
    return sign(("{" + ",".join(f'"{key}":{text}' for key, text in texts.items())).encode())


def block_with(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "name": "a",
        "payload_bytes": 8192,
        "single": True,
        "frozen": False,
        "adopted": None,
        "tensors": [["a", "F32", [2000], 0]],
        "file": "block-a-00000003.safetensors",
        "file_bytes": 12288,
        "data_start": 4096,
        "chunks": ["0" * 16],
        "digest": "0" * 16,
    }
    return manifest_with(blocks=json.dumps([fields | changes]))


NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
DEEP = 100_000
WIDE = 60_000_000 if NIGHTLY else 40_000_000

HOSTILE: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: manifest_with(metadata="[" * DEEP + "]" * DEEP),
    "deep objects": lambda: manifest_with(metadata='{"a":' * DEEP + "1" + "}" * DEEP),
    "deep blocks": lambda: manifest_with(blocks="[" * DEEP + "]" * DEEP),
    "never closed": lambda: sign(b'{"format":1,"metadata":' + b"[" * DEEP),
    "a number of many digits": lambda: manifest_with(metadata="1" * 1_000_000),
    "an infinite number": lambda: manifest_with(metadata="1e999"),
    "NaN": lambda: manifest_with(metadata="NaN"),
    "a key twice": lambda: manifest_with(metadata='{"a":1,"a":2}'),
    "format twice": lambda: sign(b'{"format":1,"format":1,' + manifest_with().partition(b'"format":1,')[2][:-FRAME_BYTES]),
    "another store's": lambda: manifest_with(store='"fedcba9876543210"'),
    "of no store": lambda: manifest_with(store="null"),
    "many lists": lambda: manifest_with(metadata="[" + ",".join(["[]"] * (WIDE // 3)) + "]"),
    "many objects": lambda: manifest_with(blocks="[" + ",".join(["{}"] * (WIDE // 3)) + "]"),
    "many small numbers": lambda: manifest_with(blocks="[" + "0," * (MAX_VALUES - 40) + "0]"),
    "as many objects as are parsed": lambda: manifest_with(metadata="0", blocks="[" + '{"":1},' * (MAX_VALUES // 3 - 40) + "0]"),
    "as many texts as are parsed": lambda: block_with(chunks=["0123456789abcdef"] * (MAX_VALUES // 2)),
    "a name of 40 MB": lambda: block_with(name="a" * WIDE, payload_bytes=1),
    "a dtype of 40 MB": lambda: block_with(tensors=[["a", "F" * WIDE, [1], 0]]),
    "not UTF-8": lambda: sign(b'{"format":1,"metadata":"\xff\xfe"'),
    "UTF-16": lambda: sign('{"format":1'.encode("utf-16")),
    "zeros": lambda: sign(bytes(100_000)),
    "nothing": lambda: sign(b""),
    "a list": lambda: sign(b"[1"),
    "generation beyond names": lambda: manifest_with(generation=str(10**16)),
    "next_shard beyond names": lambda: manifest_with(next_shard=str(10**16 + 1)),
    "next_shard of 400 digits": lambda: manifest_with(next_shard="9" * 400),
    "generation as a fraction": lambda: manifest_with(generation="2.0"),
    "generation negative": lambda: manifest_with(generation="-2"),
    "format negative": lambda: manifest_with(format="-1"),
    "a shape that overflows": lambda: block_with(tensors=[["a", "F64", [2**61] * 64, 0]]),
    "a shape of 10,000 dimensions": lambda: block_with(tensors=[["a", "U8", [1] * 10_000, 0]]),
    "an offset that overflows": lambda: block_with(tensors=[["a", "U8", [1], 2**62]]),
    "an offset below zero": lambda: block_with(tensors=[["a", "U8", [1], -256]]),
    "tensors that overlap": lambda: block_with(tensors=[["a", "U8", [300], 0], ["b", "U8", [1], 256]]),
    "a payload that overflows": lambda: block_with(payload_bytes=2**62 - 4096, file_bytes=2**62),
    "a header that fills memory": lambda: block_with(data_start=2**40, file_bytes=2**40 + 8192),
    **{
        f"a file named {name!r}": lambda name=name: block_with(file=name)  # type: ignore[misc]
        for name in (
            *("../x", "/etc/passwd", "..", ".", "", "a/b", "block-a-00000001.safetensors/../../x", "..\\x", "C:\\x", "\\\\?\\C:\\x"),
            *("nul", "con.safetensors", "block-a-00000001.safetensors\0", "block-a-00000001.safetensors ", "BLOCK-A-00000001.safetensors"),
            *(
                "block-a-00000001.safetensors\n",
                "block-a-1.safetensors",
                "block-a-000000001.safetensors",
                "block-a-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.safetensors",
            ),
            *("block-a:x-00000001.safetensors", "tierstore.lock", "manifest-00000001.json", "block-" + "a" * 300 + "-00000001.safetensors"),
        )
    },
}
"""Refused, though the checksum is right."""

LARGE = {case for case in HOSTILE if case.startswith(("many", "as many", "a name of", "a dtype of"))}
QUICK = HOSTILE.keys() - (set() if NIGHTLY else LARGE - {"many small numbers"})
"""The others take seconds, and `test_memory_is_bounded` has them."""


@pytest.mark.parametrize("case", sorted(QUICK))
def test_a_manifest_with_a_valid_checksum(case: str, swap: Path, canaries: Canaries, caplog: pytest.LogCaptureFixture) -> None:
    manifest = swap / names.manifest_name(2)
    manifest.write_bytes(HOSTILE[case]())
    before = snapshot(swap)
    with only_inside(swap):
        with pytest.raises(ShardError) as caught:
            Directory.open(swap, generation=2)
        assert snapshot(swap) == before
        assert len(str(caught.value)) < 2000
        with open_store(swap) as store:  # as with any other damage, the generation before it is there
            assert store.committed is not None
            assert store.committed.generation == 1
            assert tensor_of(store, "a")[3] == 4
    assert snapshot(swap) == before


def test_a_manifest_that_claims_more_than_there_is(swap: Path) -> None:
    (swap / names.manifest_name(2)).write_bytes(block_with(payload_bytes=2**50, file_bytes=2**50 + 4096, chunks=None))
    before = snapshot(swap)
    with pytest.raises(ShardError, match="12288 bytes instead of"):
        Directory.open(swap)
    assert snapshot(swap) == before
    with open_store(swap, generation=1, keep=2) as store:  # nor does it count as so large a generation that is kept
        assert store.stats().tiers["nvme"].used_bytes < 1 << 20
        assert tensor_of(store, "a")[3] == 4


def with_little_memory(work: Callable[[], object]) -> None:
    """In a child that may not take more than `MEMORY` beyond what it has."""

    def limited(say: Any) -> None:
        with open("/proc/self/statm") as mapped:
            have = int(mapped.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, resource.RLIM_INFINITY))
        work()

    assert Child(limited).wait() == 0


needs_limits = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no way to limit memory here")


@needs_limits
@pytest.mark.parametrize("case", sorted({case for case in HOSTILE if case.startswith("deep")} | LARGE))
def test_memory_is_bounded(case: str) -> None:
    data = HOSTILE[case]()

    def work() -> None:
        with pytest.raises(ShardError):
            decode_manifest(data)

    with_little_memory(work)


@needs_limits
def test_a_manifest_is_refused_by_its_length_before_it_is_read(swap: Path) -> None:
    os.truncate(swap / names.manifest_name(2), 1 << 40)  # sparse

    def work() -> None:
        with pytest.raises(ShardError, match="too long"):
            Directory.open(swap, generation=2)

    with_little_memory(work)


@needs_limits
@pytest.mark.parametrize("item", [b"[]", b'{"":1}', b'""', b"1"])
def test_headers_of_shards(item: bytes) -> None:
    """As long as the format allows, and full of values."""
    count = (MAX_HEADER_BYTES - 100) // (len(item) + 1)
    text = b'{"a":[' + item + (b"," + item) * count + b"]}"

    def work() -> None:
        with pytest.raises(ShardError):
            parse_header(len(text).to_bytes(8, "little") + text, len(text) + 8)

    with_little_memory(work)


def test_what_is_written_can_be_read() -> None:
    """Limits on what is read are limits on what is written, too."""
    deepest: Any = 1
    for _ in range(100):
        deepest = [deepest]
    assert decode_manifest(encode_manifest(STORE, 1, 1, encode_metadata(deepest), [])).metadata == deepest
    with pytest.raises(OptionError, match="JSON"):
        encode_metadata([deepest])
    with pytest.raises(SizeError, match="manifest"):
        encode_manifest(STORE, 1, 1, "[" + "0," * MAX_VALUES + "0]", [])
    with pytest.raises(SizeError, match="manifest"):
        encode_manifest(STORE, 1, 1, '"' + "a" * MAX_MANIFEST_BYTES + '"', [])


def test_metadata_that_is_too_much_leaves_the_last_commit(swap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "MAX_VALUES", 1000)
    with open_store(swap) as store:
        with pytest.raises(SizeError, match="less metadata"):
            store.commit([0] * 1000)
        assert store.commit("small") == 3
    assert use_fully(swap) == 5


# -- numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    ["9999999999999999", "1e400", "-1", "9" * 120, "true"],
)
def test_current_uses_up_no_numbers(number: str, swap: Path) -> None:
    (swap / "CURRENT").write_bytes(sign(f'{{"generation":{number},"store":"{STORE}"'.encode()))
    assert use_fully(swap) == 4


def test_a_manifest_with_the_last_number(swap: Path) -> None:
    last = swap / names.manifest_name(names.MAX_NUMBER)
    last.write_bytes(b"rubbish")
    with open_store(swap) as store:
        with pytest.raises(DirectoryError, match="last number"):
            store.commit()
        assert tensor_of(store, "b")[7] == 7
    last.unlink()
    assert use_fully(swap) == 4


def test_a_shard_with_the_last_number(swap: Path) -> None:
    (swap / names.shard_name("x", names.MAX_NUMBER)).write_bytes(b"rubbish")  # claimed by nobody, so it is removed
    with open_store(swap) as store:
        with store.use("a", write=True) as a:
            a.add_(1)
        with pytest.raises(DirectoryError, match="last number"):
            store.commit()
        assert tensor_of(store, "a")[3] == 6
    assert use_fully(swap) == 4


def test_a_manifest_that_leaves_no_numbers(swap: Path) -> None:
    manifest = swap / names.manifest_name(2)
    body = manifest.read_bytes().rpartition(b',"checksum":')[0]
    fields = json.loads(body + b"}") | {"next_shard": names.MAX_NUMBER + 1}
    manifest.write_bytes(sign(json.dumps(fields).encode()[:-1]))
    with open_store(swap) as store:
        assert tensor_of(store, "a")[3] == 5
        with store.use("a", write=True) as a:
            a.add_(1)
        with pytest.raises(DirectoryError, match="last number"):
            store.commit()


@pytest.mark.parametrize("name", ["manifest-000000001.json", "block-a-000000001.safetensors", "manifest-00000000000000001.json"])
def test_a_number_written_otherwise_is_foreign(name: str, swap: Path) -> None:
    shutil.copy(swap / names.manifest_name(1), swap / name)
    with pytest.raises(DirectoryError, match="not the store's"):
        Directory.open(swap)


# -- what is no file ------------------------------------------------------------------------------------------------------

UNDER = [
    *(names.LOCK, names.HOLDER, names.CURRENT, names.CURRENT + ".tmp", names.PROBE_NAME),
    *("manifest-00000001.json", "manifest-00000002.json", "manifest-00000003.json", "manifest-00000003.json.tmp"),
    *("block-a-00000001.safetensors", "block-a-00000003.safetensors", "block-a-00000004.safetensors"),
]


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # zeros without end
    except PermissionError:
        pytest.skip("devices may not be made here")


ODD: dict[str, Callable[[Path, Canaries], object]] = {
    "a link to a file": lambda path, canaries: path.symlink_to(canaries.file),
    "a link to a directory": lambda path, canaries: path.symlink_to(canaries.root / "folder"),
    "a link to nothing outside": lambda path, canaries: path.symlink_to(canaries.root / "folder" / "new"),
    "a link to itself": lambda path, canaries: path.symlink_to(path),
    "a pipe": lambda path, canaries: os.mkfifo(path),
    "a socket": lambda path, canaries: make_socket(path),
    "a device": lambda path, canaries: make_device(path),
    "a directory": lambda path, canaries: path.mkdir(),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_file_is_refused_before_it_is_opened(kind: str, swap: Path, canaries: Canaries) -> None:
    for name in UNDER:
        path = swap / name
        old = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        ODD[kind](path, canaries)
        before = snapshot(swap)
        with only_inside(swap), pytest.raises(DirectoryError, match=name) as caught:
            Directory.open(swap)
        assert caught.value.remedy
        assert snapshot(swap) == before
        path.rmdir() if kind == "a directory" else path.unlink()
        if old is not None:
            path.write_bytes(old)
    assert use_fully(swap) == 4


LOOKING = ("verify", "inspect", "export")


def look_with(command: str, swap: Path, out: Path) -> Result:
    where = [str(out), "--force"] if command == "export" else []
    return CliRunner().invoke(main, [command, str(swap), *where], env={"COLUMNS": "200"})


def untouched(path: Path) -> dict[str, tuple[int, ...]]:
    looks = {file.name: file.lstat() for file in path.iterdir()}
    return {name: (look.st_mode, look.st_size, look.st_ino, look.st_mtime_ns) for name, look in looks.items()}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
@pytest.mark.parametrize("kind", [*ODD, "a link to a pipe"])
def test_what_is_no_plain_file_is_told_by_who_only_looks(kind: str, swap: Path, tmp_path: Path, canaries: Canaries) -> None:
    """And not opened: a pipe is waited for."""
    os.mkfifo(tmp_path / "pipe")
    make = ODD.get(kind, lambda path, canaries: path.symlink_to(tmp_path / "pipe"))
    for name in UNDER:
        path = swap / name
        old = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        make(path, canaries)
        before = untouched(swap)
        for command in LOOKING:
            result = look_with(command, swap, tmp_path / "out")
            newest = names.manifest_generation(name) in (2, 3)
            said = f"generation {names.manifest_generation(name)} of" if command == "export" and newest else name
            assert said in result.output, command
            assert isinstance(result.exception, SystemExit | None)
            needed = newest or name in (names.LOCK, "block-a-00000003.safetensors")
            if command == "export":
                assert (result.exit_code == 0) == (not needed)
            elif command == "verify" and name != names.LOCK:
                assert "no store opens the directory" in " ".join(result.output.split())
            assert untouched(swap) == before
        path.rmdir() if kind == "a directory" else path.unlink()
        if old is not None:
            path.write_bytes(old)
    assert use_fully(swap) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_file_where_an_export_is_written(kind: str, swap: Path, tmp_path: Path, canaries: Canaries) -> None:
    """It is replaced, not written to."""
    for name in (INDEX, INDEX + ".tmp", "model-00001-of-00001.safetensors", "model-00001-of-00001.safetensors.tmp", "model.safetensors"):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        ODD[kind](out / name, canaries)
        result = look_with("export", swap, out)
        assert isinstance(result.exception, SystemExit | None)
        if kind == "a directory":  # it cannot be removed as a file: left, or left aside and told
            assert (result.exit_code == 0) == (not name.endswith(".tmp"))
            assert name in result.output
            continue
        assert result.exit_code == 0
        assert sorted(os.listdir(out)) == ["model-00001-of-00001.safetensors", INDEX]
        assert all(stat.S_ISREG(file.lstat().st_mode) for file in out.iterdir())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such files")
def test_a_pipe_under_the_process_id_of_a_store_that_is_open(swap: Path) -> None:
    with open_store(swap):
        (swap / names.HOLDER).unlink()
        os.mkfifo(swap / names.HOLDER)
        with pytest.raises(DirectoryError, match=names.HOLDER):
            Directory.open(swap)
        (swap / names.HOLDER).unlink()


@pytest.mark.parametrize("name", UNDER)
def test_another_name_of_a_file_outside(name: str, swap: Path, canaries: Canaries) -> None:
    """A hard link cannot be told by its looks: so nothing is ever written to a file that the store did not make itself."""
    (swap / name).unlink(missing_ok=True)
    os.link(canaries.file, swap / name)
    with only_inside(swap):
        try:
            use_fully(swap)
        except ShardError:
            assert name.startswith(("block-", "manifest-"))
    canaries.check()


def test_the_watch_sees_what_a_store_does(swap: Path) -> None:
    with changes() as watch:
        use_fully(swap)
    assert {os.path.basename(path) for path in watch} >= {names.LOCK, names.HOLDER, "CURRENT.tmp", "CURRENT", "manifest-00000003.json.tmp"}
    assert any("block-a-" in path for path in watch)


@pytest.mark.parametrize("where", ["the directory", "its parent"])
def test_the_directory_behind_a_link(where: str, swap: Path, tmp_path: Path) -> None:
    """That is the user's own choice, and followed once."""
    (tmp_path / "way").symlink_to(swap if where == "the directory" else tmp_path)
    assert use_fully(tmp_path / "way" if where == "the directory" else tmp_path / "way" / "swap") == 4


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no rights of that kind here")
@pytest.mark.parametrize("name", ["manifest-00000002.json", "block-a-00000003.safetensors", names.LOCK, names.HOLDER])
def test_files_that_may_not_be_read(name: str, pristine: Path) -> None:
    with tempfile.TemporaryDirectory() as outer:
        swap = Path(outer) / "swap"
        shutil.copytree(pristine, swap)
        (swap / names.HOLDER).touch()
        (swap / name).chmod(0)

        def work(say: Any) -> None:
            if os.geteuid() == 0:
                os.seteuid(65534)
            if name == names.HOLDER:  # it is replaced, never read
                assert use_fully(swap) == 4
                return
            with pytest.raises((DirectoryError, OSError), match=r"[Pp]ermission denied"), open_store(swap) as store:
                tensor_of(store, "a")

        if os.geteuid() == 0:
            for path in (Path(outer), swap, *swap.iterdir()):
                os.chown(path, 65534, 65534)
        assert Child(work).wait() == 0
