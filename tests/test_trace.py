"""The recorder: bounded, in order, and back again from a file."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tierstore.residency import Tier
from tierstore.trace import Access, Kind, Link, Timeline, Trace, TransferEvent, WaitEvent

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def test_accesses_are_numbered_and_bounded() -> None:
    trace = Trace(keep=5)
    for number in range(12):
        trace.append(f"b{number}", number % 2 == 0, Tier.RAM)
    assert len(trace) == 5
    assert [access.index for access in trace] == [7, 8, 9, 10, 11]
    assert trace.num_accesses == 12
    assert list(trace)[-1] == Access(11, "b11", False, Tier.RAM)


@given(accesses=st.lists(st.tuples(NAMES, st.booleans(), st.sampled_from(Tier)), max_size=20))
def test_a_trace_comes_back_from_its_file(tmp_path_factory: object, accesses: list[tuple[str, bool, Tier]]) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"  # type: ignore[attr-defined]
    trace = Trace()
    for block, write, found in accesses:
        trace.append(block, write, found)
    trace.save(path)
    again = Trace.load(path)
    assert list(again) == list(trace)
    assert again.num_accesses == trace.num_accesses
    again.append("next", True, Tier.GPU)
    assert list(again)[-1].index == len(accesses)


def test_a_saved_trace_is_one_json_object_per_line(tmp_path: Path) -> None:
    trace = Trace()
    trace.append("a\nb", True, Tier.NVME)
    trace.append("ü", False, Tier.GPU)
    trace.save(tmp_path / "t")
    rows = [json.loads(line) for line in (tmp_path / "t").read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"index": 0, "block": "a\nb", "write": True, "found": "nvme"},
        {"index": 1, "block": "ü", "write": False, "found": "gpu"},
    ]


def test_a_trace_may_be_read_while_it_grows() -> None:
    trace, stop = Trace(keep=100), threading.Event()

    def grow() -> None:
        while not stop.is_set():
            trace.append("a", False, Tier.GPU)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        for _ in range(300):
            indices = [access.index for access in trace]
            assert indices == list(range(indices[0], indices[0] + len(indices))) if indices else True
    finally:
        stop.set()
        thread.join()


def test_the_timeline_is_bounded_and_can_be_saved(tmp_path: Path) -> None:
    timeline = Timeline(keep=3)
    for number in range(5):
        timeline.transfers.append(TransferEvent(Link.H2D, f"b{number}", Kind.DEMAND, 4096, number, number + 1, number + 2))
        timeline.waits.append(WaitEvent((f"b{number}",), "nvme", number, number + 1, "main"))
    events = timeline.events()
    assert [event.block for event in events if isinstance(event, TransferEvent)] == ["b2", "b3", "b4"]
    assert [event.blocks for event in events if isinstance(event, WaitEvent)] == [("b2",), ("b3",), ("b4",)]
    timeline.save(tmp_path / "timeline.json")
    assert json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))
