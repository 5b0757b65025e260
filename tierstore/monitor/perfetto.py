"""Writes transfers and waits as a trace that https://ui.perfetto.dev and chrome://tracing open.

Imports nothing of tierstore: it takes any objects that have the attributes named here, so what records events may save them.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

LINK_ORDER = ("h2d", "d2h", "nvme_read", "nvme_write")
"""Lanes stand in this order; a link of another name comes after these."""

_PROCESS = 1
_LANES_PER_GROUP = 1000
_NS_PER_US = 1000


class Span(Protocol):
    """Something that took time, in nanoseconds of one clock."""

    @property
    def start_ns(self) -> int: ...

    @property
    def end_ns(self) -> int: ...


class TransferLike(Span, Protocol):
    """One transfer over a link; also `failed`, where the object has it."""

    @property
    def link(self) -> str: ...

    @property
    def block(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def queued_ns(self) -> int: ...


class WaitLike(Span, Protocol):
    """A caller that waited for blocks."""

    @property
    def blocks(self) -> Sequence[str]: ...

    @property
    def cause(self) -> str: ...

    @property
    def thread(self) -> str: ...


_S = TypeVar("_S", bound=Span)


def write_perfetto(path: str | os.PathLike[str], transfers: Iterable[TransferLike], waits: Iterable[WaitLike]) -> None:
    """Write `trace_document` to a file, replacing it."""
    text = json.dumps(trace_document(transfers, waits))  # ASCII: names with lone surrogates or NULs pass through escaped
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def trace_document(transfers: Iterable[TransferLike], waits: Iterable[WaitLike]) -> dict[str, Any]:
    """The trace as a JSON object: one lane per link, and one for waits; time 0 is the first thing that happened.

    Transfers over one link may overlap, and so may waits of several threads. The format has no way to show two spans of one lane
    that overlap without one containing the other, so the later one goes to a further lane ("nvme_read 2") directly below.
    """
    transfers, waits = list(transfers), list(waits)
    origin_ns = min([event.queued_ns for event in transfers] + [event.start_ns for event in waits], default=0)
    used = {str(event.link) for event in transfers}
    links = [link for link in LINK_ORDER if link in used] + sorted(used.difference(LINK_ORDER))
    rows: list[dict[str, Any]] = [_name("process_name", 0, {"name": "tierstore"})]
    for group, link in enumerate(links, start=1):
        spans = [(lane, transfer, *_describe_transfer(transfer)) for lane, transfer in _lanes(t for t in transfers if str(t.link) == link)]
        rows += _lane_rows(link, group, spans, origin_ns)
    rows += _lane_rows("waits", len(links) + 1, [(lane, wait, *_describe_wait(wait)) for lane, wait in _lanes(waits)], origin_ns)
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _lanes(events: Iterable[_S]) -> Iterator[tuple[int, _S]]:
    """Give each event the lowest lane that is free when it starts."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    opened = 0
    for event in sorted(events, key=lambda event: (event.start_ns, event.end_ns)):
        while busy and busy[0][0] <= event.start_ns:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, opened = opened, opened + 1
        heapq.heappush(busy, (event.end_ns, lane))
        yield lane, event


def _lane_rows(name: str, group: int, spans: list[tuple[int, _S, str, dict[str, Any]]], origin_ns: int) -> Iterator[dict[str, Any]]:
    for lane in sorted({span[0] for span in spans}):
        thread = group * _LANES_PER_GROUP + lane
        yield _name("thread_name", thread, {"name": name if lane == 0 else f"{name} {lane + 1}"})
        yield _name("thread_sort_index", thread, {"sort_index": thread})
    for lane, event, title, details in spans:
        yield {
            "ph": "X",
            "name": title,
            "cat": name,
            "pid": _PROCESS,
            "tid": group * _LANES_PER_GROUP + lane,
            "ts": (event.start_ns - origin_ns) / _NS_PER_US,
            "dur": (event.end_ns - event.start_ns) / _NS_PER_US,
            "args": details,
        }


def _name(what: str, thread: int, details: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": thread, "args": details}


def _describe_transfer(event: TransferLike) -> tuple[str, dict[str, Any]]:
    duration_ns = event.end_ns - event.start_ns
    details = {
        "kind": str(event.kind),
        "bytes": event.nbytes,
        "GB/s": round(event.nbytes / duration_ns, 3) if duration_ns > 0 else None,
        "queued for (us)": (event.start_ns - event.queued_ns) / _NS_PER_US,
    }
    if getattr(event, "failed", False):
        details["failed"] = True
    return event.block, details


def _describe_wait(event: WaitLike) -> tuple[str, dict[str, Any]]:
    return event.cause, {"blocks": list(event.blocks), "thread": event.thread}
