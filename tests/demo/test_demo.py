"""`tierstore demo` from the command line: it trains, is killed, goes on, ends, and its bits are those of plain torch."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tierstore.cli import main
from tierstore.demo import check, model, run, train
from tierstore.demo.record import LinkRecord, Record, TierRecord

# The fixtures' types stand in conftest.py, which tests cannot import.
Demo = Any


ROOT = Path(__file__).parents[2]


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in ours)


def test_a_run_with_check(uninterrupted: tuple[Demo, Any]) -> None:
    demo, result = uninterrupted
    assert result.exit_code == 0, result.output
    assert "1.12 MB in 18 blocks, 4.3 times the gpu tier" in result.output
    assert "step   6/6" in result.output
    assert "no tensor of the state, in 12 looks" in result.output
    assert "108 tensors of weights and optimizer state" in result.output
    assert "6 losses are bit-identical" in result.output
    drawn = (demo.directory / "demo.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 20_000
    assert sorted(path.name for path in demo.directory.iterdir()) == ["demo.png", "store"]


@pytest.mark.usefixtures("demo")
def test_a_finished_run_says_so(uninterrupted: tuple[Demo, Any]) -> None:
    finished, _ = uninterrupted
    again = finished()
    assert again.exit_code == 0
    assert "This run is finished: 6 of 6 steps. To train anew, add --fresh." in again.output
    assert "step   1/6" not in again.output


def test_a_killed_run_goes_on_to_the_same_bits(demo: Demo, uninterrupted: tuple[Demo, Any]) -> None:
    script = KILLED.format(settings=demo.settings)
    child = subprocess.run([sys.executable, "-c", script, str(demo.directory)], capture_output=True, text=True, check=False)
    assert child.returncode == -getattr(signal, "SIGKILL", -1), child.stderr
    result = demo()
    assert result.exit_code == 0, result.output
    assert "Going on from the commit of step 4" in result.output
    assert same_bits(demo.state(), uninterrupted[0].state())


KILLED = """
import os, signal, sys
from tierstore.cli import main
from tierstore.demo import run, train
from tierstore.demo.model import Config

for name, value in {settings!r}.items():
    setattr(run, name, value)
update = train.adamw
calls = 0

def adamw(*args, **kwargs):
    global calls
    calls += 1
    if calls == 5 * 6 + 3:  # in the middle of the update of step 5: some parts are ahead of others
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    update(*args, **kwargs)

train.adamw = adamw
main(["demo", "--device", "cpu", "--dir", sys.argv[1]])
"""


@pytest.mark.parametrize("policy", ["lru", "static"])
def test_other_policies_give_the_same_bits(demo: Demo, uninterrupted: tuple[Demo, Any], policy: str) -> None:
    result = demo("--policy", policy)
    assert result.exit_code == 0, result.output
    assert same_bits(demo.state(), uninterrupted[0].state())


def test_ctrl_c_ends_politely(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train.Trainer.step

    def interrupted(self: train.Trainer, index: int, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        if index == 3:
            raise KeyboardInterrupt
        return step(self, index, inputs, targets)

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    result = demo()
    assert result.exit_code == 130
    assert "Stopped. The last commit is that of step 2; the same command goes on from there." in result.output


def test_a_run_keeps_what_it_began_with(demo: Demo) -> None:
    assert demo("--steps", "2", "--seed", "1").exit_code == 0
    result = demo("--steps", "5")
    assert result.exit_code == 1
    assert "this run began with --steps 2: leave out --steps 5 to go on with it, or add --fresh" in result.output
    fresh = demo("--fresh", "--steps", "1")
    assert fresh.exit_code == 0, fresh.output
    assert "step   1/1" in fresh.output


def test_the_readme_s_three_commands(uninterrupted: tuple[Demo, Any], tiny: model.Config, tmp_path: Path) -> None:
    finished, _ = uninterrupted
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Looking at a store")[2]
    (block,) = re.findall(r"^```bash\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert [line[1] for line in lines] == ["inspect", "verify", "export"]
    for line in lines:
        places = {"tierstore-demo/store": str(finished.directory / "store"), "weights": str(tmp_path / "weights")}
        result = CliRunner().invoke(main, [places.get(word, word) for word in line[1:]])
        assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "weights").glob("*.safetensors")
    found = load_file(file)
    blocks = {name: tensor for name, tensor in finished.state().items() if not name.startswith(("gradients/", "optimizer/"))}
    assert same_bits(found, {name.partition("/")[2]: tensor for name, tensor in blocks.items()})
    assert set(found) == {f"{part}.{name}" for part in model.parts(tiny) for name in model.initial_weights(tiny, part)}


def test_a_difference_of_one_bit_is_found(uninterrupted: tuple[Demo, Any]) -> None:
    finished, _ = uninterrupted
    expected = {name: tensor for name, tensor in finished.state().items() if not name.startswith("gradients/")}
    with finished.open_store() as store:
        assert check.compare_blocks(store, expected) == []
        expected["layer1/layer1.qkv"].view(torch.int32)[5, 7] ^= 1
        (found,) = check.compare_blocks(store, expected)
        assert found.startswith("layer1/layer1.qkv differs in 1 of 3,072 numbers, by up to ")
        expected["layer1/extra"] = torch.zeros(2)
        assert check.compare_blocks(store, expected)[0].startswith("block layer1 holds")


def test_a_difference_fails_the_check(uninterrupted: tuple[Demo, Any], demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, _ = uninterrupted
    monkeypatch.setattr(run, "compare_with_plain", lambda *_: check.CheckResult(108, 1000, 6, ("x differs",), 1.0))
    result = finished("--check")
    assert result.exit_code == 1
    assert "CHECK FAILED in 1 places:\n  x differs" in result.output


def test_tiers_too_small_must_have_been_used() -> None:
    record = Record(run.DEFAULTS, "digest", state_bytes=1000)
    record.tiers = {"gpu": TierRecord(budget_bytes=500), "ram": TierRecord(budget_bytes=2000)}
    record.links = {"h2d": LinkRecord(bytes=1), "d2h": LinkRecord()}
    assert check.missing_traffic(record) == [
        "the state is 2.0 times the gpu tier, yet nothing was evicted from it",
        "the state is 2.0 times the gpu tier, yet no byte crossed d2h",
    ]


def test_a_directory_of_somebody_elses_store_is_left_alone(demo: Demo) -> None:
    with demo.open_store() as store:
        store.put("mine", torch.ones(3))
        store.commit({"precious": True})
    for arguments in ([], ["--fresh"]):
        result = demo(*arguments)
        assert result.exit_code == 1
        assert "this demo did not write" in result.output
    with demo.open_store() as store:
        assert "mine" in store


def test_a_wrong_size_is_one_line(demo: Demo) -> None:
    result = demo("--gpu", "7Gb")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "Traceback" not in result.output


def test_a_record_of_another_format_is_refused() -> None:
    record = Record(run.DEFAULTS, "digest", held_out=[(0, 5.5)])
    assert Record.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="format"):
        Record.from_json({**record.to_json(), "format": 99})
    broken = record.to_json()
    del broken["tiers"]
    with pytest.raises(ValueError, match="lacks"):
        Record.from_json(broken)
