"""`verify` and `inspect`: what they find and say, and that they change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.nvme.common import kept
from tierstore import TierStore
from tierstore.cli import main
from tierstore.errors import BusyError, ShardError, TransferError
from tierstore.nvme import reading
from tierstore.nvme.checksums import CHUNK_BYTES, checksum
from tierstore.nvme.contents import Contents, inspect
from tierstore.nvme.files import File, FileStat, Lock, Outcome, Request
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.locks import describe_holder
from tierstore.nvme.verify import Report, verify
from tierstore.threads import StalledError

ROOT = Path(__file__).parents[2]
BUDGETS: dict[str, Any] = {"gpu": "40MB", "ram": "80MB", "device": "cpu"}
MIB = 1 << 20


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def run(work: Callable[[Any], Coroutine[Any, Any, Any]], files: LocalFiles | None = None) -> Any:
    files = files if files is not None else LocalFiles()
    try:
        return asyncio.run(work(files))
    finally:
        files.close()


def verified(path: Path, files: LocalFiles | None = None, **options: Any) -> Report:
    report: Report = run(lambda files: verify(files, str(path), **options), files)
    return report


def inspected(path: Path, **options: Any) -> Contents:
    contents: Contents = run(lambda files: inspect(files, str(path), **options))
    return contents


def everything(path: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.lstat().st_mtime_ns) for file in path.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations. `big` has three chunks: `a` in the first, `b` in all three, `c` and `d` in the last; 2 differs from 1 in `small`."""
    path = tmp_path_factory.mktemp("looking") / "store"
    with TierStore(nvme=path, keep=2, **BUDGETS) as store:
        store.put("big", {"a": torch.arange(300), "b": torch.arange(9 * MIB).int(), "c": torch.arange(5.0), "d": torch.ones(3).bool()})
        store.put("small", {"x": torch.arange(64.0), "none": torch.empty(0), "y": torch.tensor(7)})
        store.put("optimizer/small", torch.zeros(5), frozen=True)
        store.commit({"step": 1})
        store.write("small", {"x": torch.arange(64.0) + 1, "none": torch.empty(0), "y": torch.tensor(8)})
        store.commit({"step": 2})
    return path


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def shard(directory: Path, block: str) -> Path:
    manifest = json.loads((directory / "manifest-00000002.json").read_text())
    return directory / next(entry["file"] for entry in manifest["blocks"] if entry["name"] == block)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


# -- verify: what is whole, and what is not --------------------------------------------------------------------------------


def test_a_whole_directory(directory: Path) -> None:
    result = command("verify", directory)
    assert result.exit_code == 0, result.output
    assert "Generation 1: good (3 blocks, " in result.output
    assert "Generation 2: good (3 blocks, " in result.output
    assert result.output.endswith("Everything is as it was written.\n")
    report = verified(directory)
    assert report.num_shards == 4, "what both generations share is read once"
    assert report.read_bytes == sum(path.stat().st_size - 4096 for path in directory.glob("block-*"))
    assert [generation.generation for generation in verified(directory, generation=1).generations] == [1]


@pytest.mark.parametrize("portable", [False, True])
def test_each_damaged_byte_harms_the_tensors_of_its_chunk(directory: Path, portable: bool) -> None:
    path = shard(directory, "big")
    manifest = json.loads((directory / "manifest-00000002.json").read_text())
    entry = next(entry for entry in manifest["blocks"] if entry["name"] == "big")
    nbytes = {"a": 2400, "b": 36 * MIB, "c": 20, "d": 3}
    offsets = {name: offset for name, _, _, offset in entry["tensors"]}
    rng = random.Random(portable)
    places = [0, CHUNK_BYTES - 1, CHUNK_BYTES, entry["payload_bytes"] - 1, *(rng.randrange(entry["payload_bytes"]) for _ in range(4))]
    for place in places:
        flip(path, entry["data_start"] + place)
        report = verified(directory, LocalFiles(portable=portable))
        chunk = place // CHUNK_BYTES
        harmed = [
            name for name, offset in offsets.items() if offset < (chunk + 1) * CHUNK_BYTES and offset + nbytes[name] > chunk * CHUNK_BYTES
        ]
        for generation in report.generations:
            (damage,) = generation.damaged
            assert (damage.block, damage.file, damage.tensors) == ("big", path.name, harmed)
            assert len(damage.problems) == 1
            assert damage.problems[0].startswith(f"chunk {chunk} (bytes {entry['data_start'] + chunk * CHUNK_BYTES} to ")
        assert not report.good
        flip(path, entry["data_start"] + place)
    assert verified(directory).good


def test_what_the_command_says_of_damage(directory: Path) -> None:
    flip(shard(directory, "small"), 4096)
    result = command("verify", directory)
    assert result.exit_code == 1
    assert "Generation 1: good" in result.output
    assert "Generation 2: DAMAGED in 1 of 3 blocks" in result.output
    assert f"block 'small' in {shard(directory, 'small').name}" in result.output
    assert "all its 3 tensors are bad" not in result.output, "the empty one cannot be"
    says = " ".join(result.output.split())
    assert "the damage lies within 4.10 kB that hold bytes of 2 tensors, any of which may be bad: x, y" in says
    assert result.output.endswith("Damaged; generation 1 is whole: open it with generation=1.\n")
    assert command("verify", directory, "--generation", 1).exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_damaged_header_harms_all(directory: Path) -> None:
    path = shard(directory, "small")
    for at in (0, 20, 4095):  # its length, its text, its padding
        flip(path, at)
        (damage,) = verified(directory).generations[1].damaged
        assert damage.tensors == ["x", "none", "y"]
        assert damage.whole
        assert damage.problems == ["has a header that does not match its checksum"]
        flip(path, at)
    assert verified(directory).good


def test_padding_harms_no_tensor(directory: Path) -> None:
    """But a reader of the file would not know, and a store refuses the chunk."""
    with TierStore(nvme=directory, keep=2, **BUDGETS) as store:
        store.put("gap", {"first": torch.ones(1), "last": torch.empty(0)})
        store.commit()
    (path,) = directory.glob("block-gap-*")
    flip(path, 4096 + 300)
    damage = verified(directory).generations[-1].damaged[0]
    assert damage.tensors == ["first"], "one chunk has one sum"


@pytest.mark.parametrize(
    ("length", "tensors"),
    [
        (100, ["a", "b", "c", "d"]),
        (4096, ["a", "b", "c", "d"]),
        (4096 + CHUNK_BYTES - 1, ["a", "b", "c", "d"]),
        (4096 + CHUNK_BYTES, ["b", "c", "d"]),
        (4096 + 2 * CHUNK_BYTES + 7, ["b", "c", "d"]),
    ],
)
def test_short_files(directory: Path, length: int, tensors: list[str]) -> None:
    path = shard(directory, "big")
    nbytes = path.stat().st_size
    os.truncate(path, length)
    report = verified(directory)
    (damage,) = report.generations[0].damaged
    assert damage.tensors == tensors
    assert damage.problems == [f"has {length:,} bytes instead of {nbytes:,}"]
    assert report.read_bytes < 3 * CHUNK_BYTES


def test_missing_longer_and_linked_files(directory: Path, tmp_path: Path) -> None:
    big, small, optimizer = (shard(directory, name) for name in ("big", "small", "optimizer/small"))
    small.unlink()
    big.write_bytes(big.read_bytes() + b"\0")
    shutil.move(optimizer, tmp_path / "elsewhere")
    optimizer.symlink_to(tmp_path / "elsewhere")
    damaged = {damage.block: damage for damage in verified(directory).generations[1].damaged}
    assert damaged["small"].problems == ["is missing"]
    assert damaged["small"].whole
    assert damaged["big"].tensors == [], "all that belongs there is there, but a store refuses the file"
    assert damaged["optimizer/small"].problems == ["is not a plain file"]


def test_damaged_manifests(directory: Path) -> None:
    flip(directory / "manifest-00000002.json", 30)
    result = command("verify", directory)
    assert result.exit_code == 1
    assert "Generation 2: DAMAGED: the manifest does not match its checksum" in result.output
    assert "Generation 1: good" in result.output
    assert "no generation needs" not in result.output, "which shards are the damaged manifest's cannot be told"
    assert verified(directory).whole == [1]
    (directory / "manifest-00000002.json").unlink()
    assert verified(directory).problems == ["generation 2 was committed, and its manifest is missing"]
    (directory / "CURRENT").write_text("rubbish")
    assert verified(directory).problems == ["CURRENT is damaged; it is only a hint, and the next commit writes it anew"]


def sentences(result: Result) -> str:
    """Without the breaks of lines, which must be where a terminal has them."""
    assert max(map(len, result.output.splitlines())) <= 80
    return " ".join(result.output.split())


def what_is_left_after_opening(directory: Path) -> set[str]:
    with contextlib.suppress(ShardError):
        TierStore(nvme=directory, keep=2, **BUDGETS).close()
    return {path.name for path in directory.glob("block-*")}


def test_the_verdict_says_what_opening_does(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a damaged newest manifest, of one that is missing, and of a damaged CURRENT: plain opening works, and is tried here."""
    newest, current = directory / "manifest-00000002.json", directory / "CURRENT"
    whole = newest.read_bytes(), current.read_bytes()
    (own,) = {path.name for path in directory.glob("block-small-*")} - {
        entry["file"] for entry in json.loads((directory / "manifest-00000001.json").read_text())["blocks"]
    }
    goes_on = "Damaged; generation {} is whole, and a store that is opened goes on from it with a warning. Its next commit "
    gone = "deletes the shard that may belong to "
    cases: list[tuple[Callable[[], Any], int, str]] = [
        (lambda: flip(newest, 30), 1, f"removes the damaged manifest of generation 2, and {gone}it."),
        (newest.unlink, 1, f"{gone}generation 2, whose manifest is missing."),
        (lambda: current.write_bytes(b""), 2, "writes CURRENT anew."),
    ]
    for damage, opens, then in cases:
        damage()
        result = command("verify", directory)
        assert result.exit_code == 1
        assert sentences(result).endswith(goes_on.format(opens) + then)
        caplog.clear()
        before = {path.name for path in directory.glob("block-*")}
        with TierStore(nvme=directory, keep=2, **BUDGETS) as store:
            assert (store.committed.generation, bool(caplog.records)) == (opens, True)
        assert {path.name for path in directory.glob("block-*")} == before
        newest.write_bytes(whole[0])
        current.write_bytes(whole[1])
        assert verified(directory).good
    flip(newest, 30)
    with TierStore(nvme=directory, keep=2, **BUDGETS) as store:
        store.commit()
    assert not newest.exists(), "as it was said"
    assert not (directory / own).exists()


def test_shards_of_a_generation_whose_manifest_is_missing(directory: Path) -> None:
    """They are told from left-overs by the rule of who opens: nobody is to take those for rubbish that a restored manifest needs."""
    newest = directory / "manifest-00000002.json"
    manifest, shards = newest.read_bytes(), {path.name for path in directory.glob("block-*")}
    missing = "DAMAGED: generation 2 was committed, and its manifest is missing"
    newest.unlink()
    for command_ in ("verify", "inspect"):
        assert missing in sentences(command(command_, directory))
    contents = inspected(directory)
    assert (contents.leftovers, len(contents.orphans), contents.disk["unclear"].files) == ([], 1, 1)
    assert "may belong to generation 2, whose manifest is missing" in command("inspect", directory).output
    assert "1 shard (8.19 kB) that may belong to generation 2, whose manifest is missing: kept until the next commit" in sentences(
        command("verify", directory)
    )
    (directory / "manifest-00000001.json").unlink()
    says = sentences(command("verify", directory))
    assert "4 shards (37.8 MB) that may belong to generation 2, whose manifest is missing: kept as no store opens the directory" in says
    assert says.endswith("Damaged; there is no generation left, and no store opens the directory.")
    shown = command("inspect", directory)
    assert missing in shown.output
    assert "There is no generation." in shown.output
    assert "left over" not in shown.output
    refused = command("export", directory, directory.parent / "out")
    assert (refused.exit_code, "its manifest is missing" in refused.output) == (1, True)
    assert what_is_left_after_opening(directory) == shards
    newest.write_bytes(manifest)
    assert what_is_left_after_opening(directory) == {name for name in shards if name in manifest.decode()}
    assert verified(directory).good


@pytest.mark.parametrize("damage", ["nothing", "manifest", "missing", "CURRENT", "all", "disagreement", "another store"])
def test_left_overs_are_what_opening_deletes(directory: Path, tmp_path: Path, damage: str) -> None:
    with TierStore(nvme=tmp_path / "other", **BUDGETS) as store:
        store.put("w", torch.ones(3))
        store.commit()
        store.commit()
    (directory / "block-left-00000099.safetensors").write_bytes(b"half")
    newest, oldest = directory / "manifest-00000002.json", directory / "manifest-00000001.json"
    if damage == "manifest":
        flip(newest, 30)
    elif damage == "missing":
        newest.unlink()
    elif damage == "CURRENT":
        flip(directory / "CURRENT", 3)
    elif damage == "all":
        for path in (newest, oldest, directory / "CURRENT"):
            path.unlink()
    elif damage == "disagreement":
        disagree(oldest)
    elif damage == "another store":
        shutil.copy(tmp_path / "other" / newest.name, newest)
    leftovers, orphans = inspected(directory).leftovers, inspected(directory).orphans
    before = {path.name for path in directory.glob("block-*")}
    assert ("block-left-00000099.safetensors" in leftovers) == (damage in ("nothing", "all"))
    assert before - what_is_left_after_opening(directory) == set(leftovers)
    assert not set(leftovers) & set(orphans)


def test_shards_and_no_manifest(directory: Path) -> None:
    for path in (*directory.glob("manifest-*"), directory / "CURRENT"):
        path.unlink()
    result = command("verify", directory)
    assert result.exit_code == 0
    says = sentences(result)
    assert "4 shards (37.8 MB) that no manifest names: opening the directory as a store deletes them" in says
    assert says.count("block-") == 0, "they are told once"
    assert what_is_left_after_opening(directory) == set()


def test_what_operating_systems_put_everywhere_is_passed_over(directory: Path, tmp_path: Path) -> None:
    """At opening and looking, and where one only looked for a store."""
    whole = inspected(directory).to_json()["disk"]["total"]
    for name in (".DS_Store", "Desktop.ini", "Thumbs.db"):
        (directory / name).write_text("the system's")
    getattr(os, "mkfifo", os.mkdir)(directory / "System Volume Information")  # opening it would never return
    (directory / "lost+found").mkdir(mode=0)
    os.symlink(tmp_path / "nowhere", directory / "$RECYCLE.BIN")
    here = {path.name for path in directory.iterdir()}
    for arguments in (["verify", directory], ["inspect", directory], ["export", directory, tmp_path / "out"]):
        result = command(*arguments)
        assert result.exit_code == 0
        assert not re.search(r"DS_Store|desktop|lost|foreign|not the store", result.output, re.IGNORECASE)
    assert inspected(directory).to_json()["disk"]["total"] == whole
    with TierStore(nvme=directory, keep=2, **BUDGETS) as store:
        store.commit()
    assert here - {path.name for path in directory.iterdir()} <= {
        "manifest-00000001.json",
        *(p for p in here if p.startswith("block-small")),
    }
    (tmp_path / "root" / "lost+found").mkdir(parents=True)
    TierStore(nvme=tmp_path / "root", **BUDGETS).close()
    (directory / "mine.txt").write_text("not the system's")
    result = command("verify", directory)
    assert result.exit_code == 0
    last = "Everything is as it was written, but no store opens the directory until mine.txt is moved away."
    assert sentences(result).endswith(last)
    assert json.loads(command("verify", directory, "--json").stdout)["foreign"] == ["mine.txt"]
    assert "no store opens the directory until mine.txt is moved away" in sentences(command("inspect", directory))


def test_what_cannot_be_listed_does_not_hide_the_advice(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory.parent / "locked").mkdir()
    listed = LocalFiles.listdir

    async def refusing(self: LocalFiles, path: str) -> list[str]:
        if path.endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return await listed(self, path)

    monkeypatch.setattr(LocalFiles, "listdir", refusing)
    assert f"did you mean {directory}?" in command("verify", directory.parent).output


def test_which_store_it_is(directory: Path, tmp_path: Path) -> None:
    store = json.loads((directory / "CURRENT").read_text())["store"]
    assert json.loads(command("inspect", directory, "--json").stdout)["store"] == store
    assert json.loads(command("verify", directory, "--json").stdout)["store"] == store
    assert f"store {store}" in command("inspect", directory).output
    assert f"Store {store}" in command("verify", directory).output
    with TierStore(nvme=tmp_path / "new", **BUDGETS):
        assert json.loads(command("inspect", tmp_path / "new", "--json").stdout)["store"] is None


def test_files_of_another_store(directory: Path, tmp_path: Path) -> None:
    """They are told as a store would tell them; what it would not open is not exported, either."""
    with TierStore(nvme=tmp_path / "other", keep=2, **BUDGETS) as store:
        store.put("w", torch.ones(3))
        for step in range(2):
            store.commit(step)
    own, foreign = (json.loads((path / "CURRENT").read_text())["store"] for path in (directory, tmp_path / "other"))
    current, newest = (directory / "CURRENT").read_bytes(), (directory / "manifest-00000002.json").read_bytes()
    shutil.copy(tmp_path / "other" / "manifest-00000002.json", directory)
    report = verified(directory)
    assert (report.store, report.whole, report.problems) == (own, [1], [])
    assert re.search(f"belongs to another store.*{own}.*{foreign}", report.generations[1].problem or "")
    assert "no generation needs" not in "".join(report.notes)
    contents = inspected(directory)
    assert contents.current is not None
    assert (contents.store, contents.current.generation, contents.leftovers) == (own, 1, [])
    assert "belongs to another store" in (contents.generations[1].problem or "")
    refused = command("export", directory, tmp_path / "out")
    assert refused.exit_code != 0
    assert "belongs to another store" in " ".join(refused.output.split())
    for damage in ((directory / "CURRENT").unlink, lambda: mix(directory, newest, tmp_path / "other")):
        damage()
        report = verified(directory)
        assert (report.good, report.store, report.whole) == (False, None, [])
        assert any("different stores" in problem and own in problem and foreign in problem for problem in report.problems)
        contents = inspected(directory)
        assert (contents.store, contents.current) == (None, None)
        assert all(own in problem or foreign in problem for row in contents.generations for problem in [row.problem or ""])
        assert "different stores" in " ".join(command("inspect", directory).output.split())
        for options in ([], ["--generation", 1]):
            refused = command("export", directory, tmp_path / "out", *options)
            assert refused.exit_code != 0
            assert "different stores" in " ".join(refused.output.split())
    (directory / "CURRENT").write_bytes(current)
    assert verified(directory).good
    assert not (tmp_path / "out").exists()


def mix(directory: Path, newest: bytes, other: Path) -> None:
    """All manifests are one store's, and `CURRENT` another's."""
    (directory / "manifest-00000002.json").write_bytes(newest)
    shutil.copy(other / "CURRENT", directory)


def test_two_generations_that_disagree(directory: Path) -> None:
    disagree(directory / "manifest-00000001.json")
    report = verified(directory)
    assert not report.good
    assert "disagree about block-optimizer-small-" in report.problems[0]


def disagree(path: Path) -> None:
    body = path.read_bytes()[:-32].replace(b'"name":"optimizer/small"', b'"name":"optimizer/other"')
    path.write_bytes(body + f',"checksum":"{checksum(body):016x}"}}\n'.encode())


def test_without_checksums(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with TierStore(nvme=path, checksum=False, **BUDGETS) as store:
        store.put("w", torch.zeros(2000))
        store.commit()
    flip(next(path.glob("block-w-*")), 5000)
    result = command("verify", path)
    assert result.exit_code == 0
    assert "not checked: 1 block without checksums (w): written with checksum=False" in " ".join(result.output.split())
    flip(next(path.glob("block-w-*")), 40)
    assert command("verify", path).exit_code == 1, "the header has a checksum all the same"


# -- reading itself --------------------------------------------------------------------------------------------------------


class Watched(LocalFiles):
    """Counts bytes in flight, and fails or hangs reads of some file."""

    def __init__(self, fail: str = "", error: Exception | None = None) -> None:
        super().__init__()
        self.flying = self.most = 0
        self.largest = 0
        self.fail, self.error = fail, error

    def file(self, path: str, *, write: bool = False) -> File:
        assert not write
        file: Any = super().file(path)
        read = file.read

        async def watched(requests: Sequence[Request]) -> list[Outcome]:
            nbytes = sum(len(request.buffer) for request in requests)
            self.flying += nbytes
            self.most, self.largest = max(self.most, self.flying), max(self.largest, nbytes)
            await asyncio.sleep(0.005)  # so that all that may fly together does
            self.flying -= nbytes
            if self.fail and self.fail in path and nbytes > 4096 and self.error is not None:
                return [self.error for _ in requests]
            outcomes: list[Outcome] = await read(requests)
            return outcomes

        file.read = watched
        return file


def test_large_requests_several_in_flight_in_bounded_memory(directory: Path) -> None:
    files = Watched()
    told: list[int] = []
    assert verified(directory, files, begin=lambda total: told.append(-total) or told.append).good
    assert files.largest == CHUNK_BYTES
    assert 2 * CHUNK_BYTES < files.most <= reading.IN_FLIGHT * CHUNK_BYTES
    assert sum(told) == 0


def test_an_unreadable_chunk_is_damage(directory: Path) -> None:
    report = verified(directory, Watched("block-big", OSError(errno.EIO, "Input/output error")))
    (damage,) = report.generations[0].damaged
    assert len(damage.problems) == 3
    assert damage.problems[0].endswith("cannot be read (Input/output error)")
    assert report.whole == []


def test_a_drive_that_does_not_answer_ends_it(directory: Path) -> None:
    with pytest.raises(TransferError, match="reading block 'big' failed"):
        verified(directory, Watched("block-big", StalledError(60.0)))


# -- nothing is changed ----------------------------------------------------------------------------------------------------


def test_nothing_is_changed_whatever_is_found(directory: Path, tmp_path: Path) -> None:
    flip(shard(directory, "small"), 5000)
    (directory / "block-left-00000099.safetensors").write_bytes(b"half")
    (directory / "manifest-00000003.json.tmp").write_bytes(b"{")
    (directory / "tierstore.pid").write_text("2147483646\n")
    (directory / "mine.txt").write_text("foreign")
    before = everything(directory)
    for arguments in (["verify"], ["inspect", "--tensors"], ["export", str(tmp_path / "out")]):
        result = command(arguments[0], directory, *arguments[1:])
        assert result.exit_code == (0 if arguments[0] == "inspect" else 1)
        assert everything(directory) == before
    notes = " ".join(verified(directory).notes)
    assert (
        "no generation needs, 5 B in all, which the next opening deletes: block-left-00000099.safetensors, manifest-00000003.json.tmp"
        in notes
    )
    assert "files that are not the store's: mine.txt" in notes


def test_a_directory_without_a_lock_gets_none(directory: Path) -> None:
    (directory / "tierstore.lock").unlink()
    assert command("verify", directory).exit_code == 0
    assert not (directory / "tierstore.lock").exists()


def test_a_medium_that_cannot_be_written(directory: Path) -> None:
    class ReadOnly(LocalFiles):
        def lock(self, path: str) -> Lock | None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    report = verified(directory, ReadOnly())
    assert report.good
    assert report.notes == ["the lock could not be taken (Read-only file system): no store must work in the directory meanwhile"]


def test_a_store_that_is_open_keeps_verify_out_and_not_inspect(directory: Path, tmp_path: Path) -> None:
    with TierStore(nvme=directory, keep=2, **BUDGETS):
        for arguments in (["verify", directory], ["export", directory, tmp_path / "out"]):
            result = command(*arguments)
            assert result.exit_code == 2
            assert f"in use by process {os.getpid()}" in result.output
        with pytest.raises(BusyError) as caught:
            verified(directory)
        assert caught.value.pid == os.getpid()
        assert not (tmp_path / "out").exists()
        shown = command("inspect", directory)
        assert shown.exit_code == 0
        assert f"open in process {os.getpid()}" in shown.output
        (directory / "block-new-00000099.safetensors").write_bytes(b"half")
        shown = command("inspect", directory)
        assert "the store is at work on them" in shown.output
        assert "left over" not in shown.output
    (directory / "block-new-00000099.safetensors").write_bytes(b"half")
    shown = command("inspect", directory)
    assert "process" not in shown.output
    assert "left over: block-new-00000099.safetensors" in shown.output


def test_a_store_that_opens_while_verify_reads_is_kept_out(directory: Path) -> None:
    def begin(total: int) -> Callable[[int], None]:
        with pytest.raises(BusyError):
            TierStore(nvme=directory, **BUDGETS)
        return lambda nbytes: None

    assert verified(directory, begin=begin).good
    TierStore(nvme=directory, keep=2, **BUDGETS).close()


@pytest.mark.parametrize("name", ["verify", "inspect", "export"])
def test_what_is_no_store_s_directory(tmp_path: Path, directory: Path, name: str) -> None:
    out = [tmp_path / "out"] if name == "export" else []
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for place, says in [
        (tmp_path / "nowhere", "is not there"),
        (tmp_path / "empty", "is not a store's directory"),
        (tmp_path / "file", "is not a directory"),
        (tmp_path, f"did you mean {directory}\\?"),
    ]:
        result = command(name, place, *out)
        assert result.exit_code == 2
        assert re.search(says, result.output)
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()
    result = command(name, directory, *out, "--generation", 9)
    assert result.exit_code == 2
    assert "generation 9 is not in" in result.output
    assert "have generations 1, 2" in result.output


def test_a_store_without_a_commit(tmp_path: Path) -> None:
    TierStore(nvme=tmp_path / "store", **BUDGETS).close()
    result = command("verify", tmp_path / "store")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "There is nothing to check.")
    assert "Nothing has been committed yet." in command("inspect", tmp_path / "store").output
    result = command("export", tmp_path / "store", tmp_path / "out")
    assert result.exit_code == 2
    assert "nothing has been committed" in result.output


# -- inspect ---------------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_is_there(directory: Path) -> None:
    output = command("inspect", directory).output
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"^ +1 +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +3 +37\.8 MB", output, re.MULTILINE)
    assert re.search(r"^ +2 +current +\d{4}-", output, re.MULTILINE)
    assert "written" in lines[3], "a copy has the time of copying"
    assert 'metadata: {"step": 2}' in output
    assert re.search(r"^big +4 +I32, I64 \+2 +37\.8 MB +\d{8}", output, re.MULTILINE)
    assert re.search(r"^optimizer/small +1 +F32 +4\.10 kB +\d{8} +frozen", output, re.MULTILINE)
    assert re.search(r"^shards of older generations only +1 +8\.19 kB", output, re.MULTILINE)
    tensors = command("inspect", directory, "--tensors").output
    assert re.search(r"^  b +I32 +37\.7 MB +9437184", tensors, re.MULTILINE)
    assert re.search(r"^  y +I64 +8 B +scalar", tensors, re.MULTILINE)
    assert 'metadata: {"step": 1}' in command("inspect", directory, "--generation", 1).output


def test_long_metadata_shows_what_is_short(tmp_path: Path) -> None:
    with TierStore(nvme=tmp_path / "store", **BUDGETS) as store:
        store.put("w", torch.zeros(3))
        store.commit({"config": {"width": list(range(200))}, "corpus": "x" * 400, "step": 7, "loss": 0.5})
        shown = sentences(command("inspect", tmp_path / "store"))
        assert 'metadata: {"step": 7, "loss": 0.5, "config": {"width": [0, 1, ' in shown
        assert '"corpus": "xxxx' in shown
        assert "x ...} (all of it with --json)" in shown
        store.commit({f"name{number}": number for number in range(100)})
        assert re.search(r'"name0": 0, .* \d+ more\} \(all of it with --json\)', sentences(command("inspect", tmp_path / "store")))
        store.commit("x" * 400)
        assert "x ... (all of it with --json)" in sentences(command("inspect", tmp_path / "store"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(
    "arguments", [["inspect", "DIR"], ["verify", "DIR", "--json"], ["inspect", "nowhere", "--json"], ["export", "DIR", "OUT"]]
)
def test_output_that_cannot_be_written(directory: Path, tmp_path: Path, arguments: list[str]) -> None:
    given = [{"DIR": str(directory), "OUT": str(tmp_path / "out")}.get(argument, argument) for argument in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tierstore", *given], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, "Error: the output cannot be written (No space left on device)\n")


@pytest.mark.parametrize("name", ["verify", "inspect"])
def test_an_error_as_json(tmp_path: Path, name: str) -> None:
    result = command(name, tmp_path / "nowhere", "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert "nowhere is not there" in error
    assert result.stderr == f"Error: {error}\n"
    assert command(name, tmp_path / "nowhere").stdout == ""


def test_inspect_shows_damage(directory: Path) -> None:
    flip(directory / "manifest-00000002.json", 30)
    shard_of_1 = json.loads((directory / "manifest-00000001.json").read_text())["blocks"][0]
    (directory / shard_of_1["file"]).unlink()
    result = command("inspect", directory)
    assert result.exit_code == 0
    assert "generation 2: the manifest does not match its checksum" in result.output
    assert re.search(rf"^block '{shard_of_1['name']}': {shard_of_1['file']} is missing", result.output, re.MULTILINE)
    assert "may belong to generation 2, whose manifest cannot be used" in result.output
    rows = {row.generation: row for row in inspected(directory).generations}
    assert rows[1].damaged
    assert rows[1].current, "it is what a store would open"
    assert rows[2].damaged


def test_what_a_killed_process_left(directory: Path) -> None:
    (directory / "tierstore.pid").write_text("2147483646\n")
    assert "2147483646" not in command("inspect", directory).output, "nobody has it open"


def test_json_has_the_documented_members(directory: Path) -> None:
    flip(shard(directory, "small"), 4096)
    (directory / "tierstore.pid").write_bytes(describe_holder())
    document = (ROOT / "tierstore" / "FORMAT.md").read_text(encoding="utf-8").partition("## What `--json` prints")[2]
    shown, checked = document.split("`verify`:\n")
    shown = shown.partition("`inspect`:\n")[2].replace('{"pid"}', "pid")
    for name, documented in (("inspect", shown), ("verify", checked)):
        found = json.loads(command(name, directory, "--json").stdout)
        for generation in found["generations"]:
            generation.update({"metadata": None} if name == "inspect" else {})  # what is in there is the user's
        assert set(_keys(found)) == set(re.findall(r"`([a-z_]+)`", documented))
    blocks = json.loads(command("inspect", directory, "--json").stdout)["generations"][1]["blocks"]
    optimizer = next(block for block in blocks if block["name"] == "optimizer/small")
    assert (optimizer["state"], optimizer["frozen"], optimizer["single"], optimizer["tensor_bytes"]) == (True, True, True, 20)


def _keys(value: object) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []


def test_disk_adds_up(directory: Path) -> None:
    (directory / "block-left-00000099.safetensors").write_bytes(b"half")
    (directory / "mine.txt").write_text("foreign")
    disk = inspected(directory).to_json()["disk"]
    assert disk["total"] == {"files": len(list(directory.iterdir())), "bytes": sum(path.stat().st_size for path in directory.iterdir())}
    assert (disk["left_over"]["bytes"], disk["foreign"]["bytes"], disk["current_shards"]["files"]) == (4, 7, 3)


# -- beside a running store ------------------------------------------------------------------------------------------------


def test_inspect_beside_a_store_that_commits_without_pause(tmp_path: Path) -> None:
    path = tmp_path / "store"
    done = threading.Event()

    def train() -> None:
        with TierStore(nvme=path, keep=2, gpu="1MB", ram="1MB", device="cpu") as store:
            for number in range(20):
                store.put(f"w{number}", torch.zeros(3000))
            store.commit(0)
            ready.set()
            step = 0
            while not done.is_set():
                step += 1
                store.write(f"w{step % 20}", torch.full((3000,), float(step)))
                store.commit(step)

    ready = threading.Event()
    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert ready.wait(60)
        last = 0
        for _ in range(60):
            contents = inspected(path)
            assert contents.current is not None
            assert contents.current.generation >= last
            last = contents.current.generation
            for row in contents.generations:
                assert not row.damaged, [block.problem for block in row.blocks]
                assert row.metadata == row.generation - 1
                assert len(row.blocks) == 20
    finally:
        done.set()
        thread.join()
    assert last > 1


def test_a_manifest_that_vanishes_is_looked_for_again(directory: Path) -> None:
    """The store commits 3 and drops 1 between the listing and the reading."""

    class Busy(LocalFiles):
        commits = 0

        async def load(self, path: str, nbytes: int) -> bytes:
            if path.endswith("manifest-00000001.json") and not self.commits:
                self.commits += 1
                with TierStore(nvme=directory, keep=1, gpu="40MB", ram="80MB", device="cpu") as store:
                    store.write("small", {"x": torch.zeros(64), "none": torch.empty(0), "y": torch.tensor(9)})
                    store.commit({"step": 3})
            return await super().load(path, nbytes)

    files = Busy()
    contents: Contents = run(lambda files: inspect(files, str(directory)), files)
    assert files.commits == 1
    rows = [(row.generation, row.damaged, row.metadata) for row in contents.generations]
    assert rows[-1] == (3, False, {"step": 3})
    assert [row[0] for row in rows] == [2, 3][-kept(1) :]


def test_a_commit_while_one_looks_is_not_missing(directory: Path) -> None:
    """Whenever the store commits between two calls, CURRENT is never newer than what is listed after it."""

    class Busy(LocalFiles):
        def __init__(self, left: int) -> None:
            super().__init__()
            self.left = left
            self.commits = False

        async def disturb(self) -> None:
            self.left -= 1
            if not self.left:
                self.commits = True
                with TierStore(nvme=directory, keep=2, **BUDGETS) as store:
                    store.commit({"step": 3})

        async def load(self, path: str, nbytes: int) -> bytes:
            await self.disturb()
            return await super().load(path, nbytes)

        async def scan(self, path: str) -> dict[str, FileStat]:
            await self.disturb()
            return await super().scan(path)

    for at in range(1, 20):
        files = Busy(at)
        contents: Contents = run(lambda files: inspect(files, str(directory)), files)
        assert contents.problems == []
        if not files.commits:
            break
    assert at > 4


def test_names_that_vanish_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stays").write_text("x")
    monkeypatch.setattr(os, "listdir", lambda path: ["gone", "stays"])
    found: dict[str, FileStat] = run(lambda files: files.scan(str(tmp_path)))
    assert list(found) == ["stays"]


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "DIR"], ["inspect", "DIR"], ["export", "DIR", "OUT"]])
def test_none_of_this_waits_for_torch(directory: Path, tmp_path: Path, arguments: list[str]) -> None:
    given = [{"DIR": str(directory), "OUT": str(tmp_path / "out")}.get(argument, argument) for argument in arguments]
    code = "import sys; from tierstore.cli import main; main(sys.argv[1:], standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"
