"""`benchmarks/generate.py`: all contenders generate the same tokens, and none goes missing. How fast any was is not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not installed

pytest.importorskip("transformers")

from benchmarks import generate  # noqa: E402 - the path is set only now


@pytest.mark.native_files
def test_all_generate_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "generate.json"
    arguments = ["--quick", "--device", "cpu", "--warm-up", "2", "--tokens", "3", "--dir", str(tmp_path), "--output", str(output)]
    assert generate.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "files are left behind"
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert set(report["rows"]) == set(generate.CONTENDERS)
    measured = {name: row for name, row in report["rows"].items() if row["error"] != "not installed"}
    assert {"tierstore-ram", "tierstore-disk", "resident"} <= set(measured)
    for row in measured.values():
        assert row["error"] is None
        assert len(row["tokens_s"]) == 3
        assert row["first_tokens"] == report["rows"]["resident"]["first_tokens"]
        assert row["quick"] is True
    for name, link in (("tierstore-ram", "h2d"), ("tierstore-disk", "nvme_read")):
        row = report["rows"][name]
        assert row["link"] == link
        assert 0 < row["bytes_per_token"] < 3 * report["bytes"]
        assert row["of_link"] > 0
    assert "tokens/s" in capsys.readouterr().out
