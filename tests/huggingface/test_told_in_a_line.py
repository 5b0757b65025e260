"""What the system refuses comes out of every command as one line that names the place, never as a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from tests.huggingface import tokenizers
from tests.huggingface.folders import ram_for, save, weight_bytes
from tierstore import TierStore
from tierstore.cli import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by its old name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = save("llama", tmp_path / "model", vocab_size=tokenizers.VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tokenizers.make(folder)
    (tmp_path / "text.txt").write_text(tokenizers.texts()[0], encoding="utf-8")
    (tmp_path / "file").write_text("no directory", encoding="utf-8")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def budgets(folder: Path) -> list[object]:
    total = weight_bytes(folder)
    return ["--gpu", total // 2, "--ram", ram_for(total), "--device", "cpu"]


def finetune(folder: Path, **options: object) -> Result:
    place = folder.parent
    given = {"data": place / "text.txt", "nvme": place / "store", "output": place / "out", "steps": 2, "seq_len": 32, **options}
    given = {"batch": 2, "lora_rank": 2, "threads": 1, **given}
    more = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    return run("finetune", folder, *budgets(folder), *more)


@pytest.mark.parametrize("command", ["generate", "finetune"])
def test_a_folder_that_is_no_model(command: str, folder: Path, tmp_path: Path) -> None:
    """What is missing first is the model: its tokenizer alone would not help."""
    other = tmp_path / "other"
    other.mkdir()
    extra = ["--data", tmp_path / "text.txt", "--nvme", tmp_path / "store", "--output", tmp_path / "out"]
    more = ["text"] if command == "generate" else extra
    result = run(command, other, *more, *budgets(folder))
    check_one_line(result, "other has no config.json", "safetensors")
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    result = run("generate", folder, "text", *budgets(folder))
    check_one_line(result, "no tokenizer that can be used", "tokenizer.json there")
    assert len(result.stderr.splitlines()) == 1


def check_one_line(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), "a traceback"
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert "Errno" not in lines[-1]
    assert all(word in lines[-1] for word in words), lines[-1]


def failing(number: int, path: Path) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return fail


def test_a_place_that_is_below_a_file(folder: Path, tmp_path: Path) -> None:
    below = tmp_path / "file" / "below"
    check_one_line(run("generate", folder, "The", *budgets(folder), "--nvme", below), str(below), "Not a directory")
    check_one_line(finetune(folder, output=below), str(below))
    check_one_line(finetune(folder, nvme=below), str(below))
    check_one_line(finetune(folder, data=below), str(below))
    check_one_line(run("generate", below, "The", *budgets(folder)), str(below))
    check_one_line(run("demo", "--dir", below, "--steps", 1), str(below))
    for command in ("verify", "inspect"):
        check_one_line(run(command, below), str(below), code=2)
    with TierStore(gpu="64KiB", ram="256KiB", nvme=tmp_path / "swap", device="cpu") as store:
        store.put("a", torch.ones(3))
        store.commit()
    check_one_line(run("export", tmp_path / "swap", below), str(below), code=2)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EIO])
def test_what_the_system_refuses(number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, somewhere = os.strerror(number), tmp_path / "somewhere"
    with monkeypatch.context() as patch:
        patch.setattr("tierstore.huggingface.checkpoint.Checkpoint._read_json", failing(number, somewhere))
        check_one_line(run("generate", folder, "The", *budgets(folder)), said, str(somewhere))
        check_one_line(finetune(folder), said, str(somewhere))
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkdtemp", failing(number, somewhere))
        check_one_line(run("generate", folder, "The", *budgets(folder), "--nvme", tmp_path / "swap"), said, str(somewhere))
    with monkeypatch.context() as patch:
        patch.setattr("tierstore.finetune.data._text_of", failing(number, somewhere))
        check_one_line(finetune(folder), said, str(somewhere))
    with monkeypatch.context() as patch:
        patch.setattr("tierstore.finetune.record.StepLog.write", failing(number, somewhere))
        check_one_line(finetune(folder), said, str(somewhere))
    result = finetune(folder)  # and goes on when that is mended
    assert result.exit_code == 0, result.output


def test_a_drive_that_is_full_when_adapters_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", full)
        check_one_line(finetune(folder), str(folder.parent / "out"), "No space left")
    result = finetune(folder)
    assert result.exit_code == 0, result.output


def test_who_stops_reading_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierstore.huggingface.generating.from_pretrained", failing(errno.EPIPE, folder))
    result = run("generate", folder, "The", *budgets(folder))
    assert result.exit_code == 1
    assert "Error" not in result.stderr
