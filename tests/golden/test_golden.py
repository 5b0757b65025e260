"""Stores that older versions wrote are opened by this one, and by a reader that knows only the document."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.golden import make, reader
from tierstore import TierStore
from tierstore.cli import main
from tierstore.errors import DirectoryError
from tierstore.nvme.checksums import checksum
from tierstore.nvme.manifest import FORMAT

HERE = Path(__file__).parent
VERSIONS = sorted(path.name for path in HERE.glob("v*") if path.is_dir())
SIZES = {1: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0", 2: "I16 U16 F16 BF16", 4: "I32 U32 F32", 8: "I64 U64 F64"}
DTYPES = {name: size for size, listed in SIZES.items() for name in listed.split()}
GENERATIONS = {"v1": (1, 2), "v2": (3, 4)}
ADOPTED: dict[int, set[str]] = {1: set(), 2: set(), 3: {"layers.0", "layers.1", "embed", "model"}, 4: {"layers.0", "embed", "model"}}
UNSUMMED = {"layer.0", "optimizer/layer.0"}
UNCHECKED = {1: set(), 2: UNSUMMED, 3: UNSUMMED | ADOPTED[3], 4: UNSUMMED | {"embed", "model"}}
Bytes = dict[str, dict[str, bytes]]


def pattern(nbytes: int, salt: int) -> bytes:
    return bytes((7 * i + salt) % 251 for i in range(nbytes))


def expected(generation: int) -> Bytes:
    """What the golden stores hold, worked out here by hand: bytes by block and tensor."""
    up, down, moments = ((2, 3, 4), (7, 8, 9))[min(generation, 2) - 1]
    second: Bytes = {
        "new dtypes": {"F4": pattern(6, 2), "C64": pattern(48, 2)},
        "layers.0": {"layers.0.weight": pattern(140, 20), "layers.0.bias": pattern(3, 30)},
        "layers.1": {"layers.1.weight": pattern(140, 21 if generation == 3 else 11), "layers.1.bias": pattern(3, 31)},
        "embed": {"embed.weight": pattern(66, 40)},
        "model": {"scale": np.float32(0.5).tobytes()},
    }
    return {
        **(second if generation > 2 else {}),
        "embedding": {
            "embedding.weight": np.arange(140, dtype="<f4").tobytes(),
            "embedding.mask": bytes([1, 0, 0, 1, 1]),
            "embedding.scale": bytes([0xC0, 0xBF]),  # -1.5 is 0xBFC0
            "embedding.nothing": b"",
        },
        "every dtype": {name: bytes([0, 1, 0, 1, 0, 1]) if name == "BOOL" else pattern(6 * size, 1) for name, size in DTYPES.items()},
        "layer.0": {"layer.0.up": pattern(2048, up), "layer.0.down": pattern(2048, down)},
        "optimizer/layer.0": {"exp_avg": pattern(4096, moments), "step": np.float32(min(generation, 2)).tobytes()},
        "Größe ../层": {"frozen": pattern(10, 5)},
        "bias": {"bias": pattern(72, 6)},
    }


SHAPES = {
    "embedding.weight": (20, 7),
    "embedding.mask": (5,),
    "embedding.scale": (),
    "embedding.nothing": (0, 3),
    "bias": (9,),
    "F8_E8M0": (3, 2),
}
METADATA: dict[int, object] = {
    3: {"step": 3},
    4: {"step": 4},
    1: {"step": 1},
    2: {"step": 2, "note": "ä", "nested": [None, True, 0.1, {"deep": []}]},
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy: opening a store may change it."""
    directory = Path(shutil.copytree(HERE / request.param, tmp_path / "store"))
    if request.param == "v2":
        model = put_model(tmp_path / "model")
        make.rename_model(directory, make.NOWHERE, str(model))
    return directory


@pytest.fixture
def pair(golden: Path, request: pytest.FixtureRequest) -> tuple[int, int]:
    """The store's generations."""
    return GENERATIONS[request.node.callspec.params["golden"]]


def put_model(path: Path) -> Path:
    shutil.copytree(make.MODEL, path)
    os.utime(path / "model.safetensors", ns=(make.MODIFIED_NS, make.MODIFIED_NS))
    return path


def test_there_is_one_of_this_version() -> None:
    assert f"v{FORMAT}" in VERSIONS
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 200_000 * len(VERSIONS)


@pytest.mark.parametrize("which", [0, 1, None])
def test_every_value_is_what_was_written(golden: Path, pair: tuple[int, int], which: int | None) -> None:
    generation = None if which is None else pair[which]
    with TierStore(nvme=golden, generation=generation, keep=2, gpu="1MB", ram="1MB", device="cpu") as store:
        number = generation or pair[1]
        assert store.committed is not None
        assert (store.committed.generation, store.committed.metadata) == (number, METADATA[number])
        found: Bytes = {}
        for block in store:
            tensors = store.read(block)
            assert isinstance(tensors, torch.Tensor) == (block == "bias")
            mapping: Mapping[str, torch.Tensor] = {block: tensors} if isinstance(tensors, torch.Tensor) else tensors
            found[block] = {name: raw(tensor) for name, tensor in mapping.items()}
            for name, shape in SHAPES.items():
                if name in mapping:
                    assert tuple(mapping[name].shape) == shape
        assert found == expected(number)
        assert [name for name in store if store.info(name).frozen] == ["Größe ../层"]
        assert {name for name in store if store.info(name).adopted} == ADOPTED[number]
        store.write("bias", torch.zeros(9, dtype=torch.float64))
        assert store.commit() == pair[1] + 1


def test_verify_finds_it_whole(golden: Path, pair: tuple[int, int]) -> None:
    result = CliRunner().invoke(main, ["verify", str(golden), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["whole_generations"] == list(pair)
    assert [set(generation["unchecked"]) for generation in report["generations"]] == [UNCHECKED[number] for number in pair]
    assert report["notes"] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_made_today_is_the_same(tmp_path: Path, version: str) -> None:
    """Byte for byte. A difference that the format allows is a reason to look twice, and then to change this test, not the golden store."""
    if version == "v1":
        make.make(str(tmp_path / "made"))
    else:
        make.make_second(str(tmp_path / "made"), put_model(tmp_path / "model"))
        make.make_model(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (make.MODEL / "model.safetensors").read_bytes()
    then, now = HERE / version, tmp_path / "made"
    assert sorted(path.name for path in now.iterdir()) == sorted(path.name for path in then.iterdir())
    for path in then.iterdir():
        assert (now / path.name).read_bytes() == path.read_bytes(), path.name


def raise_format(directory: Path, generation: int, version: int) -> None:
    path = directory / f"manifest-{generation:08d}.json"
    body, count = re.subn(rb'^\{"format":[12],', b'{"format":%d,"of the future":1,' % version, path.read_bytes()[:-32])
    assert count == 1
    path.write_bytes(body + f',"checksum":"{checksum(body):016x}"}}\n'.encode("ascii"))


def test_a_newer_format_is_refused_by_its_number(golden: Path, pair: tuple[int, int], tmp_path: Path) -> None:
    raise_format(golden, pair[1], FORMAT + 6)
    before = {path.name: path.read_bytes() for path in golden.iterdir()}
    with pytest.raises(DirectoryError, match=f"format {FORMAT + 6}.*update tierstore") as caught:
        TierStore(nvme=golden, gpu="1MB", ram="1MB", device="cpu")
    assert caught.value.format == FORMAT + 6
    for command in (["verify", str(golden)], ["export", str(golden), str(tmp_path / "out")]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert re.search(f"format {FORMAT + 6}.*update tierstore", result.output)
    result = CliRunner().invoke(main, ["inspect", str(golden)])
    assert result.exit_code == 0
    assert f"format {FORMAT + 6}" in result.output
    assert CliRunner().invoke(main, ["verify", str(golden), "--generation", str(pair[0])]).exit_code == 0
    assert {path.name: path.read_bytes() for path in golden.iterdir() if path.name != "tierstore.pid"} == before


# -- the document ----------------------------------------------------------------------------------------------------------


def read_by_the_document(path: Path, generation: int | None = None) -> Bytes:
    blocks = reader.read(path, generation)[2]
    return {block: {name: array.tobytes() for name, array in tensors.items()} for block, tensors in blocks.items()}


def test_a_reader_written_from_the_document_reads_it(golden: Path, pair: tuple[int, int]) -> None:
    assert reader.read(golden)[:2] == (pair[1], METADATA[pair[1]])
    assert read_by_the_document(golden) == expected(pair[1])
    assert read_by_the_document(golden, pair[0]) == expected(pair[0])
    assert reader.read(golden)[2]["embedding"]["embedding.weight"][3, 2] == 23.0


def test_it_reads_a_fresh_store_of_several_chunks(tmp_path: Path) -> None:
    big = torch.arange(9 << 20, dtype=torch.int32).to(torch.uint16)  # 18 MiB: two chunks
    with TierStore(nvme=tmp_path / "store", gpu="24MB", ram="64MB", device="cpu") as store:
        store.put("big", {"one": torch.tensor([3], dtype=torch.int8), "two": big})
        store.put("bare", torch.tensor(2.5))
        store.commit("text")
    generation, metadata, blocks = reader.read(tmp_path / "store")
    assert (generation, metadata, sorted(blocks)) == (1, "text", ["bare", "big"])
    assert blocks["big"]["two"].tobytes() == raw(big)
    assert blocks["bare"]["bare"] == 2.5
    (shard,) = (tmp_path / "store").glob("block-big-*")
    with shard.open("r+b") as file:
        file.seek(4096 + (17 << 20))
        file.write(b"\xff\xff")
    with pytest.raises(AssertionError, match="damaged payload"):
        reader.read(tmp_path / "store")


def test_the_reader_knows_nothing_of_ours() -> None:
    tree = ast.parse(Path(reader.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"json", "re", "sys", "math", "pathlib", "numpy", "xxhash"}


def test_git_leaves_its_bytes_alone() -> None:
    asked = ["git", "check-attr", "text", "--", f"tests/golden/v{FORMAT}/CURRENT"]
    done = subprocess.run(asked, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (HERE.parents[1] / ".git").exists():
        pytest.skip("not a git checkout")
    assert done.stdout.strip().endswith("text: unset")
