"""The memory tiers: arenas of bytes, and the tensors that lie in them."""
