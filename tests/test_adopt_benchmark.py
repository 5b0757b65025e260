"""`benchmarks/adopt.py`: that it runs, counts what it says it counts, and keeps it. How fast anything was is not looked at."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import adopt  # noqa: E402 - the path is set only now


@pytest.mark.native_files
def test_it_runs_and_keeps_what_it_measures(tmp_path: Path) -> None:
    if not hasattr(os, "preadv"):
        pytest.skip("the bare loop reads with preadv")
    output = tmp_path / "results" / "adopt.json"
    assert adopt.main(["--quick", "--dir", str(tmp_path), "--output", str(output)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "stores or models are left behind"
    report = json.loads(output.read_text(encoding="utf-8"))
    assert set(report["parts"]) == set(adopt.PARTS)
    for part in report["parts"].values():
        assert len(part["rows"]) == 4
        for row in part["rows"]:
            detail = row["detail"]
            pairs = zip(detail["store_bytes_per_s"], detail["bare_bytes_per_s"], strict=True)
            assert row["repetitions"] == pytest.approx([mine / theirs for mine, theirs in pairs])
            assert detail["blocks"] == 4
            assert detail["requests"] >= detail["blocks"]
            assert detail["read_bytes"] >= 0.9 * detail["model_bytes"]


def test_the_committed_results_say_what_was_measured() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "adopt-cpu.json").read_text(encoding="utf-8"))
    assert report["machine"]["cpu_count"] >= 1
    for part in report["parts"].values():
        assert part["quick"] is False
        assert all(row["repetitions"] for row in part["rows"])
