"""`tierstore generate`, and what generating moves: text as it comes, what was known ahead, and bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.huggingface.folders import ram_for, save, tokens, weight_bytes
from tests.huggingface.tokenizers import VOCABULARY, make
from tierstore import TierStore
from tierstore.cli import main
from tierstore.trace import Link

transformers = pytest.importorskip("transformers")

from tierstore.huggingface import from_pretrained  # noqa: E402  # needs transformers
from tierstore.huggingface.positions import num_positions  # noqa: E402  # as above


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = save("llama", tmp_path / "model", vocab_size=VOCABULARY, num_hidden_layers=12, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    make(folder)
    return folder


def generate(folder: Path, *arguments: str) -> Result:
    total = weight_bytes(folder)
    budgets = ["--gpu", str(total // 2), "--ram", str(ram_for(total // 2)), "--device", "cpu"]
    return CliRunner().invoke(main, ["generate", str(folder), *arguments, *budgets], catch_exceptions=False)


def expected(folder: Path, prompt: str, count: int, *, chat: bool = False, **options: Any) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).input_ids
    output = model.generate(given, max_new_tokens=count, **{"do_sample": False, **options})
    text: str = tokenizer.decode(output[0, given.shape[1] :], skip_special_tokens=True)
    return text


def test_it_prints_the_text_that_transformers_gives(folder: Path) -> None:
    result = generate(folder, "The assert statement", "--max-new-tokens", "20")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == expected(folder, "The assert statement", 20)
    assert "tokens/s" in result.stderr
    found = re.search(r"; ([\d.]+) (k|M)B read from the drive, ([\d.]+) (k|M)B moved to the device", result.stderr)
    assert found is not None
    read, moved = (float(found[index]) * {"k": 1e3, "M": 1e6}[found[index + 1]] for index in (1, 3))
    assert moved > 20 * weight_bytes(folder) / 3
    assert read > weight_bytes(folder) / 2


def test_the_prompt_may_come_on_standard_input(folder: Path) -> None:
    """The end of the line that was typed is none of it."""
    total = weight_bytes(folder)
    budgets = ["--gpu", str(total // 2), "--ram", str(ram_for(total // 2)), "--device", "cpu", "--max-new-tokens", "8"]
    result = CliRunner().invoke(main, ["generate", str(folder), "-", *budgets], input="The assert statement\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == expected(folder, "The assert statement", 8)


def test_budgets_that_are_too_small_name_what_can_be_raised(folder: Path) -> None:
    result = CliRunner().invoke(main, ["generate", str(folder), "The", "--gpu", "4KiB", "--ram", "1MB", "--device", "cpu"])
    assert result.exit_code == 1
    assert "larger than tier 'gpu'" in result.stderr
    assert "To mend it: raise gpu=\n" in result.stderr, "and no argument that the command has not"


def test_a_chat_and_a_draw(folder: Path, tmp_path: Path) -> None:
    options = ["--chat", "--max-new-tokens", "12", "--temperature", "0.8", "--seed", "3", "--nvme", str(tmp_path / "swap")]
    result = generate(folder, "What is an assert?", *options)
    assert result.exit_code == 0, result.output
    torch.manual_seed(3)
    assert result.stdout.rstrip("\n") == expected(folder, "What is an assert?", 12, chat=True, do_sample=True, temperature=0.8)
    assert list((tmp_path / "swap").iterdir()) == []


def test_what_is_converted_may_go_to_a_directory(folder: Path, tmp_path: Path) -> None:
    result = generate(folder, "The", "--max-new-tokens", "4", "--dtype", "bfloat16", "--nvme", str(tmp_path / "swap"))
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "swap").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "match"), [(["", "--chat"], "no chat template"), ([""], "no token")], ids=["no template", "empty prompt"]
)
def test_errors_are_one_line(arguments: list[str], match: str, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    result = generate(folder, *arguments)
    assert result.exit_code == 1
    assert match in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_bigcode", "gpt_neo", "opt", "biogpt", "gptj", "codegen", "ctrl", "roberta", "llama", "bloom"]
)
def test_how_long_a_sequence_may_be_is_known(name: str) -> None:
    """As many tokens as `num_positions` says run, and one more does not."""
    small = {"vocab_size": 99, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_ctx": 24, "dff": 32}
    other = {"vocab_size": 99, "max_position_embeddings": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    options: dict[str, Any] = small if name in ("gpt2", "gpt_bigcode", "gptj", "codegen", "ctrl") else {**other, "intermediate_size": 64}
    options |= {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4} if name == "gpt_neo" else {}
    options |= {"word_embed_proj_dim": 32, "ffn_dim": 64} if name == "opt" else {"is_decoder": True} if name == "roberta" else {}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **options)).eval()
    most = num_positions(model)
    assert (most is None) == (name in ("llama", "bloom"))
    with torch.no_grad():
        model(torch.full((1, most or 40), 7))
        if most is not None:
            assert 22 <= most <= 24
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, most + 1), 7))


@pytest.mark.parametrize("count", [60, 61])
def test_more_than_the_table_of_positions_has_is_refused(count: int, tmp_path: Path) -> None:
    """Before anything is read; and to its end it is used."""
    folder = save("gpt2", tmp_path / "model", vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    tokenizer = make(folder)
    prompt = tokenizer.decode(tokenizer("The assert statement is a convenient way").input_ids[:5])
    length = len(tokenizer(prompt).input_ids)
    new = count + 5 - length
    result = generate(folder, prompt, "--max-new-tokens", str(new))
    if count == 60:  # the last one is not looked at any more
        assert result.exit_code == 0, result.output
        assert result.stdout.rstrip("\n") == expected(folder, prompt, new)
        return
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert f"{length} + {new}" in result.stderr
    assert f"--max-new-tokens {new - 1}" in result.stderr
    assert "max_position_embeddings" in result.stderr


def test_a_prompt_that_is_longer_than_the_table_is_refused(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path / "model", vocab_size=VOCABULARY)
    make(folder)
    result = generate(folder, "assert " * 90, "--max-new-tokens", "1")
    assert result.exit_code == 1
    assert "shorter prompt" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_tokenizer_that_is_a_link_out_of_the_folder(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    result = generate(folder, "The")
    assert result.exit_code == 1
    assert "leads out of its folder" in result.stderr
    assert str(folder / name) in result.stderr


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    result = generate(folder, "The")
    assert result.exit_code == 1
    assert "tokenizer" in result.stderr


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from tierstore.cli import main\n"
        "for name in ('generate', 'finetune'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--max-new-tokens" in done.stdout
    assert "--lora-rank" in done.stdout


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "drawn"])
def test_generating_knows_ahead_what_comes(options: dict[str, Any], device: str, tmp_path: Path) -> None:
    """Layers come in the same order for each token: what is loaded is on its way before it is asked for, many times over."""
    folder = save("llama", tmp_path / "model", num_hidden_layers=12)
    total = weight_bytes(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device)
    batch = tokens().to(device)
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, **options}
    with TierStore(gpu=total // 2, ram=ram_for(total // 2), nvme=tmp_path / "store", device=device) as store:
        model, _ = from_pretrained(folder, store)
        torch.manual_seed(0)
        ours = model.generate(batch, **settings)
        torch.manual_seed(0)
        assert torch.equal(ours, plain.generate(batch, **settings))
        stats = store.stats()
        assert stats.tiers["gpu"].evictions
        assert stats.links["nvme_read"].bytes
        loads = stats.links[str(Link.H2D)].bytes_by_kind
        assert loads["prefetch"] > 3 * total
        assert stats.links["nvme_write"].bytes == 0


@torch.no_grad()
def test_a_cache_of_keys_is_filled_once(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with TierStore(gpu=weight_bytes(folder) // 2, ram="2MB", device="cpu") as store:
        model, _ = from_pretrained(folder, store)
        caches = []
        for each in (model, plain):
            cache = transformers.DynamicCache(config=each.config)
            for step in range(3):
                logits = each(input_ids=tokens(2, 4, seed=step), cache=cache, use_cache=True).logits
            caches.append((cache.get_seq_length(), logits))
        assert caches[0][0] == caches[1][0] == 12
        assert torch.equal(caches[0][1], caches[1][1])
        assert store.stats().tiers["gpu"].evictions


def test_a_folder_whose_settings_ask_for_several_answers(folder: Path) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    result = generate(folder, "hello", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output


def test_no_folder_is_told_as_such(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["generate", str(tmp_path / "nowhere"), "hello"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "no model folder" in result.output
