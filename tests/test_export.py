"""`tierstore export`: what is written, under which names, and that its bytes stay."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from tierstore import TierStore
from tierstore.cli import main
from tierstore.errors import ShardError, TierFullError, TransferError
from tierstore.export import Exported, Options, export
from tierstore.export.layout import FILLERS, REFUSED
from tierstore.nvme.files import File
from tierstore.nvme.local import LocalFiles
from tierstore.threads import StalledError

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def open_store(path: Path, **options: Any) -> TierStore:
    return TierStore(nvme=path, **{"gpu": "48MB", "ram": "96MB", "device": "cpu", **options})


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *(str(argument) for argument in arguments)], env={"COLUMNS": "80"})


def exported(path: Path, out: Path, out_files: LocalFiles | None = None, **options: Any) -> Exported:
    files, out_files = LocalFiles(), out_files if out_files is not None else LocalFiles()
    try:
        return asyncio.run(export(files, out_files, str(path), Options(str(out), **options)))
    finally:
        files.close()
        out_files.close()


def load(out: Path) -> Tensors:
    """As transformers loads a sharded checkpoint: the index tells the files, each says what it is, and holds its names and no others."""
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    by_file: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, []).append(name)
    assert sorted(by_file) == sorted(path.name for path in out.glob("*.safetensors"))
    found: Tensors = {}
    for file, listed in by_file.items():
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert sorted(opened.keys()) == sorted(listed)
            found |= {name: opened.get_tensor(name).clone() for name in listed}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return {name: found[name] for name in index["weight_map"]}


def same(one: Tensors, other: Tensors) -> bool:
    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return one.keys() == other.keys() and all(
        (one[name].dtype, one[name].shape, raw(one[name])) == (other[name].dtype, other[name].shape, raw(other[name])) for name in one
    )


def weights(seed: int) -> dict[str, Tensors]:
    """Blocks of many kinds; `layer1` has two chunks, and its first tensor ends in the first."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": {
            "embedding.mask": torch.rand(7, generator=generator) > 0.5,
            "embedding.weight": torch.randn(50, 9, generator=generator).bfloat16(),
            "embedding.scale": torch.randn((), generator=generator, dtype=torch.float64),
            "embedding.none": torch.empty(0, 4),
        },
        "layer0": {"layer0.up": torch.randn(64, 64, generator=generator), "layer0.down": torch.randn(64, 64, generator=generator)},
        "layer1": {
            "layer1.gain": torch.ones(9),
            "layer1.up": torch.randn(9 << 19, generator=generator),
            "layer1.down": torch.randn(1000, generator=generator),
        },
        "head": {"head": torch.randn(3, 5, generator=generator).to(torch.float8_e4m3fn)},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "store"
    with open_store(path, keep=2) as store:
        for name, tensors in weights(0).items():
            store.put(name, tensors["head"] if name == "head" else tensors)
            store.put(f"optimizer/{name}", {f"exp_avg.{tensor}": torch.zeros(9) for tensor in tensors})
        store.put("gradients/all", torch.zeros(5))
        store.commit(1)
        with store.use("head", write=True) as head:
            head.copy_(weights(1)["head"]["head"])
        store.commit(2)
    return path


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def flat(seed: int, head: int) -> Tensors:
    blocks = weights(seed) | {"head": weights(head)["head"]}
    return {name: tensor for tensors in blocks.values() for name, tensor in tensors.items()}


# -- what is written -------------------------------------------------------------------------------------------------------


def test_the_weights_and_nothing_else(directory: Path, tmp_path: Path) -> None:
    result = command(directory, tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = load(tmp_path / "out")
    assert same(found, flat(0, 1))
    assert not any("filler" in name or "exp_avg" in name for name in found)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model-00001-of-00001.safetensors", INDEX]
    assert "Left out: 5 blocks (" in result.output
    assert "10 tensors of 4 blocks, 18.9 MB, in 1 file" in " ".join(result.output.split())
    assert result.output.splitlines()[-1].endswith(" s).")
    command(directory, tmp_path / "older", "--generation", 1)
    assert same(load(tmp_path / "older"), flat(0, 0))


def test_the_order_is_the_manifest_s(directory: Path, tmp_path: Path) -> None:
    exported(directory, tmp_path / "out", max_shard_bytes=10_000)
    manifest = json.loads((directory / "manifest-00000002.json").read_text())
    order = [tensor[0] for block in manifest["blocks"] if "/" not in block["name"] for tensor in block["tensors"]]
    assert list(load(tmp_path / "out")) == order


@pytest.mark.parametrize("most", [1, 500, 16_384, 33_000, 10**9])
def test_files_are_filled_up_to_the_limit(directory: Path, tmp_path: Path, most: int) -> None:
    done = exported(directory, tmp_path / "out", max_shard_bytes=most)
    found = load(tmp_path / "out")
    assert same(found, flat(0, 1))
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    groups = [[found[name].nbytes for name in found if weight_map[name] == file] for file in done.files]
    assert done.files == [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        assert sum(group) <= most or len(group) == 1
        assert not following or sum(group) + following[0] > most, "a file was begun too early"
    assert command(directory, tmp_path / "x", "--max-shard-size", "16 potatoes").exit_code == 2


def test_every_tensor_is_aligned_to_its_items(directory: Path, tmp_path: Path) -> None:
    """Seven bools first: what follows would lie at odd places."""
    exported(directory, tmp_path / "out")
    data = (tmp_path / "out" / "model-00001-of-00001.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    sizes = {"BOOL": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4, "F64": 8}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, name
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("portable", [False, True])
def test_both_ways_to_move_bytes(directory: Path, tmp_path: Path, portable: bool) -> None:
    files, out_files = LocalFiles(portable=portable), LocalFiles(portable=portable)
    asyncio.run(export(files, out_files, str(directory), Options(str(tmp_path / "out"))))
    files.close()
    out_files.close()
    assert same(load(tmp_path / "out"), flat(0, 1))


# -- which blocks, and what they are called --------------------------------------------------------------------------------


def test_choosing_blocks(directory: Path, tmp_path: Path) -> None:
    def names(*options: str) -> set[str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        result = command(directory, tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        return set(load(tmp_path / "out"))

    assert names("--only", "layer*") == {"layer0.up", "layer0.down", "layer1.gain", "layer1.up", "layer1.down"}
    assert names("--only", "layer*", "--only", "head", "--exclude", "layer1") == {"layer0.up", "layer0.down", "head"}
    assert names("--exclude", "e*", "--exclude", "layer?") == {"head"}
    assert names("--only", "gradients/*") == {"gradients/all"}, "asked for by name"
    result = command(directory, tmp_path / "none", "--only", "nothing*")
    assert result.exit_code == 2
    assert "no block of generation 2 is to be exported" in result.output
    assert not (tmp_path / "none").exists()
    result = command(directory, tmp_path / "some", "--only", "head", "--only", "haed")
    assert "Note: --only 'haed' matches no block" in result.output


def test_every_prefix_of_training_state_is_left_out(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        for name in ("optimizer/a", "gradients/a", "activations/a", "training/a", "optimizers", "a/optimizer/b"):
            store.put(name, torch.zeros(1))
        store.commit()
    exported(tmp_path / "store", tmp_path / "out")
    assert set(load(tmp_path / "out")) == {"optimizers", "a/optimizer/b"}


def test_names_that_occur_twice_get_their_block_s(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        store.put("layer.0", {"weight": torch.zeros(1), "bias": torch.ones(1)})
        store.put("layer.1", {"weight": torch.full((1,), 2.0)})
        store.put("scale", torch.full((1,), 3.0))
        store.commit()
    result = command(tmp_path / "store", tmp_path / "out")
    assert {name: float(tensor) for name, tensor in load(tmp_path / "out").items()} == {
        "layer.0.weight": 0.0,
        "layer.0.bias": 1.0,
        "layer.1.weight": 2.0,
        "scale": 3.0,
    }
    assert result.output.count("have the same name") == 1
    result = command(tmp_path / "store", tmp_path / "one", "--exclude", "layer.1")
    assert set(load(tmp_path / "one")) == {"weight", "bias", "scale"}
    assert "have the same name" not in result.output


def test_names_that_are_the_same_all_the_same_are_refused(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as store:
        store.put("a", {"b.c": torch.zeros(1), "x": torch.zeros(1)})
        store.put("a.b", {"c": torch.zeros(1), "x": torch.zeros(1)})
        store.commit()
    result = command(tmp_path / "store", tmp_path / "out")
    assert result.exit_code == 2
    assert "two tensors would be exported as 'a.b.c'" in result.output
    assert not (tmp_path / "out").exists()


# -- refusing, failing -----------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_replaced_unless_asked(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert command(directory, out, "--max-shard-size", "1kB").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = command(directory, out, "--generation", 1)
    assert result.exit_code == 2
    assert "holds a model already" in result.output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "model-00001-of-00900.safetensors.tmp").write_text("of an export that was killed")
    (out / "model.safetensors").write_text("would be read instead")
    assert command(directory, out, "--generation", 1, "--force").exit_code == 0
    assert same(load(out), flat(0, 0))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model-00001-of-00001.safetensors", INDEX]


def test_a_single_file_model_would_hide_the_export(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("theirs")
    assert command(directory, tmp_path / "out").exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_beside_the_export_would_be_put_on_it(directory: Path, tmp_path: Path, name: str, force: list[str]) -> None:
    """Libraries that find them load what they name instead. They are somebody's work, and not taken away."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    result = command(directory, tmp_path / "out", *force)
    assert result.exit_code == 2
    assert name in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_an_export_never_goes_into_the_store(directory: Path) -> None:
    before = sorted(os.listdir(directory))
    for out in (directory, directory / "inside", directory / ".." / directory.name):
        result = command(directory, out)
        assert result.exit_code == 2
        assert "inside the store's own directory" in result.output
    assert sorted(os.listdir(directory)) == before


def shard(directory: Path, block: str, generation: int = 2) -> Path:
    manifest = json.loads((directory / f"manifest-{generation:08d}.json").read_text())
    return directory / next(entry["file"] for entry in manifest["blocks"] if entry["name"] == block)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("link", [False, True])
def test_damage_leaves_nothing(directory: Path, tmp_path: Path, there: bool, link: bool) -> None:
    flip(shard(directory, "layer1"), 4096 + (17 << 20))
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "config.json").write_text("{}")
    result = command(directory, out, "--max-shard-size", "1kB", *(["--link"] if link else []))
    assert result.exit_code == 1
    assert "block 'layer1' is damaged (layer1.up, layer1.down): block-layer1-" in result.output
    assert "chunk 1 " in result.output
    assert os.listdir(out) == ["config.json"] if there else not out.exists()
    assert ("--generation 1" in result.output) == (shard(directory, "layer1", 1) != shard(directory, "layer1")), (
        "if that is not damaged, too"
    )
    assert command(directory, out, "--exclude", "layer1").exit_code == 0, "the rest is whole"
    with pytest.raises(ShardError) as caught:
        exported(directory, tmp_path / "again")
    assert (caught.value.block, caught.value.tensors, caught.value.chunk) == ("layer1", ("layer1.up", "layer1.down"), 1)


@pytest.mark.parametrize("block", ["layer0", "optimizer/layer0"])
def test_a_missing_shard_matters_only_if_it_is_exported(directory: Path, tmp_path: Path, block: str) -> None:
    shard(directory, block).unlink()
    result = command(directory, tmp_path / "out")
    assert result.exit_code == (1 if block == "layer0" else 0)
    assert (tmp_path / "out").exists() == (block != "layer0")


def test_a_damaged_manifest_names_the_generation_that_is_left(directory: Path, tmp_path: Path) -> None:
    flip(directory / "manifest-00000002.json", 40)
    result = command(directory, tmp_path / "out")
    assert result.exit_code == 1
    assert "--generation 1" in result.output
    assert command(directory, tmp_path / "out", "--generation", 1).exit_code == 0
    (directory / "manifest-00000002.json").unlink()
    result = command(directory, tmp_path / "other")
    assert result.exit_code == 0
    assert "its manifest is missing: this is an older state" in " ".join(result.output.split())


class Full(LocalFiles):
    """A drive that runs full at the nth write to it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def file(self, path: str, *, write: bool = False) -> File:
        file: Any = super().file(path, write=write)
        move = file.write

        async def failing(requests: Any) -> Any:
            self.left -= 1
            return [OSError(errno.ENOSPC, "No space left on device")] if self.left < 0 else await move(requests)

        file.write = failing
        return file


@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_a_full_drive_leaves_nothing(directory: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(TierFullError, match="the drive ran full while writing the export"):
        exported(directory, tmp_path / "out", Full(at), max_shard_bytes=1000)
    assert not (tmp_path / "out").exists()


class Ends(LocalFiles):
    """Operations on names fail from the nth on, `times` of them."""

    def __init__(self, first: int, times: float, failure: Callable[[], OSError] = lambda: OSError(errno.EIO, "Input/output error")) -> None:
        super().__init__()
        self.first = first
        self.times = times
        self.failure = failure
        self.begun: list[tuple[str, ...]] = []
        self.done: list[tuple[str, ...]] = []
        self.failed = 0

    def _begin(self, *operation: str) -> None:
        self.begun.append(operation)
        if self.first <= len(self.begun) and self.failed < self.times:
            self.failed += 1
            raise self.failure()

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        self._begin("save", path)
        await super().save(path, data, sync=sync)

    async def replace(self, source: str, target: str) -> None:
        self._begin("replace", source, target)
        await super().replace(source, target)
        self.done.append(("replace", source, target))

    async def unlink(self, path: str) -> None:
        self._begin("unlink", path)
        await super().unlink(path)
        self.done.append(("unlink", path))

    async def sync_directory(self, path: str) -> None:
        self._begin("sync", path)
        await super().sync_directory(path)
        self.done.append(("sync", path))


SMALL: dict[str, Any] = {"only": ("layer0", "embedding"), "max_shard_bytes": 20_000}
"""Two files, soon written."""


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}


def fill(directory: Path, out: Path, there: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if there != "nothing":
        out.mkdir()
        (out / "config.json").write_text("{}")
    if there == "an export":
        exported(directory, out, only=("head", "layer0"), max_shard_bytes=20_000, generation=1, force=True)
    if there == "one file":
        (out / "model.safetensors").write_text("theirs")


THERE = pytest.mark.parametrize("there", ["nothing", "a directory", "an export", "one file"])


@THERE
@pytest.mark.parametrize("link", [False, True])
def test_what_fails_once_leaves_everything_as_it_was(directory: Path, tmp_path: Path, there: str, link: bool) -> None:
    out = tmp_path / "out"
    for first in range(1, 100):
        fill(directory, out, there)
        before, files = contents(out), Ends(first, 1)
        try:
            done = exported(directory, out, files, force=True, link=link, **SMALL)
        except (TransferError, OSError):
            assert contents(out) == before, files.begun
            assert out.exists() == (there != "nothing")
            continue
        kept = {name for note in done.notes for name in contents(out) if note.startswith(f"{name},")}
        assert set(contents(out)) - {"config.json", INDEX, *done.files} == kept, "what could not be removed is told"
        if not kept:
            assert same(load(out), {name: tensor for block in SMALL["only"] for name, tensor in weights(0)[block].items()})
        if not files.failed:
            break
    assert first > 8, "operations that may fail"


@THERE
def test_a_drive_that_refuses_everything_leaves_no_index_without_its_files(
    directory: Path, tmp_path: Path, there: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    for first in range(1, 100):
        fill(directory, out, there)
        before, files = contents(out), Ends(first, math.inf)
        caplog.clear()
        try:
            exported(directory, out, files, force=True, **SMALL)
        except TransferError:
            after = contents(out)
            if INDEX in after:
                part_of_one_export(after)
            visible = {name: data for name, data in after.items() if not name.endswith(".tmp")}
            assert visible == before or "could not be left as it was" in caplog.text
        if not files.failed:
            break
    assert first > 8


def part_of_one_export(there: dict[str, bytes]) -> None:
    for file in set(json.loads(there[INDEX])["weight_map"].values()):
        header = json.loads(there[file][8 : 8 + int.from_bytes(there[file][:8], "little")])
        named = {name for name, where in json.loads(there[INDEX])["weight_map"].items() if where == file}
        assert named == header.keys() - {"__metadata__"}


def test_a_drive_that_does_not_answer_is_not_asked_again(directory: Path, tmp_path: Path) -> None:
    fill(directory, tmp_path / "out", "an export")
    clean = Ends(1000, 0)
    exported(directory, tmp_path / "out", clean, force=True, **SMALL)
    named = next(number for number, operation in enumerate(clean.begun, 1) if operation[-1].endswith(INDEX))
    files = Ends(named + 1, math.inf, lambda: StalledError(1.0))
    with pytest.raises(TransferError):
        exported(directory, tmp_path / "out", files, force=True, **SMALL)
    assert files.failed == 2, "the first, and one while tidying up"


def test_a_power_cut_never_leaves_an_index_with_files_of_another_export(directory: Path, tmp_path: Path) -> None:
    """What was done to names since the directory was synced may be lost, each on its own; also while a failure is made good."""
    out = tmp_path / "out"
    fill(directory, out, "an export")
    old = set(contents(out)) - {"config.json"}
    new = {INDEX, *exported(directory, out, force=True, **SMALL).files}
    assert len(old & new) > 2, "or nothing could be mixed up"
    for first in range(1, 100):
        fill(directory, out, "an export")
        files = Ends(first, 1)
        with contextlib.suppress(TransferError):
            exported(directory, out, files, force=True, **SMALL)
        # all new files are there under their temporary names before anything else happens to names
        since: list[tuple[str, ...]] = [("make", *(name + ".tmp" for name in new))]
        durable = dict.fromkeys(old, "old")
        for what, *paths in [*files.done, ("sync", "at last")]:
            if what != "sync":
                since.append((what, *(path.removeprefix(str(out) + os.sep) for path in paths)))
                continue
            for chosen in itertools.product([False, True], repeat=len(since)):
                state = after(durable, list(itertools.compress(since, chosen)))
                if INDEX in state:
                    assert {state.get(name) for name in (old if state[INDEX] == "old" else new)} == {state[INDEX]}, (since, chosen)
                elif not files.failed:
                    assert all("new" in (state.get(name), state.get(name + ".tmp")) for name in new), "one of the two is complete"
            durable, since = after(durable, since), []
        if not files.failed:
            break
    assert durable == dict.fromkeys(new, "new")


def after(state: dict[str, str], operations: list[tuple[str, ...]]) -> dict[str, str]:
    state = dict(state)
    for what, *paths in operations:
        if what == "make":
            state |= dict.fromkeys(paths, "new")
        elif what == "unlink":
            state.pop(paths[0], None)
        elif what == "replace" and paths[0] in state:
            state[paths[1]] = state.pop(paths[0])
    return state


# -- sharing bytes ---------------------------------------------------------------------------------------------------------


class Reflinks(LocalFiles):
    """As on a file system that has them."""

    async def clone(self, source: str, target: str) -> None:
        with open(target, "xb") as file:  # noqa: ASYNC230
            file.write(Path(source).read_bytes())  # noqa: ASYNC240


def test_where_there_are_no_reflinks_it_copies(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    out_files = LocalFiles()
    monkeypatch.setattr(out_files, "clone", refused)
    done = exported(directory, tmp_path / "out", out_files, only=("layer0",))
    assert not done.shared
    assert done.copied_bytes == done.total_bytes == 32_768
    assert {path.stat().st_nlink for path in (tmp_path / "out").iterdir()} == {1}


def test_a_reflink_is_taken_where_a_whole_file_is_the_shard(directory: Path, tmp_path: Path) -> None:
    done = exported(directory, tmp_path / "one", Reflinks(), only=("layer0",))
    assert done.shared == {"reflink": 1}
    assert done.copied_bytes == 0
    done = exported(directory, tmp_path / "all", Reflinks())
    assert not done.shared, "the layout does not depend on the file system"
    assert same(load(tmp_path / "all"), flat(0, 1))
    done = exported(directory, tmp_path / "link", Reflinks(), link=True)
    assert done.shared == {"reflink": 1}, "a reflink before a hard link"
    assert same(load(tmp_path / "link"), flat(0, 1))


def test_the_system_s_own_reflinks(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 9000)
    files = LocalFiles()
    try:
        asyncio.run(files.clone(str(tmp_path / "source"), str(tmp_path / "target")))
    except OSError:
        assert not (tmp_path / "target").exists(), "a failure leaves nothing"
    else:
        assert (tmp_path / "target").read_bytes() == b"x" * 9000
        with pytest.raises(FileExistsError):
            asyncio.run(files.clone(str(tmp_path / "source"), str(tmp_path / "target")))
    finally:
        files.close()


async def _refusing(*_: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


PAGE = 4096


def layer(value: float) -> Tensors:
    """No fillers: multiples of 256 bytes that fill pages."""
    return {
        "up": torch.full((PAGE // 8,), value, dtype=torch.float64),
        "down": torch.full((2, 64), value),
        "gain": torch.full((3584,), value).bool(),
    }


def names_of(number: int, tensors: Tensors) -> Tensors:
    return {f"layer{number}.{name}": tensor for name, tensor in tensors.items()}


def train(store: TierStore, steps: int, values: Iterator[int]) -> None:
    """Every block is written, evicted, spilled and written again, with commits in between."""
    for _ in range(steps):
        value = float(next(values))
        for number in range(6):
            with store.use(f"layer{number}", write=True) as tensors:
                for name, tensor in layer(value).items():
                    tensors[f"layer{number}.{name}"].copy_(tensor)
        for number in range(6):
            store.evict(f"layer{number}")
        store.flush()


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("way", ["hard link", "reflink", "copy"])
def test_exported_bytes_stay_the_same(tmp_path: Path, way: str, portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export, train on, commit twice, and more: with room for so few files that each is rewritten as soon as it may be."""
    if portable:
        monkeypatch.setattr("tierstore.nvme.local._PREADV", None)
    values = iter(range(1, 1000))
    sets = 3 if portable else 2  # the committed files and those that come next; without directory syncs one generation more is kept
    options = {"gpu": 16 * PAGE, "ram": 24 * PAGE, "nvme_limit": (6 + sets * 6 * 4 + sets * 2 + 2) * PAGE}
    with open_store(tmp_path / "store", **options) as store:
        for number in range(6):
            store.put(f"layer{number}", names_of(number, layer(0.0)))
        train(store, 2, values)
        store.commit()
    out = tmp_path / "out"
    done = exported(tmp_path / "store", out, Reflinks() if way == "reflink" else None, link=way == "hard link", max_shard_bytes=2 * PAGE)
    assert done.shared == ({way: 6} if way != "copy" else {}) or (way != "reflink" and done.shared == {"reflink": 6})
    if done.shared == {"hard link": 6}:
        assert {path.stat().st_nlink for path in out.glob("*.safetensors")} == {2}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert same(load(out), {name: tensor for number in range(6) for name, tensor in names_of(number, layer(2.0)).items()})
    reused = 0
    for _ in range(2):
        with open_store(tmp_path / "store", **options) as store:
            train(store, 1, values)
            store.commit()
            train(store, 2, values)
            store.commit()
            train(store, 2, values)
            store.commit()
            directory = store._engine.directory
            assert directory is not None
            reused += directory.reused_files
            assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert reused > 0, "nothing was rewritten, so nothing was proved"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "store")]).exit_code == 0


def test_what_a_shard_without_fillers_must_be(directory: Path, tmp_path: Path) -> None:
    """Blocks with fillers, of several files or under other names are copied, link or not."""
    done = exported(directory, tmp_path / "out", link=True)
    shared = {
        path.name for path in (tmp_path / "out").glob("*.safetensors") if path.stat().st_ino == shard(directory, "layer0").stat().st_ino
    }
    assert sum(done.shared.values()) == 1
    assert done.not_shared == {FILLERS: done.num_blocks - 1}
    assert not exported(directory, tmp_path / "copied", only=("layer0",)).not_shared, "nobody asked"
    assert done.shared["reflink"] or len(shared) == 1
    assert same(load(tmp_path / "out"), flat(0, 1))
    with open_store(tmp_path / "twice") as store:
        for number in range(2):
            store.put(f"layer{number}", {"weight": torch.full((1024,), float(number))})
        store.commit()
    done = exported(tmp_path / "twice", tmp_path / "qualified", link=True)
    assert not done.shared, "their tensors are called otherwise in the export"
    result = command(tmp_path / "twice", tmp_path / "said", "--link")
    assert "Shared: 0 of 2 blocks; copied: 2 with renamed tensors" in result.output
    out_files = LocalFiles()
    with pytest.MonkeyPatch.context() as patch:
        for way in ("clone", "link"):
            patch.setattr(out_files, way, _refusing)
        done = exported(directory, tmp_path / "refused", out_files, only=("layer0",), link=True)
    assert (done.shared, done.not_shared) == ({}, {REFUSED: 1})
    assert set(load(tmp_path / "qualified")) == {"layer0.weight", "layer1.weight"}
