"""tierstore: PyTorch training state on three tiers, the GPU, page-locked RAM, and safetensors shards on NVMe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierstore.nvme.directory import Commit
    from tierstore.store import AsyncCommitHandle, AsyncTierStore, BlockInfo, TensorInfo
    from tierstore.sync import CommitHandle, TierStore

__all__ = ["AsyncCommitHandle", "AsyncTierStore", "BlockInfo", "Commit", "CommitHandle", "TensorInfo", "TierStore"]
__version__ = "0.1.0"

# Where each name stands. It is imported when it is first asked for, so that commands which only read a directory need not wait for torch.
_HOMES = {
    "AsyncCommitHandle": "tierstore.store",
    "AsyncTierStore": "tierstore.store",
    "BlockInfo": "tierstore.store",
    "Commit": "tierstore.nvme.directory",
    "CommitHandle": "tierstore.sync",
    "TensorInfo": "tierstore.store",
    "TierStore": "tierstore.sync",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
