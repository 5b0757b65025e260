"""`benchmarks/commit.py`: that it runs, and counts what it says. How long anything took is not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import commit  # noqa: E402 - the path is set only now


def test_it_counts_bytes_and_disk(tmp_path: Path) -> None:
    output = tmp_path / "results" / "commit.json"
    assert commit.main(["--quick", "--dir", str(tmp_path), "--output", str(output)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "stores are left behind"
    parts = json.loads(output.read_text(encoding="utf-8"))["parts"]
    assert set(parts) == set(commit.PARTS)
    rows = [row for part in parts.values() for row in part["rows"]]
    bytes_beyond = [row for row in rows if row["unit"] == "bytes"]
    assert len(bytes_beyond) == 5
    assert all(row["repetitions"] == [0] * len(row["repetitions"]) for row in bytes_beyond)
    disk = [row for row in rows if row["unit"] == "x"]
    assert len(disk) == 8
    assert all(0 < row["value"] <= 1 for row in disk)
    for row in rows:
        if row["what"].startswith("commit(), of a step"):
            shares = [100 * commit_s / step_s for commit_s, step_s in zip(row["detail"]["commit_s"], row["detail"]["step_s"], strict=True)]
            assert row["repetitions"] == shares
