"""What a training step waited for most, why, and how to mend it: plain numbers in, a diagnosis out. Pure.

[Note: What a step spends its time on]
The host is stopped by the data loader and by the waits that the store counts; what is left is computing, as far as the host can
tell. Where the device orders work by itself (CUDA), the host is never stopped by a copy: the device is. So a copy link that was
busy for almost all of the step, at a rate that can be believed, stands for the time that would else be called computing, or for
the wait at the cap on leases in flight. A link that is "busy" far below its rate is not believed: its copies were queued
behind computing.

[Note: What a slow step is blamed on]
A step that took longer than usual is not explained by what every step waits for, but by what it waited for *beyond* that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tierstore.units import LinkRates, format_bytes, format_duration, format_rate

__all__ = ["Cause", "Diagnosis", "Expected", "LinkUse", "StepFacts", "Usual", "Wait", "diagnose", "split"]

WORTH_NAMING = 0.05
"""Waits of less than this share of a step are not what makes it slow."""
WORTH_MENDING = 0.2
"""From this share on a line is a warning."""
LINK_BOUND = 0.8
"""A copy link busy for this share of a step limits it, if nothing else does."""
BELIEVED = 0.4
"""A link that was under way so long, and carried less than this share of what it could have, was queued behind something else."""
PAGEABLE_SHARE = 0.05
"""Less of the RAM tier than this, pageable, is not what makes its copies slow."""
SMALL_TRANSFER_BYTES = 1 << 20
"""Transfers shorter than this reach at most half of a link's rate (measured: 27 of 54 GB/s)."""


class Wait(StrEnum):
    """What a step spends time on. Those that the store counts have the names of `WaitEvent.cause`."""

    LOADER = "data loader"
    NVME = "nvme"
    SPACE = "space"
    LEASE = "lease"
    COMMIT = "commit"
    COPY = "copy"
    RUN_AHEAD = "run-ahead"
    COMPUTING = "computing"


class Cause(StrEnum):
    """Why it waits."""

    DIRECT_IO_OFF = "direct I/O is off"
    DRIVE_SLOW = "the drive is slower than expected"
    SMALL_BLOCKS = "small blocks"
    DRIVE_RATE = "the drive's rate"
    PAGEABLE = "pageable copies"
    PAGE_LOCKING_CAPPED = "page-locking is capped"
    SMALL_BATCH = "too small a batch"
    LOADER = "the data loader"
    LEASES = "leases of others"
    RUN_AHEAD = "the cap on run-ahead"
    COMMITS = "commits"
    SPACE = "no room on the device"
    COMPUTING = "computing"
    OUTSIDE = "nothing that the store can see"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one link did during a step.

    Attributes:
        bytes, transfers: Carried within it.
        busy_s: Seconds during which at least one transfer was under way.
        best_bytes_per_s: Of the fastest transfer.
    """

    bytes: float = 0.0
    transfers: int = 0
    busy_s: float = 0.0
    best_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Usual:
    """The median step so far: its seconds, and those of each of its waits, as `split` names them."""

    seconds: float
    spent: Mapping[str, float] = field(default_factory=dict)
    commits: float = 0.0


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one step did.

    Attributes:
        seconds: Its duration, the data loader's time included.
        loader_s: Seconds spent in `next(loader)`.
        waits: Seconds the store had callers wait, by cause as in `WaitEvent.cause`.
        links: By name, as in `Stats.links`.
        commits: Generations made in it.
        device_ordered: The device orders work by itself (CUDA): the host does not wait for copies.
        direct_io: As in `Stats`.
        page_locked_bytes, ram_bytes: Of the RAM tier, and all of it.
        usual: What it is slower than; None for a step that is looked at for its own sake.
    """

    seconds: float
    loader_s: float = 0.0
    waits: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, LinkUse] = field(default_factory=dict)
    commits: int = 0
    device_ordered: bool = False
    direct_io: bool | None = None
    page_locked_bytes: int = 0
    ram_bytes: int = 0
    usual: Usual | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """How fast the links should be, and how sure that is.

    Attributes:
        rates: Measured by a probe of this machine; or, by default, planning rates of a laptop with a PCIe 4 drive.
        probed: They were measured. Then a link that stays below 70 % of its rate is called slow; else one below 40 %, because
            sound older drives reach half of the planning rate.
    """

    rates: LinkRates = field(default_factory=LinkRates)
    probed: bool = False

    @property
    def least_share(self) -> float:
        return 0.7 if self.probed else 0.4

    @property
    def source(self) -> str:
        return "probed" if self.probed else "planned for"

    def seconds(self, link: str, nbytes: float) -> float:
        """How long a link of the name should take for so many bytes."""
        return nbytes / float(getattr(self.rates, f"{link}_bytes_per_s"))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a step waited for most.

    Attributes:
        wait: A `Wait`, or a cause of the store's that this module does not know.
        cause: Why.
        detail: The numbers that say so.
        remedy: What to do about it; empty where nothing is wrong.
        seconds: Of the wait.
        share: Of the step, at most 1.
    """

    wait: str
    cause: Cause
    detail: str
    remedy: str
    seconds: float
    share: float

    @property
    def level(self) -> int:
        """How the line is to be logged: as a warning where the store, or its use, has something to gain."""
        known = self.remedy and self.cause is not Cause.OUTSIDE
        return logging.WARNING if known and self.share >= WORTH_MENDING else logging.INFO

    def __str__(self) -> str:
        wait = _PHRASES.get(self.wait, f"waiting for {self.wait!r}")
        text = f"{format_duration(self.seconds)} ({self.share:.0%}) {wait}; cause: {self.cause} ({self.detail})"
        return f"{text}. To mend it: {self.remedy}" if self.remedy else text


_PHRASES: dict[str, str] = {
    Wait.LOADER: "waiting for a batch",
    Wait.NVME: "waiting for bytes from NVMe",
    Wait.SPACE: "waiting for room on the device",
    Wait.LEASE: "waiting for leases of others",
    Wait.COMMIT: "waiting for a commit",
    Wait.COPY: "waiting for copies between RAM and device",
    Wait.RUN_AHEAD: "waiting for the device at the cap on leases in flight",
    Wait.COMPUTING: "computing",
}


def diagnose(step: StepFacts, expected: Expected | None = None) -> Diagnosis:
    """Name what a step waited for most, and why. See the Notes above."""
    expected = expected if expected is not None else Expected()
    spent = split(step, expected)
    wait = _top(step, spent)
    seconds = spent.get(wait, 0.0)
    explain = _EXPLANATIONS.get(wait, _explain_unknown)
    cause, detail, remedy = explain(step, seconds, expected)
    return Diagnosis(wait, cause, detail, remedy, seconds, min(1.0, seconds / step.seconds) if step.seconds > 0 else 0.0)


def split(step: StepFacts, expected: Expected | None = None) -> dict[str, float]:
    """Seconds of a step by what they were spent on. See [Note: What a step spends its time on].

    Waits of several threads at once may add up to more than the step.
    """
    spent: dict[str, float] = {str(cause): seconds for cause, seconds in step.waits.items() if seconds > 0}
    if step.loader_s > 0:
        spent[Wait.LOADER] = step.loader_s
    stopped_s = sum(spent.values()) - spent.get(Wait.RUN_AHEAD, 0.0)
    copying_s = _limiting_link(step, expected if expected is not None else Expected())[1] - stopped_s
    if copying_s > WORTH_NAMING * step.seconds:
        spent.pop(Wait.RUN_AHEAD, None)
        spent[Wait.COPY] = spent.get(Wait.COPY, 0.0) + copying_s
    spent[Wait.COMPUTING] = max(0.0, step.seconds - sum(spent.values()))
    return spent


def _limiting_link(step: StepFacts, expected: Expected) -> tuple[str, float]:
    """The copy link that the device waited for, and the seconds during which it was busy; no seconds where there is none."""
    link = max(("h2d", "d2h"), key=lambda name: step.links.get(name, LinkUse()).busy_s)
    use = step.links.get(link, LinkUse())
    if not step.device_ordered or use.busy_s < LINK_BOUND * step.seconds:
        return link, 0.0
    # What one transfer has reached, the link can do, whatever was planned for.
    should_s = min(expected.seconds(link, use.bytes), use.bytes / use.best_bytes_per_s if use.best_bytes_per_s > 0 else math.inf)
    # Pageable copies are slow by their nature: their rate is no reason for doubt.
    believed = _pageable_share(step) > PAGEABLE_SHARE or should_s >= BELIEVED * use.busy_s
    return link, min(step.seconds, use.busy_s) if believed else 0.0


def _pageable_share(step: StepFacts) -> float:
    return 1 - step.page_locked_bytes / step.ram_bytes if step.device_ordered and step.ram_bytes else 0.0


def _top(step: StepFacts, spent: Mapping[str, float]) -> str:
    """See [Note: What a slow step is blamed on]."""
    usual = step.usual
    if usual is None:
        wait = max((name for name in spent if name != Wait.COMPUTING), key=lambda name: spent[name], default=Wait.COMPUTING)
        return wait if spent[wait] >= WORTH_NAMING * step.seconds else Wait.COMPUTING
    beyond = {name: seconds - usual.spent.get(name, 0.0) for name, seconds in spent.items()}
    if step.device_ordered and Wait.COPY in spent:  # in other steps it was not told apart from these
        beyond[Wait.COPY] -= usual.spent.get(Wait.COMPUTING, 0.0) + usual.spent.get(Wait.RUN_AHEAD, 0.0)
    return max(beyond, key=lambda name: beyond[name])


# -- why -----------------------------------------------------------------------------------------------------------------

Explanation = tuple[Cause, str, str]
"""Cause, detail, remedy."""


def _explain_loader(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    detail = f"next(loader) took {format_duration(seconds)} of {format_duration(step.seconds)}"
    remedy = "have it prepare batches ahead in workers (num_workers=, prefetch_factor=), or prepare the data once beforehand"
    return Cause.LOADER, detail, remedy


def _explain_drive(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    read, write = step.links.get("nvme_read", LinkUse()), step.links.get("nvme_write", LinkUse())
    nbytes, transfers, busy_s = read.bytes + write.bytes, read.transfers + write.transfers, max(read.busy_s, write.busy_s)
    rate = f"{format_bytes(nbytes)} at {format_rate(nbytes / busy_s)}" if busy_s > 0 else f"{format_bytes(nbytes)}"
    if step.direct_io is False:
        remedy = (
            'put nvme= on a file system that takes direct I/O (ext4, XFS, NTFS; not tmpfs, overlay or network), and leave direct_io="auto"'
        )
        return Cause.DIRECT_IO_OFF, f"every byte goes through the page cache: {rate}", remedy
    # A drive may serve reads and writes one after the other, so the time it should take is their sum.
    should_s = expected.seconds("nvme_read", read.bytes) + expected.seconds("nvme_write", write.bytes)
    if busy_s > 0 and should_s < expected.least_share * busy_s:
        rate += f", {format_rate(nbytes / should_s)} {expected.source}" if should_s > 0 else ""
        if nbytes < SMALL_TRANSFER_BYTES * transfers:
            return _small_blocks(nbytes / transfers, rate)
        remedy = "see what else uses the drive, how full and hot it is, and its PCIe lanes; or raise ram= so that less comes from it"
        return Cause.DRIVE_SLOW, rate, remedy
    remedy = "raise ram= so that less comes from the drive, or compute more for each byte: a larger batch, or more accumulation"
    return Cause.DRIVE_RATE, rate, remedy


def _small_blocks(mean_bytes: float, rate: str) -> Explanation:
    return (
        Cause.SMALL_BLOCKS,
        f"{format_bytes(mean_bytes)} a transfer: {rate}",
        "put tensors that are used together into one block, of 16 MB or more; for an attached model, raise gpu=",
    )


def _explain_copies(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    pageable = _pageable_share(step)
    ram, locked = format_bytes(step.ram_bytes), format_bytes(step.page_locked_bytes)
    if pageable > PAGEABLE_SHARE and not step.page_locked_bytes:
        remedy = 'open the store with page_locked="auto"; where the driver refuses all of it, lower ram= or end what else locks memory'
        return Cause.PAGEABLE, f"nothing of the RAM tier's {ram} is page-locked", remedy
    if pageable > PAGEABLE_SHARE:
        remedy = (
            f"lower ram= to about {locked}, or end what else locks memory (Windows allows well under half of it to all programs together)"
        )
        return Cause.PAGE_LOCKING_CAPPED, f"only {locked} of the RAM tier's {ram} are page-locked", remedy
    link = max(("h2d", "d2h"), key=lambda name: step.links.get(name, LinkUse()).busy_s)
    use = step.links.get(link, LinkUse())
    moved = f"{link} carried {format_bytes(use.bytes)}" + (f" at {format_rate(use.bytes / use.busy_s)}" if use.busy_s > 0 else "")
    slow = expected.seconds(link, use.bytes) < expected.least_share * use.busy_s
    if slow and use.transfers and use.bytes < SMALL_TRANSFER_BYTES * use.transfers:
        return _small_blocks(use.bytes / use.transfers, moved)
    remedy = (
        "a larger batch, or accumulate gradients over several, so that computing covers the copies; or raise gpu= so that less is copied"
    )
    return Cause.SMALL_BATCH, f"{moved}, more than computing covers", remedy


def _explain_space(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    write = step.links.get("nvme_write", LinkUse())
    if write.busy_s >= seconds / 2:  # RAM is full of what the drive has yet to take
        return _explain_drive(step, seconds, expected)
    out = step.links.get("d2h", LinkUse())
    detail = f"others had to leave first: d2h carried {format_bytes(out.bytes)}"
    return Cause.SPACE, detail, "raise gpu=, lease fewer or smaller blocks at once, and let go of leases before taking the next"


def _explain_leases(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    detail = "another thread or task had the block, or leases that filled the device"
    return Cause.LEASES, detail, "let go of leases sooner, or use what several threads need in turn"


def _explain_commits(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    write = step.links.get("nvme_write", LinkUse())
    detail = f"what is to be written must be saved first: nvme_write carried {format_bytes(write.bytes)}"
    return Cause.COMMITS, detail, "commit less often; commit(wait=False) right after the optimizer's step overlaps best"


def _explain_run_ahead(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    return Cause.RUN_AHEAD, f"the device is busy and behind the host{_queued(step)}", ""


def _explain_computing(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    usual = step.usual
    if usual is None:
        return Cause.COMPUTING, f"all waits together take {_share(step.seconds - seconds, step.seconds)} of the step{_queued(step)}", ""
    more = format_duration(step.seconds - usual.seconds)
    beyond = f"of {more} more than the median most was spent in no wait that the store counts"
    if step.commits > usual.commits:
        detail = f"a commit was made in it, and {beyond}"
        return Cause.COMMITS, detail, "commit less often, or commit(wait=False)"
    remedy = "see whether its batch was larger, and what else used the machine: other programs, evaluation, garbage collection, heat"
    return Cause.OUTSIDE, beyond, remedy


def _explain_unknown(step: StepFacts, seconds: float, expected: Expected) -> Explanation:
    return Cause.UNKNOWN, "the store gives no other reason", "see store.timeline.save() for what happened meanwhile"


def _queued(step: StepFacts) -> str:
    """Copies that seem to be under way all the time, and may be only queued."""
    for link in ("h2d", "d2h"):
        use = step.links.get(link, LinkUse())
        if step.device_ordered and use.busy_s >= LINK_BOUND * step.seconds > 0:
            return f"; {link} had copies under way all the time, {format_rate(use.bytes / use.busy_s)}"
    return ""


def _share(part: float, whole: float) -> str:
    return f"{max(0.0, part) / whole:.0%}" if whole > 0 else "0%"


_EXPLANATIONS: dict[str, Callable[[StepFacts, float, Expected], Explanation]] = {
    Wait.LOADER: _explain_loader,
    Wait.NVME: _explain_drive,
    Wait.SPACE: _explain_space,
    Wait.LEASE: _explain_leases,
    Wait.COMMIT: _explain_commits,
    Wait.COPY: _explain_copies,
    Wait.RUN_AHEAD: _explain_run_ahead,
    Wait.COMPUTING: _explain_computing,
}
