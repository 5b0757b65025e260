"""What no policy can do better: lower bounds on the bytes that cross each link, and on time, with the whole sequence known.

Shares nothing with the store's policies or scheduler.

A block that is used at one lease and next at another was either kept in between, whole, or must be brought again. So each stretch between
two uses is an interval of so many bytes; at any moment the intervals that are kept and the blocks leased just then must fit
into the memory together; and the least that must be brought is what cannot be kept. If parts of blocks could be kept, dropping bytes
of the interval that ends last whenever there is too much keeps most (Belady's rule, byte by byte). Whole blocks cannot do better:
hence a lower bound for any sizes, and Belady's own count for blocks of one size leased one at a time.

- into the device (h2d): intervals between uses, memory = the device's;
- from NVMe: the same, memory = the device's and RAM's together, as what is on neither must come from NVMe;
- out of the device (d2h), and to NVMe: intervals from one write of a block to the next; what is not kept whole was written back.

What the memory holds at the start may be whatever is best, and what is dirty at the end need not be written: the bound stays one, though a
looser one. A period that repeats is therefore counted many times over.

Time: no less than the computing, nor than any link's bytes at its rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from tierstore.planner.simulate import LinkModel, Step
from tierstore.trace import Link

REPEAT = 12
"""Times that a repeating period is counted over, so that its beginning and end weigh little."""


@dataclass(frozen=True)
class Bound:
    """Per period: bytes by link, and nanoseconds."""

    bytes: Mapping[Link, float]
    ns: float


def least(
    periods: Sequence[Sequence[Step]],
    blocks: Mapping[str, int],
    *,
    gpu_bytes: int,
    ram_bytes: int,
    links: Mapping[Link, LinkModel],
    repeats: bool,
) -> Bound:
    """Lower bounds per period.

    Args:
        periods: The leases that count.
        repeats: The periods are all alike and go on for ever.
    """
    steps = [step for period in periods for step in period]
    count = len(periods)
    if repeats:
        steps, count = list(periods[0]) * REPEAT, REPEAT
    both = gpu_bytes + ram_bytes
    found = {
        Link.H2D: dropped(steps, blocks, gpu_bytes, writes=False),
        Link.NVME_READ: dropped(steps, blocks, both, writes=False),
        Link.D2H: dropped(steps, blocks, gpu_bytes, writes=True),
        Link.NVME_WRITE: dropped(steps, blocks, both, writes=True),
    }
    per_period = {link: found[link] / count for link in Link}
    compute_ns = sum(step.compute_ns for step in steps) / count
    return Bound(per_period, max(compute_ns, *(per_period[link] / links[link].bytes_per_s * 1e9 for link in Link)))


def dropped(steps: Sequence[Step], blocks: Mapping[str, int], capacity: int, *, writes: bool) -> int:
    """Bytes of intervals that cannot be kept.

    Args:
        writes: Intervals from write to write, of which those cut off by the beginning or the end do not count; else from use
            to use, and from the beginning to the first use.
    """
    ends: list[dict[str, int]] = [{} for _ in steps]  # at each step, the intervals that begin there: block -> step of its end
    opening: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in step.writes if writes else step.blocks:
            if name in last:
                ends[last[name]][name] = index
            elif not writes:
                opening[name] = index
            last[name] = index
    total = 0
    kept: dict[str, int] = {}
    heap = [(-end, name) for name, end in opening.items()]
    heapify(heap)
    kept |= {name: blocks[name] for name in opening}
    held = sum(kept.values())
    for index, step in enumerate(steps):
        for name in step.blocks:
            if name in kept and (not writes or name in step.writes):
                held -= kept.pop(name)  # it was there when it was needed, or what was left of it
        leased = set(step.blocks)
        # bytes leased now take room; an interval of a block that is leased in the middle of it (from write to write) is there already
        room = capacity - sum(blocks[name] for name in leased if name not in kept)
        while held > room:
            end, name = heap[0]
            if name not in kept or -end <= index:
                heappop(heap)
                continue
            gone = min(held - room, kept[name])
            total += gone
            held -= gone
            kept[name] -= gone
            if not kept[name]:
                heappop(heap)
                del kept[name]
        for name, end in ends[index].items():
            kept[name] = blocks[name]
            held += blocks[name]
            heappush(heap, (-end, name))
    return total
