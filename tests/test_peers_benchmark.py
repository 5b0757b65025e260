"""`benchmarks/peers.py`: all train the same model on the same batches, and none goes missing. How fast any was is not looked at."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks import peers  # noqa: E402 - the path is set only now
from benchmarks.peers_parts import contenders, measure  # noqa: E402
from benchmarks.peers_parts.contenders import CONTENDERS  # noqa: E402
from benchmarks.peers_parts.measure import Row  # noqa: E402

QUICK = ["--quick", "--device", "cpu", "--warm-up", "1", "--steps", "1"]


def here(name: str, directory: Path) -> dict[str, Any]:
    """The row of a contender that is measured in this process."""
    path = directory / f"{name}.json"
    assert peers.main([*QUICK, "--only", name, "--dir", str(directory), "--json", str(path)]) == 0
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert row["error"] is None
    return row


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def report(directory: Path) -> dict[str, Any]:
    """FSDP2 in a process of its own, as all are; the store in this one, which saves seconds."""
    output = directory / "results" / "peers.json"
    assert peers.main([*QUICK, "--only", "fsdp2", "--dir", str(directory), "--output", str(output)]) == 0
    assert [path.name for path in directory.iterdir()] == ["results"], "files are left behind"
    call = json.loads(output.read_text(encoding="utf-8"))["rows"]["fsdp2"]["call"]
    row = Row(**here("tierstore", directory))
    peers.merged(output, row, call, small=True)
    loaded: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def untrained(directory: Path, report: dict[str, Any]) -> dict[str, Any]:
    return here("tierstore-inference", directory)


def test_rows_say_what_was_measured(report: dict[str, Any]) -> None:
    assert set(report["rows"]) == {"tierstore", "fsdp2"}
    assert report["machine"]["cpu_count"] >= 1
    for row in report["rows"].values():
        assert row["error"] is None
        assert row["quick"] is True
        assert row["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert len(row["steps"]) == 1
        assert row["tokens_per_s"] == pytest.approx(1024 / row["steps"][0])
        assert row["wall"] >= row["steps"][0] > 0
        assert min(row["memory"]["process peak"], row["memory"]["ram"]) > 50_000_000  # torch alone takes more
        assert len(row["losses"]) == 2
    assert report["tierstore and fsdp2"]["speed"] == pytest.approx(
        report["rows"]["tierstore"]["tokens_per_s"] / report["rows"]["fsdp2"]["tokens_per_s"]
    )


def test_all_train_the_same(report: dict[str, Any], untrained: dict[str, Any]) -> None:
    """The first loss is that of the same values and batch. The second shows the update: without one it would be `untrained`'s."""
    ours, theirs = (report["rows"][name]["losses"] for name in ("tierstore", "fsdp2"))
    assert ours[0] == pytest.approx(untrained["losses"][0], abs=2e-5)
    assert theirs == pytest.approx(ours, abs=2e-5)
    assert abs(ours[1] - untrained["losses"][1]) > 1e-4


@pytest.mark.parametrize("name", [name for name, contender in CONTENDERS.items() if contender.package == "accelerate"])
def test_accelerate_runs_the_same(name: str, directory: Path, untrained: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    assert here(name, directory)["losses"] == pytest.approx(untrained["losses"], abs=2e-5)


def test_values_do_not_depend_on_the_order_in_which_modules_are_filled() -> None:
    shape = contenders.SHAPES["tiny"]
    model = contenders.filled(shape, torch.device("cpu"))
    assert model.head.weight is model.embedding.weight
    again = contenders.filled(shape, torch.device("cpu"))
    draws = contenders.Draws(shape.layers)
    for name, module in reversed(list(again.named_modules())):
        draws(name, module)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(model.layers[0].up.weight, model.layers[1].up.weight)


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


def test_a_picture_shows_those_that_failed_too(tmp_path: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    failed = report["rows"]["fsdp2"] | {"name": "torchao", "tokens_per_s": None, "error": "no room\nat all"}
    with monkeypatch.context() as patched:
        patched.setattr(plt, "close", lambda figure: None)
        peers.draw({**report, "rows": {**report["rows"], "torchao": failed}}, tmp_path / "peers.png")
    texts = [text.get_text() for axis in plt.gcf().axes for text in axis.texts]
    plt.close("all")
    assert "no room" in texts
    assert f"{report['rows']['fsdp2']['tokens_per_s']:,.0f}" in texts
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_without_matplotlib_it_says_so(
    tmp_path: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.peers_parts.picture", None)
    monkeypatch.delattr("benchmarks.peers_parts.picture", raising=False)
    peers.draw(report, tmp_path / "peers.png")
    assert "matplotlib" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(CONTENDERS, "torchao", replace(CONTENDERS["torchao"], package="tierstore_has_no_such_package"))
    output = tmp_path / "peers.json"
    assert peers.main([*QUICK, "--only", "torchao", "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["rows"]["torchao"]["error"] == "not installed"
    printed = capsys.readouterr().out
    assert "not installed" in printed
    assert "fp32 masters" in printed


def test_what_fails_has_a_row_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("it does not fit")
        yield

    monkeypatch.setitem(CONTENDERS, "fsdp2", replace(CONTENDERS["fsdp2"], ready=too_large))
    row = measure.measure("fsdp2", peers.regime_of("fsdp2", quick=True), torch.device("cpu"), None, tmp_path, warm_up=0, steps=1)
    assert row.error == "OutOfMemoryError: it does not fit"
    assert row.tokens_per_s is None


def test_a_process_that_dies_has_a_row_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "dies.py"
    script.write_text("print('before'); print('no room', flush=True); raise SystemExit(3)", encoding="utf-8")
    monkeypatch.setattr(peers, "__file__", str(script))
    output = tmp_path / "peers.json"
    assert peers.main([*QUICK, "--only", "fsdp2", "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["rows"]["fsdp2"]["error"] == "ended with code 3: no room"
    assert report["tierstore and fsdp2"] is None


def test_a_process_that_hangs_is_ended() -> None:
    assert measure.run([sys.executable, "-c", "import time; time.sleep(600)"], 0.5).code is None


def test_page_locked_memory_that_is_not_resident_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    ram = measure.Ram(torch.device("cpu"))
    resident = iter([100, 300, 200])
    monkeypatch.setattr(measure, "resident_bytes", lambda: next(resident))
    monkeypatch.setattr(measure, "locked_by_torch", lambda _: 50)
    ram.look()
    ram.page_locked_is_resident = False
    ram.look()
    ram.look()
    assert ram.most_bytes == 350


def test_rows_of_two_calls_are_not_compared(report: dict[str, Any]) -> None:
    other = report["rows"]["fsdp2"] | {"call": "another"}
    assert peers.compared({**report["rows"], "fsdp2": other}) is None
    assert peers.compared(report["rows"]) == report["tierstore and fsdp2"]


def test_without_a_gpu_only_quick_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "peers.json"
    assert peers.main(["--device", "cpu", "--output", str(output)]) == 0
    assert "--quick" in capsys.readouterr().out
    assert not output.exists()
