"""File names in a store's directory. Anything else in there is foreign, but for what operating systems put everywhere.

No name holds a path separator or a dot but the one before its suffix, and none begins like a device of Windows (`con`, `nul`),
so nothing derived from a block's name can lead out of the directory. Each number is written in one way only, so that no two
files claim the same one.
"""

from __future__ import annotations

import re

from tierstore.errors import DirectoryError

LOCK = "tierstore.lock"
HOLDER = "tierstore.pid"
CURRENT = "CURRENT"
PROBE_NAME = "tierstore.probe"
TEMPORARY = ".tmp"
FIXED = frozenset({LOCK, HOLDER, CURRENT, CURRENT + TEMPORARY, PROBE_NAME})

IGNORED = frozenset(
    {
        ".ds_store",
        ".fseventsd",
        ".spotlight-v100",
        ".trashes",
        "desktop.ini",
        "thumbs.db",
        "lost+found",
        "system volume information",
        "$recycle.bin",
    }
)
"""What operating systems put into any directory that was looked at, or into the root of any drive, in lower case: some write these names
in several ways. They keep no store from opening, which never opens, counts or removes them."""

MAX_SLUG = 40
MAX_NUMBER = 10**16 - 1
"""What a name can carry, for shards and generations alike. Nobody gets there by committing."""

_SHARD = re.compile(r"block-(?:[a-z0-9_-]{1,40}-)?([0-9]{8,16})\.safetensors")
_MANIFEST = re.compile(r"manifest-([0-9]{8,16})\.json(\.tmp)?")


def shard_name(block: str, number: int) -> str:
    """A file name that hints at the block and is unique by its running number.

    Raises:
        DirectoryError: There are no more numbers.
    """
    _check(number, "shard")
    slug = re.sub(r"[^a-z0-9_]+", "-", block.lower()).strip("-")[:MAX_SLUG].strip("-")
    return f"block-{slug}-{number:08d}.safetensors" if slug else f"block-{number:08d}.safetensors"


def manifest_name(generation: int) -> str:
    """Likewise."""
    _check(generation, "generation")
    return f"manifest-{generation:08d}.json"


def shard_number(name: str) -> int | None:
    """The running number in a shard's name, or None if it is no such name."""
    return _number(_SHARD.fullmatch(name))


def manifest_generation(name: str) -> int | None:
    """The generation in a finished manifest's name, or None."""
    match = _MANIFEST.fullmatch(name)
    return None if match is None or match[2] else _number(match)


def is_temporary(name: str) -> bool:
    return name.endswith(TEMPORARY) or name == PROBE_NAME


def is_ignored(name: str) -> bool:
    """Whether it is as good as not there: see `IGNORED`."""
    return name.lower() in IGNORED


def is_ours(name: str) -> bool:
    return name in FIXED or shard_number(name) is not None or _number(_MANIFEST.fullmatch(name)) is not None


def _check(number: int, what: str) -> None:
    if number > MAX_NUMBER:
        raise DirectoryError(
            f"the directory has a {what} with the last number there is, so no other can be written",
            need=f"numbers up to {MAX_NUMBER}",
            have=number,
            remedy="close the store, remove the file of that number if no store made it, or move the blocks to another directory",
        )


def _number(match: re.Match[str] | None) -> int | None:
    """None also where the same number would be written otherwise, with fewer zeros."""
    if match is None:
        return None
    number = int(match[1])
    return number if match[1] == f"{number:08d}" else None
