"""What lies in the directory is safetensors that anybody can read, exactly the blocks' tensors, at multiples of 256."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tierstore import TierStore
from tierstore.catalog import FILLER_PREFIX, PAIRED
from tierstore.tiers.device import DTYPES

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3, 5), (0, 4), (1, 1, 1), (127,), (256,), (2, 3, 4, 5), (1000,)]


def example(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern, NaNs included, but True and False only for bool."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def blocks() -> dict[str, dict[str, torch.Tensor]]:
    found = {
        f"all {name}": {
            f"{name} {shape}": example(dtype, shape, number) for number, shape in enumerate(SHAPES) if shape or name not in PAIRED
        }
        for name, dtype in DTYPES.items()
    }
    found["mixed"] = {
        f"{name}.{shape}": example(dtype, shape, 7) for name, dtype in DTYPES.items() for shape in SHAPES[:4] if shape or name not in PAIRED
    }
    found["names"] = {
        name: torch.tensor([number]) for number, name in enumerate(["é", "层.0", "a/b\\c", "\0\x1f", '"', "😀", " ", "x" * 300])
    }
    found["nothing but empty ones"] = {"a": torch.empty(0), "b": torch.empty(3, 0, dtype=torch.int8)}
    return found


def header_of(path: str) -> tuple[dict[str, Any], int]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def shards(path: Path) -> list[str]:
    return sorted(entry.path for entry in os.scandir(path) if entry.name.endswith(".safetensors"))


@pytest.mark.parametrize("tier", ["gpu", "ram", "nvme"])
def test_every_file_holds_its_block_exactly(tmp_path: Path, tier: str) -> None:
    given = blocks()
    with TierStore(gpu="256KiB", ram="1MiB", nvme=tmp_path / "swap", device="cpu") as store:
        for name, tensors in given.items():
            store.put(name, tensors, tier=tier)
        store.put("lone/名", torch.arange(3.0), tier=tier)
        store.commit()
        given["lone/名"] = {"lone/名": torch.arange(3.0)}
        left = dict(given)
        for path in shards(tmp_path / "swap"):
            loaded = load_file(path)
            with safe_open(path, framework="pt") as file:
                assert set(file.keys()) == set(loaded)
                opened = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            real = {name: tensor for name, tensor in loaded.items() if not name.startswith(FILLER_PREFIX)}
            (block,) = [name for name, tensors in left.items() if tensors.keys() == real.keys()]
            for name, tensor in left.pop(block).items():
                assert same(real[name], tensor), (block, name)
                assert same(opened[name], tensor), (block, name)
            assert all(tensor.dtype == torch.uint8 for name, tensor in loaded.items() if name.startswith(FILLER_PREFIX))
            header, start = header_of(path)
            assert start % 4096 == 0
            for name, entry in header.items():
                if name != "__metadata__" and not name.startswith(FILLER_PREFIX):
                    assert (start + entry["data_offsets"][0]) % 256 == 0, (block, name)
            covered = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
            assert covered[0][0] == 0
            assert all(one[1] == two[0] for one, two in itertools.pairwise(covered))
            assert start + covered[-1][1] == os.path.getsize(path)
        assert not left


@pytest.mark.parametrize("tier", ["gpu", "ram", "nvme"])
def test_every_tensor_is_exact_and_aligned_on_its_way(tmp_path: Path, tier: str) -> None:
    given = blocks()
    with TierStore(gpu="128KiB", ram="512KiB", nvme=tmp_path / "swap", device="cpu") as store:
        for name, tensors in given.items():
            store.put(name, tensors, tier=tier)
        for turn in range(2):
            for name, tensors in given.items():
                with store.use(name, write=turn == 0) as leased:
                    assert list(leased) == list(tensors)
                    for key, tensor in tensors.items():
                        assert same(leased[key], tensor), (name, key)
                        assert leased[key].data_ptr() % 256 == 0 or not tensor.numel()
                        assert leased[key].is_contiguous()
                read = store.read(name)
                assert all(same(read[key], tensor) for key, tensor in tensors.items())  # type: ignore[index]
            store.commit()
    with TierStore(gpu="128KiB", ram="512KiB", nvme=tmp_path / "swap", device="cpu") as store:
        for name, tensors in given.items():
            read = store.read(name)
            assert list(read) == list(tensors)
            assert all(same(read[key], tensor) for key, tensor in tensors.items())  # type: ignore[index]
            assert {key: (info.dtype, info.shape) for key, info in store.info(name).tensors.items()} == {
                key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
            }


@pytest.mark.parametrize("tier", ["gpu", "ram", "nvme"])
def test_tensors_of_any_layout_are_stored_by_value(tmp_path: Path, tier: str) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    whole = torch.complex(base, base + 1)
    given = {
        "transposed": base.permute(2, 0, 1),
        "sliced": base[:, ::2, 1:],
        "expanded": torch.tensor([5.0]).expand(3, 7),
        "negated view": whole.conj().imag,
        "gradient": base.clone().requires_grad_(),
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base.clone()),
        "offset": torch.arange(100, dtype=torch.int16)[3:50],
    }
    with TierStore(gpu="128KiB", ram="512KiB", nvme=tmp_path / "swap", device="cpu") as store:
        store.put("odd", given, tier=tier)
        read = store.read("odd")
        for name, tensor in given.items():
            assert torch.equal(read[name], tensor.detach()), name  # type: ignore[index]
        changed = {name: tensor.detach() * 2 for name, tensor in given.items()}
        store.evict("odd") if tier == "nvme" else None
        store.write("odd", {"negated view": given["negated view"] * 2, "sliced": (base * 2)[:, ::2, 1:]})
        read = store.read("odd")
        for name in given:
            expected = changed[name] if name in ("negated view", "sliced") else given[name].detach()
            assert torch.equal(read[name], expected), name  # type: ignore[index]
        store.commit()
        path = shards(tmp_path / "swap")[-1]  # files that wait to be rewritten lie beside it
        assert torch.equal(load_file(path)["sliced"], changed["sliced"])


def test_what_the_caller_changes_afterwards_changes_nothing(tmp_path: Path) -> None:
    with TierStore(gpu="128KiB", ram="512KiB", nvme=tmp_path / "swap", device="cpu") as store:
        tensor = torch.ones(100)
        for tier in ("gpu", "ram", "nvme"):
            store.put(tier, {"x": tensor}, tier=tier)
        tensor.zero_()
        for tier in ("gpu", "ram", "nvme"):
            read = store.read(tier)
            assert isinstance(read, dict)
            assert read["x"].sum() == 100
            read["x"].zero_()
            assert store.read(tier)["x"].sum() == 100  # type: ignore[index]
