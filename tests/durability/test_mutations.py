"""Any damage to any file is seen before a wrong value is served, and nothing is thrown away because of it.

`TIERSTORE_MUTATIONS` is how many mutations of a directory in memory there are, and ten times of what a whole store gets. Which ones
rotates as the seeds of the simulation do. `TIERSTORE_MUTATION=N` draws one.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.durability.mutations import (
    COMMITS,
    GPU,
    KEEP,
    RAM,
    Damage,
    History,
    Values,
    check_kept,
    check_opened,
    check_refused,
    draw,
    is_shard,
    live,
    values_of,
    write_history,
)
from tests.simulation.files import Disk, SimulatedFiles
from tests.simulation.links import Pace
from tierstore import TierStore
from tierstore.errors import DirectoryError, ShardError
from tierstore.nvme.directory import Commit, Directory
from tierstore.nvme.files import aligned_buffer

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
COUNT = int(os.environ.get("TIERSTORE_MUTATIONS") or (10_000 if NIGHTLY else 800))
BASE = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0) * 10_000
ONE = os.environ.get("TIERSTORE_MUTATION")
PART = 200

ROOT = "/swap"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return write_history(tmp_path_factory.mktemp("history"))


def seeds(first: int, count: int) -> list[int]:
    return [int(ONE)] if ONE else list(range(BASE + first, BASE + first + count))


def read_in_memory(disk: Disk, *, checksum: bool = True) -> tuple[Commit, Values]:
    """What a directory serves.

    Raises:
        ShardError, DirectoryError: It cannot be opened or read.
    """
    directory = Directory.open(ROOT, keep=KEEP, checksum=checksum, files=SimulatedFiles(disk, Pace()))
    if directory.committed is not None:  # before a single shard is read
        assert directory.committed.metadata["seed"] == 1, "another store's metadata was served"

    async def read_all() -> Values:
        try:
            values: Values = {}
            for name, entry in directory.entries.items():
                into = aligned_buffer(entry.block.nbytes)
                await directory.read(entry.shard, into)
                values[name] = {spec.name: bytes(into[spec.offset : spec.offset + spec.nbytes]) for spec in entry.block.tensors}
            return values
        finally:
            await directory.close()

    values = asyncio.run(read_all())
    assert directory.committed is not None, "an empty store was opened instead of what was committed"
    return directory.committed, values


def disk_of(damage: Damage) -> Disk:
    disk = Disk()
    disk.directories.add(ROOT)
    disk.files.update({f"{ROOT}/{name}": bytearray(content) for name, content in damage.contents.items()})
    return disk


def judge_in_memory(history: History, damage: Damage) -> str:
    disk = disk_of(damage)
    try:
        commit, values = read_in_memory(disk)
    except (ShardError, DirectoryError) as error:
        check_refused(history, damage, error)
        outcome = type(error).__name__
    else:
        check_opened(history, damage, commit.generation, values, commit.metadata)
        outcome = f"generation {commit.generation}"
    check_kept(history, damage, {os.path.basename(path): bytes(content) for path, content in disk.files.items()})
    return outcome


@pytest.mark.parametrize("first", range(0, COUNT, PART))
def test_recovery_and_reading(first: int, history: History) -> None:
    outcomes = set()
    for seed in seeds(first, min(PART, COUNT - first)):
        try:
            outcomes.add(judge_in_memory(history, draw(seed, history)))
        except Exception as error:
            error.add_note(f"mutation {seed}: {draw(seed, history).what}")
            raise
    if not ONE:
        assert outcomes >= {f"generation {COMMITS}", f"generation {COMMITS - 1}", "ShardError"}


@pytest.mark.parametrize("first", range(0, COUNT // 10, PART))
def test_without_checksums_all_but_bytes_of_shards_is_seen(first: int, history: History) -> None:
    """`checksum=False` trusts a shard that is there with its length. Manifests are checked all the same."""
    for seed in seeds(first, min(PART, COUNT // 10 - first)):
        damage = draw(seed, history)
        try:
            commit, values = read_in_memory(disk_of(damage), checksum=False)
        except (ShardError, DirectoryError) as error:
            check_refused(history, damage, error)
            continue
        changed = [name for name in damage.files if is_shard(name) and name in history.last]
        if not changed:
            check_opened(history, damage, commit.generation, values, commit.metadata)
            continue
        needed = [name for name in changed if name.encode() in history.last[f"manifest-{COMMITS:08d}.json"]]
        assert all(len(damage.contents[name]) == len(history.last[name]) for name in needed), damage.what
        wrong = {name for name in values if values[name] != history.values[commit.generation][name]}
        assert all(any(name in file for file in changed) for name in wrong), f"{damage.what}: {wrong} were not damaged"


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(
    ("current", "foreign"),
    [
        *(("own", foreign) for foreign in [(COMMITS,), (COMMITS - 1,), (COMMITS - 1, COMMITS)]),
        *((current, (foreign,)) for current in ("damaged", "missing") for foreign in (COMMITS, COMMITS - 1)),
    ],
)
def test_manifests_of_another_store_with_the_same_shards(history: History, current: str, foreign: tuple[int, ...], checksum: bool) -> None:
    """Where `CURRENT` does not tell which are the directory's own, nothing is served."""
    changed = [f"manifest-{number:08d}.json" for number in foreign]
    contents = history.last | {name: history.other[-1][name] for name in changed}
    if current == "damaged":
        contents["CURRENT"] = contents["CURRENT"].replace(b'"store":"', b'"store":"0')
    elif current == "missing":
        del contents["CURRENT"]
    damage = Damage(f"{changed}, CURRENT is {current}", (*changed, "CURRENT"), contents)
    own = {COMMITS - 1, COMMITS} - set(foreign)
    disk = disk_of(damage)
    if current == "own" and own:
        commit, values = read_in_memory(disk, checksum=checksum)
        assert commit.generation == max(own)
        assert values == history.values[max(own)]
    else:
        with pytest.raises(ShardError, match="different stores") as caught:
            read_in_memory(disk, checksum=checksum)
        assert all(name in str(caught.value) for name in changed)
    check_kept(history, damage, {os.path.basename(path): bytes(content) for path, content in disk.files.items()})


@pytest.mark.parametrize("checksum", [True, False])
def test_current_of_another_store(history: History, checksum: bool) -> None:
    """It may be `CURRENT` that was exchanged, or every manifest: nobody can tell, so nothing is served, and the error says what to do."""
    damage = Damage("", ("CURRENT",), history.last | {"CURRENT": history.other[-1]["CURRENT"]})
    disk = disk_of(damage)
    for _ in range(2):
        with pytest.raises(ShardError, match="different stores") as caught:
            read_in_memory(disk, checksum=checksum)
        assert all(store_of(contents["CURRENT"]) in str(caught.value) for contents in (damage.contents, history.last))
    check_kept(history, damage, {os.path.basename(path): bytes(content) for path, content in disk.files.items()})
    del disk.files[f"{ROOT}/CURRENT"]  # as the error says
    commit, values = read_in_memory(disk, checksum=checksum)
    assert (commit.generation, values) == (COMMITS, history.values[COMMITS])


def store_of(data: bytes) -> str:
    return str(json.loads(data)["store"])


@pytest.mark.parametrize("first", range(0, max(30, COUNT * 3 // 100), 30))
def test_a_whole_store(first: int, history: History, tmp_path: Path) -> None:
    for seed in seeds(first + 5_000_000, 30):
        damage = draw(seed, history)
        path = tmp_path / str(seed)
        path.mkdir(mode=0o700)
        for name, content in damage.contents.items():
            (path / name).write_bytes(content)
        try:
            with TierStore(GPU, RAM, path, device="cpu", keep=KEEP) as store:
                assert store.committed is not None, damage.what
                with store.use(*store) as _:
                    pass
                check_opened(history, damage, store.committed.generation, values_of(store), store.committed.metadata)
        except (ShardError, DirectoryError) as error:
            check_refused(history, damage, error)
        check_kept(history, damage, {file.name: file.read_bytes() for file in path.iterdir()})


def test_shards_written_without_checksums(tmp_path: Path) -> None:
    """Then only a header can be checked: another block's shard is seen, and an old one of the same block is not."""
    snapshots, values = live(tmp_path / "one", 1, checksum=False)
    last = dict(snapshots[-1])
    manifest = last[f"manifest-{COMMITS:08d}.json"]
    alpha, beta = ([name for name in last if f"block-{block}-" in name] for block in ("alpha", "beta"))
    newest = {name: content for name, content in last.items() if name.encode() in manifest}
    (new_alpha,) = set(alpha) & set(newest)
    (old_alpha,) = set(alpha) - set(newest)
    (new_beta,) = set(beta) & set(newest)
    with pytest.raises(ShardError, match="alpha"):
        read_in_memory(disk_of(Damage("", (), last | {new_alpha: last[new_beta]})))
    commit, found = read_in_memory(disk_of(Damage("", (), last | {new_alpha: last[old_alpha]})))
    assert found["alpha"] == values[COMMITS - 1]["alpha"]
    assert commit.generation == COMMITS
