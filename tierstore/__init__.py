"""tierstore: PyTorch training state on three tiers, the GPU, page-locked RAM, and safetensors shards on NVMe."""

from tierstore.nvme.directory import Commit
from tierstore.store import AsyncCommitHandle, AsyncTierStore, BlockInfo, TensorInfo
from tierstore.sync import CommitHandle, TierStore

__all__ = ["AsyncCommitHandle", "AsyncTierStore", "BlockInfo", "Commit", "CommitHandle", "TensorInfo", "TierStore"]
__version__ = "0.1.0"
