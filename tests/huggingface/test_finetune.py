"""`tierstore finetune`: killed and gone on with to the same bits, what it writes, what counts in its data, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.huggingface import tokenizers
from tests.huggingface.folders import contents, ram_for, save, tokens, weight_bytes
from tests.training.harness import same
from tierstore import TierStore
from tierstore.cli import main
from tierstore.finetune import data as datas
from tierstore.finetune.options import FinetuneError, Recipe, read_toml
from tierstore.finetune.plan import make_plan
from tierstore.finetune.tuning import Tuning, factor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tierstore.huggingface import from_pretrained  # noqa: E402  # needs transformers

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by its old name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    changes = {"vocab_size": tokenizers.VOCABULARY, "num_hidden_layers": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    folder = save("llama", tmp_path / "model", torch.bfloat16, **changes)
    tokenizers.make(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    for number, each in enumerate(tokenizers.texts()):
        (directory / f"{number:02}.txt").write_text(each, encoding="utf-8")
    return directory


def arguments(folder: Path, data: Path, place: Path, *more: str, gpu_share: float = 0.5) -> list[str]:
    total = weight_bytes(folder)
    budgets = {"gpu": int(total * gpu_share), "ram": ram_for(total), "nvme": place / "store", "output": place / "out", "device": "cpu"}
    run = {"data": data, "seq-len": 32, "batch": 4, "commit-every": 3, "warmup": 2, "lr": 1e-2, "threads": 1}
    options = [str(part) for name, value in {**budgets, **run}.items() for part in (f"--{name}", value)]
    return ["finetune", str(folder), *options, *more]


def finetune(*parts: Any, **options: Any) -> Result:
    return CliRunner().invoke(main, arguments(*parts, **options), catch_exceptions=False)


def log_of(place: Path) -> list[dict[str, Any]]:
    lines = (place / "out" / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def kill_at(command: Sequence[str], log: Path, num_lines: int) -> None:
    """Run it in a process of its own and kill that without warning once it has taken so many steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tierstore", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    deadline = time.monotonic() + 120
    try:
        while not (log.is_file() and log.read_text(encoding="utf-8").count("loss") >= num_lines):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_killed_and_gone_on_with(kind: str, folder: Path, text: Path, tmp_path: Path) -> None:
    before = contents(folder)
    more = ["--steps", "10", "--eval-data", str(text / "00.txt"), "--eval-every", "4"]
    more += ["--full", "--weight-decay", "0.1"] if kind == "full" else ["--lora-rank", "2", "--lora-dropout", "0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = finetune(folder, text, whole, *more)
    assert result.exit_code == 0, result.output
    command = arguments(folder, text, broken, *more)
    kill_at(command, broken / "out" / "training.jsonl", 6)
    assert not (broken / "out" / "config.json").exists()
    result = finetune(folder, text, broken, *more)
    assert result.exit_code == 0, result.output
    gone_on = re.search(r"Going on from the commit of step (\d+)", result.output)
    assert gone_on
    shown = [int(step) for step in re.findall(r"^step (\d+)/10  loss", result.output, re.MULTILINE)]
    assert (shown[0], shown[-1]) == (int(gone_on[1]) + 1, 10), "as in what else is said of steps"
    assert re.search(r"nvme_read [1-9]", result.output), "RAM was not too small"
    assert log_of(broken) == log_of(whole)
    assert [entry["step"] for entry in log_of(whole) if "loss" in entry] == list(range(1, 11))
    assert [entry["step"] for entry in log_of(whole) if "held_out" in entry] == [0, 4, 8, 10]
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    assert contents(folder) == before
    assert (whole / "out" / "loss.png").stat().st_size > 1000
    losses = [entry["loss"] for entry in log_of(whole) if "loss" in entry]
    assert losses[-1] < losses[0] - (0.3 if kind == "full" else 0.03)
    result = finetune(folder, text, broken, *more)
    assert "is finished" in result.output


def test_the_result_is_what_plain_transformers_loads(folder: Path, text: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    result = finetune(folder, text, place, "--full", "--steps", "4")
    assert result.exit_code == 0, result.output
    plain = transformers.AutoModelForCausalLM.from_pretrained(place / "out")
    begun = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {**plain.config.to_dict(), "_name_or_path": ""} == {**begun.config.to_dict(), "_name_or_path": ""}
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "out")
    assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    assert tokenizer.chat_template == tokenizers.TEMPLATE
    with torch.no_grad():
        logits = plain(tokens()).logits
        assert not same(logits, begun(tokens()).logits)
    total = weight_bytes(folder)
    with TierStore(gpu=total // 2, ram=ram_for(total), nvme=place / "store", device="cpu") as store, torch.no_grad():
        model, tiered = from_pretrained(folder, store)
        assert tiered.resumed
        assert same(model(tokens()).logits, logits)
        assert store.stats().tiers["gpu"].evictions
        assert store.stats().links["nvme_read"].bytes


def test_adapters_are_what_peft_loads(folder: Path, text: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    result = finetune(folder, text, place, "--lora-rank", "4", "--lora-targets", "q_proj, v_proj", "--steps", "3")
    assert result.exit_code == 0, result.output
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        before = base(tokens()).logits
    model = peft.PeftModel.from_pretrained(base, place / "out").eval()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8, {"q_proj", "v_proj"})
    assert not same(model(tokens()).logits, before)
    assert not (place / "out" / "config.json").exists()


def test_it_says_beforehand_what_will_happen(folder: Path, text: Path, tmp_path: Path) -> None:
    result = finetune(folder, text, tmp_path / "run", "--full", "--steps", "5")
    for word in ("Data ", "Model ", "Blocks ", "Tiers ", "A step ", "Time ", "Run "):
        assert word in result.output
    assert "all weights" in result.output
    assert "5 steps" in result.output


def test_a_drive_that_is_too_small_is_told_before_the_first_step(folder: Path, text: Path, tmp_path: Path) -> None:
    result = finetune(folder, text, tmp_path / "run", "--full", "--steps", "2", "--nvme-limit", "1MB")
    assert result.exit_code == 1
    assert "too small for this run" in result.output
    assert not (tmp_path / "run" / "out" / "training.jsonl").exists()


@pytest.mark.parametrize("option", [["--lr", "0.5"], ["--steps", "7"], ["--seq-len", "16"], ["--full"]], ids=" ".join)
def test_another_run_is_not_gone_on_with(option: list[str], folder: Path, text: Path, tmp_path: Path) -> None:
    more = ["--lora-rank", "2", "--steps", "3"]
    assert finetune(folder, text, tmp_path / "run", *more).exit_code == 0
    more = [*(["--steps", "3"] if option == ["--full"] else more), *option]
    result = finetune(folder, text, tmp_path / "run", *more)
    assert result.exit_code == 1
    assert "this run began with" in result.output


def test_other_data_is_not_gone_on_with(folder: Path, text: Path, tmp_path: Path) -> None:
    more = ["--lora-rank", "2", "--steps", "2"]
    assert finetune(folder, text, tmp_path / "run", *more).exit_code == 0
    (text / "00.txt").write_text("something else", encoding="utf-8")
    result = finetune(folder, text, tmp_path / "run", *more)
    assert "began on other data" in result.output


@pytest.mark.parametrize("kind", [["--full"], ["--lora-rank", "2"]], ids=["full", "lora"])
def test_samples_that_are_longer_than_the_table_of_positions_are_refused(kind: list[str], text: Path, tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path / "model", vocab_size=tokenizers.VOCABULARY)
    tokenizers.make(folder)
    result = finetune(folder, text, tmp_path, "--steps", "1", "--seq-len", "65", *kind, gpu_share=0.9)
    assert result.exit_code == 1, result.output
    assert "--seq-len 64" in result.stderr
    assert "max_position_embeddings" in result.stderr
    assert not (tmp_path / "out").exists()
    result = finetune(folder, text, tmp_path, "--steps", "1", "--seq-len", "64", *kind, gpu_share=0.9)
    assert result.exit_code == 0, result.output


def test_held_out_samples_count_too(text: Path, tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path / "model", vocab_size=tokenizers.VOCABULARY)
    tokenizers.make(folder)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"prompt": "assert", "completion": " this"}) + "\n", encoding="utf-8")
    options = ["--steps", "1", "--seq-len", "65", "--lora-rank", "2"]
    assert finetune(folder, short, tmp_path, *options, "--eval-data", str(text), gpu_share=0.9).exit_code == 1
    result = finetune(folder, short, tmp_path, *options, gpu_share=0.9)
    assert result.exit_code == 0, result.output  # none is that long


def test_another_model_is_not_gone_on_with(folder: Path, text: Path, tmp_path: Path) -> None:
    """Of the same shapes, so that only its place tells."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    options = ["--full", "--steps", "1", "--no-plot"]
    assert finetune(folder, text, tmp_path / "run", *options).exit_code == 0
    result = finetune(other, text, tmp_path / "run", *options)
    assert result.exit_code == 1
    assert f"this run began with the model {folder}, and was now given {other}" in result.output.replace("\n", " ")


@pytest.mark.parametrize("rank", [[], ["--full"]], ids=["lora", "full"])
def test_a_finished_run_is_written_to_another_place_too(rank: list[str], folder: Path, text: Path, tmp_path: Path) -> None:
    """Even where something else lies there."""
    assert finetune(folder, text, tmp_path / "run", *rank, "--steps", "1").exit_code == 0
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run" / "out", elsewhere)
    (weights,) = elsewhere.glob("*.safetensors")
    expected = weights.read_bytes()
    weights.write_bytes(b"of another run")
    result = finetune(folder, text, tmp_path / "run", *rank, "--steps", "1", "--output", str(elsewhere))
    assert result.exit_code == 0, result.output
    assert weights.read_bytes() == expected
    assert "is finished" in finetune(folder, text, tmp_path / "run", *rank, "--steps", "1", "--output", str(elsewhere)).output


def test_sixteen_bits_without_range_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    result = finetune(folder, text, tmp_path / "run", "--dtype", "float16")
    assert result.exit_code == 1
    assert "add --dtype bfloat16" in result.output


def test_the_folder_of_the_model_is_not_written_to(folder: Path, text: Path, tmp_path: Path) -> None:
    result = finetune(folder, text, tmp_path / "run", "--output", str(folder))
    assert result.exit_code == 1
    assert "never written" in result.output


# -- options from a file --------------------------------------------------------------------------------------------------------


def test_a_model_is_not_written_beside_adapters(folder: Path, text: Path, tmp_path: Path) -> None:
    """Told before the training, and not behind it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}", encoding="utf-8")
    result = finetune(folder, text, tmp_path, "--steps", "1", "--full", gpu_share=0.9)
    assert result.exit_code == 1
    assert "adapter_config.json" in result.stderr
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_options_may_come_from_a_file(folder: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    total = weight_bytes(folder)
    file.write_text(
        f'model = "{folder}"\ndata = "{text}"\nnvme = "{tmp_path / "store"}"\noutput = "{tmp_path / "run" / "out"}"\n'
        f'gpu = {total // 2}\nram = "{ram_for(total)}"\nseq-len = 32\nbatch = 2\nlora_rank = 2\nsteps = 9\nplot = false\ndevice = "cpu"\n',
        encoding="utf-8",
    )
    result = CliRunner().invoke(main, ["finetune", "--config", str(file), "--steps", "2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2]
    assert not (tmp_path / "run" / "out" / "loss.png").exists()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("learning-rate = 1", "unknown option 'learning-rate'"),
        ("steps = [1]", "not one value"),
        ("steps =", "cannot be read"),
        ('steps = "x"', "x"),
    ],
)
def test_files_with_mistakes_are_refused(line: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(line + "\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["finetune", "--config", str(file), "model", "--data", "d", "--nvme", "n", "--output", "o"])
    assert result.exit_code == 2
    assert match in result.output


def test_dashes_and_underscores_are_one(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seq-len = 3\nlora_rank = 4\n", encoding="utf-8")
    assert read_toml(file, ["seq_len", "lora_rank"]) == {"seq_len": 3, "lora_rank": 4}


# -- data -----------------------------------------------------------------------------------------------------------------------


def lines(path: Path, *entries: object) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n", encoding="utf-8")
    return path


def learnt(tokenizer: Any, sample: datas.Sample) -> str:
    text: str = tokenizer.decode(sample.targets[sample.targets != datas.IGNORED])
    return text


def test_texts_are_packed(folder: Path, text: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = datas.load(text, tokenizer, 32)
    assert {len(sample.tokens) for sample in data.samples[:-1]} == {32}
    assert tokenizer.decode(torch.cat([sample.tokens for sample in data.samples])) == "".join(
        f"{each}<|end|>" for each in tokenizers.texts()
    )
    assert all(same(sample.tokens, sample.targets) for sample in data.samples)


def test_only_completions_count(folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    file = lines(
        tmp_path / "d.jsonl", {"prompt": "The assert", "completion": " statement"}, {"text": "Some text"}, {"prompt": "", "completion": "x"}
    )
    data = datas.load(file, tokenizer, 64)
    assert [tokenizer.decode(sample.tokens) for sample in data.samples] == ["Some text<|end|>", "The assert statement<|end|>", "x<|end|>"]
    assert [learnt(tokenizer, sample) for sample in data.samples[1:]] == [" statement<|end|>", "x<|end|>"]


def test_only_the_assistant_counts(folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [("system", "Be brief."), ("user", "What?"), ("assistant", "This."), ("user", "Why?"), ("assistant", "So.")]
    file = lines(tmp_path / "d.jsonl", {"messages": [{"role": role, "content": content} for role, content in messages]})
    (sample,) = datas.load(file, tokenizer, 64).samples
    whole = "".join(f"<|{role}|>{content}<|end|>" for role, content in messages)
    assert tokenizer.decode(sample.tokens) == whole
    assert learnt(tokenizer, sample) == "This.<|end|>So.<|end|>"


def test_what_is_too_long_is_cut_and_what_has_nothing_left_is_dropped(folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    file = lines(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b" * 100}, {"prompt": "a" * 200, "completion": "b"})
    data = datas.load(file, tokenizer, 16)
    assert (len(data.samples), data.num_cut, data.num_dropped) == (1, 2, 1)
    assert len(data.samples[0].tokens) == 16


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "is not an object"),
        ('{"question": "x"}', "has neither"),
        ('{"prompt": "x"}', "has neither"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "says nothing"),
        ('{"messages": [{"role": "user"}]}', 'needs a "role"'),
        ("", "nothing to learn"),
    ],
)
def test_lines_that_are_not_understood(entry: str, match: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    file = tmp_path / "d.jsonl"
    file.write_text(f"{entry}\n", encoding="utf-8")
    with pytest.raises(FinetuneError, match=match):
        datas.load(file, tokenizer, 16)


def test_lines_end_where_json_lines_do(folder: Path, tmp_path: Path) -> None:
    """Text from the web has separators of lines within strings, and files of Windows begin with a mark."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["one\u2028two", "three\x85four", "five six"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    for begin, end in [("", "\n"), ("\ufeff", "\r\n")]:
        (tmp_path / "data.jsonl").write_bytes((begin + end.join(lines) + end).encode())
        (sample,) = datas.load(tmp_path / "data.jsonl", tokenizer, 512).samples
        assert tokenizer.decode(sample.tokens) == "".join(f"{text}<|end|>" for text in texts)


def test_a_line_that_is_nested_too_deep(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(FinetuneError, match="line 1 is not JSON"):
        datas.load(tmp_path / "data.jsonl", transformers.AutoTokenizer.from_pretrained(folder), 32)


def test_files_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "data" / "b.txt").write_text("text", encoding="utf-8")
    (tmp_path / "data" / ".hidden").write_bytes(b"\xff")
    assert len(datas.load(tmp_path / "data", tokenizer, 16).samples) == 1
    for path in (tmp_path / "data" / "a.bin", tmp_path / "nothing"):
        with pytest.raises(FinetuneError):
            datas.load(path, tokenizer, 16)


@given(count=st.integers(1, 20), batch=st.integers(1, 7), steps=st.integers(1, 12), first=st.integers(0, 12), seed=st.integers(0, 3))
@settings(max_examples=40)
def test_the_order_goes_on_wherever_it_stopped(count: int, batch: int, steps: int, first: int, seed: int) -> None:
    samples = [datas.Sample(torch.full((2,), number), torch.full((2,), number)) for number in range(count)]
    data = datas.Data(samples)

    def order(begin: int) -> list[int]:
        batches = datas.training_batches(data, batch=batch, seed=seed, first=begin, steps=steps, padding=0)
        return [int(row[0]) for each in batches for row in each.tokens]

    whole = order(0)
    assert order(min(first, steps)) == whole[min(first, steps) * batch :]
    for start in range(0, len(whole) - count + 1, count):
        assert sorted(whole[start : start + count]) == list(range(count))


def test_padding_counts_for_nothing() -> None:
    samples = [datas.Sample(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7])), datas.Sample(torch.tensor([8, 9]), torch.tensor([8, 9]))]
    batch = datas.collate(samples, padding=1)
    assert batch.tokens.tolist() == [[5, 6, 7, 1, 1, 1, 1, 1], [8, 9, 1, 1, 1, 1, 1, 1]]
    assert batch.mask.sum(1).tolist() == [3, 2]
    assert batch.num_targets == 3


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_and_falls(schedule: Any) -> None:
    recipe = Recipe(warmup=4, schedule=schedule)
    rates = [factor(recipe, step, 20) for step in range(21)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4] == 1
    falling = rates[4:]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == (1 if schedule == "constant" else pytest.approx(0))


@pytest.mark.parametrize(("name", "by_pieces"), [("llama", True), ("gemma2", False)])
def test_the_loss_is_the_models_own(name: str, by_pieces: bool, text: Path, tmp_path: Path) -> None:
    """Gemma 2 caps its logits, so that its loss is its own; Llama's is computed for a few tokens at a time."""
    changes = {"final_logit_softcapping": 0.2} if name == "gemma2" else {}
    folder = save(name, tmp_path / "model", vocab_size=tokenizers.VOCABULARY, pad_token_id=0, **changes)
    tokenizer = tokenizers.make(folder)
    result = finetune(folder, text, tmp_path / "run", "--lora-rank", "2", "--steps", "1", gpu_share=0.7)
    assert result.exit_code == 0, result.output
    (batch,) = datas.training_batches(datas.load(text, tokenizer, 32), batch=4, seed=0, first=0, steps=1, padding=0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = plain(input_ids=batch.tokens, labels=batch.targets).loss.item()
    assert log_of(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    with TierStore(gpu="1MB", ram="2MB", nvme=tmp_path / "run" / "store", device="cpu") as store:
        assert store.committed is not None
        assert store.committed.metadata["by_pieces"] == by_pieces


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
def test_what_is_said_beforehand_holds(rank: int | None, folder: Path, text: Path, tmp_path: Path) -> None:
    """Bytes over the device's link, once the order of accesses is known: about what was said."""
    total = weight_bytes(folder)
    recipe = Recipe(lora_rank=rank, seq_len=32, batch=4)
    data = datas.load(text, transformers.AutoTokenizer.from_pretrained(folder), 32)
    with TierStore(gpu=total // 2, ram=ram_for(6 * total), nvme=tmp_path / "store", device="cpu") as store:
        tuning = Tuning(store, folder, recipe, 12)
        plan = make_plan(tuning, datas.collate(data.samples[:4], 0), 4 * 32, "device")
        moved = []
        for batch in datas.training_batches(data, batch=4, seed=0, first=0, steps=12, padding=0):
            before = store.stats().links["h2d"].bytes
            tuning.step(batch)
            moved.append(store.stats().links["h2d"].bytes - before)
        last = sum(moved[-4:]) / 4
        assert 0.5 * plan.per_step.h2d < last < 1.2 * plan.per_step.h2d  # blocks are a few pages here
        assert plan.trained + plan.frozen == sum(weight.numel for weight in tuning.tiered.structure.weights)
        assert plan.step_s >= plan.compute_s > 0
        assert store.stats().tiers["gpu"].evictions
