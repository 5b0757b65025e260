"""Makes the store that stands for a version of the format: `python -m tests.golden.make DIR`.

What is committed under `v1/` was made by this, and is never made anew once it is released: a store of today must open what a store
of then wrote.
A new version of the format gets a directory of its own beside it.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

import torch

from tierstore import TierStore
from tierstore.tiers.device import DTYPES

STORE = "7165727473726569"
"""Which store it is: drawn, but for this one."""

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
        "every dtype": {name: pattern(dtype, (3, 2), 1) for name, dtype in DTYPES.items()},
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


if __name__ == "__main__":
    make(sys.argv[1])
