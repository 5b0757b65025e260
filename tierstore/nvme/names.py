"""File names in a store's directory. Anything else in there is foreign.

No name holds a path separator or a dot but the one before its suffix, and none begins like a device of Windows (`con`, `nul`),
so nothing derived from a block's name can lead out of the directory.
"""

from __future__ import annotations

import re

LOCK = "tierstore.lock"
HOLDER = "tierstore.pid"
CURRENT = "CURRENT"
PROBE_NAME = "tierstore.probe"
TEMPORARY = ".tmp"
FIXED = frozenset({LOCK, HOLDER, CURRENT, CURRENT + TEMPORARY, PROBE_NAME})

MAX_SLUG = 40
_SHARD = re.compile(r"block-(?:[a-z0-9_-]{1,40}-)?([0-9]{8,16})\.safetensors")
_MANIFEST = re.compile(r"manifest-([0-9]{8,16})\.json(\.tmp)?")


def shard_name(block: str, number: int) -> str:
    """A file name that hints at the block and is unique by its running number."""
    slug = re.sub(r"[^a-z0-9_]+", "-", block.lower()).strip("-")[:MAX_SLUG].strip("-")
    return f"block-{slug}-{number:08d}.safetensors" if slug else f"block-{number:08d}.safetensors"


def manifest_name(generation: int) -> str:
    return f"manifest-{generation:08d}.json"


def shard_number(name: str) -> int | None:
    """The running number in a shard's name, or None if it is no such name."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match else None


def manifest_generation(name: str) -> int | None:
    """The generation in a finished manifest's name, or None."""
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match and not match[2] else None


def is_temporary(name: str) -> bool:
    return name.endswith(TEMPORARY) or name == PROBE_NAME


def is_ours(name: str) -> bool:
    return name in FIXED or _SHARD.fullmatch(name) is not None or _MANIFEST.fullmatch(name) is not None
