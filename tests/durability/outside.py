"""A store's directory as another program sees it: JSON, xxh3 and the safetensors library, and nothing of tierstore's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

CHUNK = 16 << 20


@dataclass(frozen=True)
class Seen:
    """A commit: its generation, the user's metadata, and the tensors of each block."""

    generation: int
    metadata: Any
    blocks: Mapping[str, Mapping[str, torch.Tensor]]


def newest_commit(path: str | os.PathLike[str]) -> Seen | None:
    """The highest generation whose manifest matches its checksum. Every byte of its shards is checked."""
    for manifest in sorted(Path(path).glob("manifest-*.json"), reverse=True):
        data = manifest.read_bytes()
        body, _, end = data.rpartition(b',"checksum":')
        if xxhash.xxh3_64_hexdigest(body) != end[1:17].decode():
            continue
        fields = json.loads(data)
        assert manifest.name == f"manifest-{fields['generation']:08d}.json"
        return Seen(fields["generation"], fields["metadata"], {block["name"]: _read(Path(path), block) for block in fields["blocks"]})
    return None


def _read(path: Path, block: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    data = (path / block["file"]).read_bytes()
    assert len(data) == block["file_bytes"]
    header, payload = data[: block["data_start"]], data[block["data_start"] :]
    if block["chunks"] is not None:
        sums = [xxhash.xxh3_64_intdigest(payload[start : start + CHUNK]) for start in range(0, len(payload), CHUNK)]
        assert [f"{one:016x}" for one in sums] == block["chunks"]
        joined = b"".join(one.to_bytes(8, "little") for one in [xxhash.xxh3_64_intdigest(header), *sums])
        assert xxhash.xxh3_64_hexdigest(joined) == block["digest"]
    with safe_open(path / block["file"], framework="pt") as opened:  # type: ignore[no-untyped-call]
        return {name: opened.get_tensor(name) for name, *_ in block["tensors"]}


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """What `du` shows."""
    return sum(os.lstat(where).st_blocks * 512 for where in [Path(path), *Path(path).iterdir()])
