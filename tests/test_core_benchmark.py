"""`benchmarks/core.py`: that it runs, counts what it says it counts, and keeps it. How fast anything was is not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import core  # noqa: E402 - the path is set only now


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("bench")
    assert core.main(["--quick", "--dir", str(directory), "--output", str(directory / "results" / "core.json")]) == 0
    assert [path.name for path in directory.iterdir()] == ["results"], "stores or bare files are left behind"
    loaded: dict[str, Any] = json.loads((directory / "results" / "core.json").read_text(encoding="utf-8"))
    return loaded


def rows_of(report: dict[str, Any], part: str) -> dict[str, Any]:
    return {row["what"]: row for row in report["parts"][part]["rows"]}


def test_it_records_machine_versions_and_every_repetition(report: dict[str, Any]) -> None:
    assert set(report["parts"]) == set(core.PARTS)
    assert report["machine"]["cpu_count"] >= 1
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0] or report["versions"]["torch"] == torch.__version__
    for part in report["parts"].values():
        assert part["quick"] is True
        assert part["device"] == "cpu"
        assert part["rows"]
        for row in part["rows"]:
            assert row["repetitions"]
            assert min(row["repetitions"]) <= row["value"] <= max(row["repetitions"])
            assert (row["met"] is None) == (row["target"] == "")


def test_it_counts_what_it_says(report: dict[str, Any]) -> None:
    assert all(row["detail"]["leases"] == 48 for what, row in rows_of(report, "use").items() if what.startswith("use()"))
    assert rows_of(report, "million")["Python objects gained over the last half"]["detail"]["accesses"] == 6_000
    assert len(rows_of(report, "scale")) == 12
    for row in rows_of(report, "scale").values():
        ratios = [large / small for large, small in zip(row["detail"]["large_us"], row["detail"]["small_us"], strict=True)]
        assert row["repetitions"] == pytest.approx(ratios)
    for part in ("drive", "copies"):
        for row in rows_of(report, part).values():
            mine, bare = row["detail"]["store_bytes_per_s"], row["detail"]["bare_bytes_per_s"]
            assert row["repetitions"] == pytest.approx([one / other for one, other in zip(mine, bare, strict=True)])
    assert {row["detail"]["blocks"] for row in rows_of(report, "drive").values()} == {8, 4}


def test_named_parts_only_are_measured_anew(tmp_path: Path) -> None:
    output = tmp_path / "core.json"
    for part in ("waiters", "use"):
        assert core.main(["--quick", "--part", part, "--dir", str(tmp_path), "--output", str(output)]) == 0
    assert set(json.loads(output.read_text(encoding="utf-8"))["parts"]) == {"waiters", "use"}


def test_without_a_gpu_cuda_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "core.json"
    assert core.main(["--quick", "--device", "cuda", "--output", str(output)]) == 0
    assert not output.exists()
