"""The timeline as a trace file: it loads, keeps every event, and no lane holds two spans at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tierstore.monitor.perfetto import trace_document, write_perfetto


@dataclass(frozen=True)
class Transfer:
    link: str
    block: str
    kind: str
    nbytes: int
    queued_ns: int
    start_ns: int
    end_ns: int
    failed: bool = False


@dataclass(frozen=True)
class Wait:
    blocks: tuple[str, ...]
    cause: str
    start_ns: int
    end_ns: int
    thread: str


def spans(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["traceEvents"] if row["ph"] == "X"]


def lane_names(document: dict[str, Any]) -> dict[int, str]:
    return {row["tid"]: row["args"]["name"] for row in document["traceEvents"] if row["name"] == "thread_name"}


def test_a_file_that_loads(tmp_path: Path) -> None:
    base = 10**15  # clocks count from anywhere
    transfers = [
        Transfer("nvme_read", "w0", "demand", 8_000_000, base, base + 1_000, base + 2_001_000),
        Transfer("nvme_read", "w1", "prefetch", 8_000_000, base, base + 1_500, base + 4_001_000),
        Transfer("h2d", "lone \ud800 \0 \N{SNOWMAN}", "prefetch", 4096, base + 5_000, base + 5_000, base + 5_000, failed=True),
    ]
    waits = [Wait(("w0", "w1"), "nvme", base + 500, base + 4_001_500, "MainThread")]
    path = tmp_path / "timeline.json"
    write_perfetto(path, transfers, waits)
    document = json.loads(path.read_text(encoding="utf-8"))

    assert list(lane_names(document).values()) == ["h2d", "nvme_read", "nvme_read 2", "waits"]
    assert sorted(lane_names(document)) == list(lane_names(document))
    by_name = {row["name"]: row for row in spans(document)}
    assert set(by_name) == {"w0", "w1", "lone \ud800 \0 \N{SNOWMAN}", "nvme"}
    assert by_name["w0"]["ts"] == 1.0
    assert by_name["w0"]["dur"] == 2000.0
    assert by_name["w0"]["args"] == {"kind": "demand", "bytes": 8_000_000, "GB/s": 4.0, "queued for (us)": 1.0}
    assert by_name["nvme"]["args"] == {"blocks": ["w0", "w1"], "thread": "MainThread"}
    assert by_name["lone \ud800 \0 \N{SNOWMAN}"]["args"]["failed"] is True


def test_nothing_happened(tmp_path: Path) -> None:
    write_perfetto(tmp_path / "empty.json", [], [])
    document = json.loads((tmp_path / "empty.json").read_text(encoding="utf-8"))
    assert spans(document) == []


times = st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000)).map(sorted)


@given(
    transfers=st.lists(st.builds(lambda link, t: Transfer(link, "b", "demand", 1, *t), st.sampled_from(["h2d", "d2h", "odd"]), times)),
    waits=st.lists(st.builds(lambda t: Wait(("b",), "space", t[0], t[2], "main"), times)),
)
def test_lanes_never_overlap(transfers: list[Transfer], waits: list[Wait]) -> None:
    document = json.loads(json.dumps(trace_document(transfers, waits)))
    rows = spans(document)
    assert len(rows) == len(transfers) + len(waits)
    names = lane_names(document)
    for lane in names:
        inside = sorted((row["ts"], row["ts"] + row["dur"]) for row in rows if row["tid"] == lane)
        assert inside
        assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(inside))
        assert names[lane].split(" ")[0] in {row["cat"] for row in rows if row["tid"] == lane}
