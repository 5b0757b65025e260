"""Makes the stores that stand for versions of the format: `python -m tests.golden.make 1 DIR`, `... 2 DIR`.

What is committed under `v1/` and `v2/` was made by this, and is never made anew once it is released: a store of today must open what a
store of then wrote. The second one's model lies in `model/`. Its manifests name it by a path that is nowhere; who opens the store puts
his own there.
A new version of the format gets a directory of its own beside it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from tierstore import TierStore
from tierstore.nvme.checksums import checksum
from tierstore.tiers.device import DTYPES

STORE = "7165727473726569"
"""Which store it is: drawn, but for this one."""

V1_DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "F8_E5M2FNUZ",
    "F8_E4M3FNUZ",
    "F8_E8M0",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "I64",
    "U64",
    "F64",
]

MODEL = Path(__file__).parent / "model"
NOWHERE = "/golden/model"
MODIFIED_NS = 1_700_000_000_123_456_700  # a multiple of 100: Windows counts in these

BUDGETS = {"gpu": "1MB", "ram": "1MB", "device": "cpu", "keep": 2}


def pattern(dtype: torch.dtype, shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """Byte i is (7 i + salt) mod 251, whatever that means as a number; for bool it is i mod 2."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.arange(count, dtype=torch.int64)
    raw = raw % 2 if dtype == torch.bool else (7 * raw + salt) % 251
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def first() -> dict[str, dict[str, torch.Tensor]]:
    """The blocks of generation 1 with several tensors."""
    return {
        "embedding": {
            "embedding.weight": torch.arange(140, dtype=torch.float32).reshape(20, 7),
            "embedding.mask": torch.tensor([True, False, False, True, True]),
            "embedding.scale": torch.tensor(-1.5, dtype=torch.bfloat16),
            "embedding.nothing": torch.empty(0, 3, dtype=torch.float16),
        },
        "every dtype": {name: pattern(DTYPES[name], (3, 2), 1) for name in V1_DTYPES},
        "layer.0": {"layer.0.up": pattern(torch.float32, (16, 32), 2), "layer.0.down": pattern(torch.float32, (32, 16), 3)},
        "optimizer/layer.0": {"exp_avg": pattern(torch.float32, (2, 16, 32), 4), "step": torch.tensor(1.0)},
    }


def make(path: str) -> None:
    """Two kept generations, the second's writes without checksums. Flushed block by block: then each shard always has the same number."""
    with patch("secrets.token_hex", lambda nbytes: STORE), TierStore(nvme=path, **BUDGETS) as store:  # type: ignore[arg-type]
        for name, tensors in first().items():
            store.put(name, tensors)
            store.flush()
        store.put("Größe ../层", {"frozen": pattern(torch.float8_e4m3fn, (2, 5), 5)}, frozen=True)
        store.flush()
        store.put("bias", pattern(torch.float64, (9,), 6))
        store.flush()
        store.commit({"step": 1})
    with TierStore(nvme=path, checksum=False, **BUDGETS) as store:  # type: ignore[arg-type]
        store.write("layer.0", {"layer.0.up": pattern(torch.float32, (16, 32), 7), "layer.0.down": pattern(torch.float32, (32, 16), 8)})
        store.flush()
        store.write("optimizer/layer.0", {"exp_avg": pattern(torch.float32, (2, 16, 32), 9), "step": torch.tensor(2.0)})
        store.flush()
        store.commit({"step": 2, "note": "ä", "nested": [None, True, 0.1, {"deep": []}]})


def make_second(path: str, model: Path) -> None:
    """The same, with a block of the new dtypes and adopted ones. Of these, generation 3 has read none; 4 has read one and written one."""
    make(path)
    os.utime(model / "model.safetensors", ns=(MODIFIED_NS, MODIFIED_NS))
    with TierStore(nvme=path, **BUDGETS) as store:  # type: ignore[arg-type]
        store.put("new dtypes", {name: pattern(DTYPES[name], (3, 2), 2) for name in ("F4", "C64")})
        store.flush()
        store.adopt(model)
        store.commit({"step": 3})
        store.read("layers.0")
        store.write("layers.1", {"layers.1.weight": pattern(torch.float32, (5, 7), 11)})
        store.flush()
        store.commit({"step": 4})
    rename_model(Path(path), str(model), NOWHERE)


def rename_model(directory: Path, before: str, after: str) -> None:
    """Have the manifests of a closed store name the model elsewhere."""
    for path in directory.glob("manifest-*.json"):
        body = path.read_bytes()[:-32].replace(before.encode(), after.encode())
        path.write_bytes(body + f',"checksum":"{checksum(body):016x}"}}\n'.encode("ascii"))


def make_model(path: Path) -> None:
    """What is committed under `model/`: no tensor of it is aligned."""
    tensors = {f"layers.{layer}.weight": pattern(torch.float32, (5, 7), 20 + layer) for layer in range(2)}
    tensors |= {f"layers.{layer}.bias": pattern(torch.int8, (3,), 30 + layer) for layer in range(2)}
    path.mkdir()
    save_file({**tensors, "embed.weight": pattern(torch.bfloat16, (11, 3), 40), "scale": torch.tensor(0.5)}, path / "model.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "1":
        make(sys.argv[2])
    else:
        made = Path(sys.argv[2] + ".model")
        shutil.copytree(MODEL, made)
        make_second(sys.argv[2], made)
