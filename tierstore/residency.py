"""The legal states of one block's copy on one memory tier, as a single table.

Pure: the scheduler applies events, the table says what they lead to, and a pair that is missing raises.
"""

from __future__ import annotations

from enum import Enum, StrEnum


class Tier(StrEnum):
    """Where bytes live. Ordered from fast to large."""

    GPU = "gpu"
    RAM = "ram"
    NVME = "nvme"


class State(Enum):
    """What one tier holds of one block.

    `CLEAN` means that a lower tier holds the same bytes; on the lowest tier of a store without NVMe every valid copy is
    `CLEAN`. `STALE` is an extent kept for the next write-back whose bytes are out of date and never served.
    """

    __hash__ = object.__hash__  # members are looked up in every burst, and an Enum's own hash is Python code

    ABSENT = "absent"
    RESERVED = "reserved"
    LOADING = "loading"
    CLEAN = "clean"
    DIRTY = "dirty"
    SAVING = "saving"
    STALE = "stale"


class Event(Enum):
    """What happens to a copy."""

    __hash__ = object.__hash__  # as in `State`

    RESERVE = "reserve"  # an extent was allocated, nothing is arriving yet
    LOAD = "load"  # bytes are on their way into the extent
    LOADED = "loaded"  # they arrived, and a lower tier holds them too
    CREATED = "created"  # they arrived, and no lower tier holds them
    LOAD_FAILED = "load failed"
    OUTDATED = "outdated"  # they arrived, but the block was written meanwhile
    WRITE = "write"  # the bytes were changed in place
    SAVE = "save"  # a copy to the tier below was ordered
    SAVED = "saved"
    SAVE_FAILED = "save failed"
    SUPERSEDE = "supersede"  # a higher copy was written; this one is out of date
    DROP = "drop"  # give the extent back; the bytes are elsewhere
    DISCARD = "discard"  # give the extent back; nobody wants the bytes: deleted or replaced


VALID = frozenset({State.CLEAN, State.DIRTY, State.SAVING})
"""States whose bytes are the newest and complete."""

# DROP is absent for DIRTY and SAVING on purpose: bytes with no other copy cannot be dropped.
NEXT: dict[tuple[State, Event], State] = {
    (State.ABSENT, Event.RESERVE): State.RESERVED,
    (State.RESERVED, Event.LOAD): State.LOADING,
    (State.RESERVED, Event.WRITE): State.DIRTY,  # nothing was loaded: whoever leases it writes all of it
    (State.RESERVED, Event.DROP): State.ABSENT,
    (State.RESERVED, Event.DISCARD): State.ABSENT,
    (State.LOADING, Event.LOADED): State.CLEAN,
    (State.LOADING, Event.CREATED): State.DIRTY,
    (State.LOADING, Event.OUTDATED): State.STALE,
    (State.LOADING, Event.LOAD_FAILED): State.RESERVED,
    (State.CLEAN, Event.WRITE): State.DIRTY,
    (State.CLEAN, Event.SUPERSEDE): State.STALE,
    (State.CLEAN, Event.DROP): State.ABSENT,
    (State.CLEAN, Event.DISCARD): State.ABSENT,
    (State.DIRTY, Event.WRITE): State.DIRTY,
    (State.DIRTY, Event.SAVE): State.SAVING,
    (State.DIRTY, Event.SUPERSEDE): State.STALE,
    (State.DIRTY, Event.DISCARD): State.ABSENT,
    (State.SAVING, Event.SAVED): State.CLEAN,
    (State.SAVING, Event.SAVE_FAILED): State.DIRTY,
    (State.SAVING, Event.WRITE): State.DIRTY,
    (State.SAVING, Event.SUPERSEDE): State.STALE,
    (State.STALE, Event.LOAD): State.LOADING,
    (State.STALE, Event.WRITE): State.DIRTY,
    (State.STALE, Event.DROP): State.ABSENT,
    (State.STALE, Event.DISCARD): State.ABSENT,
}


def step(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        AssertionError: The pair is not in the table, which is a bug of the caller.
    """
    try:
        return NEXT[state, event]
    except KeyError:
        raise AssertionError(f"a copy that is {state.value} cannot take the event {event.value!r}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.ABSENT.value}"]
    lines += [f"    {source.value} --> {target.value}: {event.value}" for (source, event), target in NEXT.items()]
    return "\n".join(lines)
