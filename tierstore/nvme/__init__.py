"""The NVMe tier: a directory of shards that is also the checkpoint."""
