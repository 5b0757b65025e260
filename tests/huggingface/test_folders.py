"""What model folders may hold: other dtypes, several files, names of other classes, missing and unexpected weights; and what is refused."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.huggingface.folders import contents, make, ram_for, save, tokens, weight_bytes
from tests.training.harness import same
from tierstore import TierStore
from tierstore.errors import ModelFileError, OptionError, PlaceholderError, TensorError, TierstoreError
from tierstore.training import TieredOptimizer

transformers = pytest.importorskip("transformers")

from tierstore.huggingface import from_pretrained, save_pretrained  # noqa: E402  # needs transformers
from tierstore.huggingface.generating import load_tokenizer  # noqa: E402

posix = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


def opened(folder: Path, directory: Path | None) -> TierStore:
    total = weight_bytes(folder)
    return TierStore(gpu=total // 2, ram=ram_for(int(total * 0.6)) if directory else "2MB", nvme=directory, device="cpu")


def plain(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def adopted(store: TierStore) -> int:
    return sum(store.info(name).adopted for name in store)


@torch.no_grad()
def compare(folder: Path, store: TierStore, **options: Any) -> Any:
    model, tiered = from_pretrained(folder, store, **options)
    expected = plain(folder, **options)
    assert model.dtype == expected.dtype
    assert same(model(tokens()).logits, expected(tokens()).logits)
    assert store.stats().tiers["gpu"].evictions
    return tiered


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")])
def test_dtypes_are_converted_on_the_way_in(name: str, stored: str, wanted: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model", getattr(torch, stored))
    with opened(folder, tmp_path / "store") as store:
        tiered = compare(folder, store, dtype=getattr(torch, wanted))
        assert adopted(store) == 0
        save_pretrained(tiered, tmp_path / "saved")
    again, expected = plain(tmp_path / "saved"), plain(folder, dtype=getattr(torch, wanted))
    assert again.dtype == getattr(torch, wanted)
    assert same(again(tokens()).logits, expected(tokens()).logits)


def test_weights_that_keep_their_precision_do(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=6, num_heads=4)
    torch.manual_seed(0)
    folder = tmp_path / "model"
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    batch = {"input_ids": tokens(), "decoder_input_ids": tokens(seed=1)}
    expected = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    with opened(folder, tmp_path / "store") as store, torch.no_grad():
        for model_class in (transformers.AutoModelForSeq2SeqLM, transformers.T5ForConditionalGeneration):
            model, tiered = from_pretrained(folder, store, model_class=model_class, dtype=torch.float16)
            kinds = {weight.dtype for weight in tiered.structure.weights}
            assert kinds == {parameter.dtype for parameter in expected.parameters()} == {torch.float16, torch.float32}
            assert same(model(**batch).logits, expected(**batch).logits)
            tiered.detach()
            for name in list(store):
                store.delete(name)


def test_a_folder_of_many_files(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    with opened(folder, tmp_path / "store") as store:
        tiered = compare(folder, store)
        assert adopted(store) == len(store) == len(tiered.structure.blocks)
        assert store.stats().links["nvme_read"].bytes
        save_pretrained(tiered, tmp_path / "saved", max_shard_size="60KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert same(plain(tmp_path / "saved")(tokens()).logits, plain(folder)(tokens()).logits)


@torch.no_grad()
def test_without_a_drive_for_the_store(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", num_hidden_layers=12)
    before = contents(folder)
    total = weight_bytes(folder)
    expected = plain(folder)
    with TierStore(gpu=total // 3, ram=ram_for(total // 3), nvme=None, device="cpu") as store:
        model, _ = from_pretrained(folder, store)
        assert torch.equal(
            model.generate(tokens(), max_new_tokens=5, do_sample=False), expected.generate(tokens(), max_new_tokens=5, do_sample=False)
        )
        stats = store.stats()
        assert stats.tiers["gpu"].evictions
        assert stats.links["nvme_read"].bytes > 2 * total / 3
    assert contents(folder) == before


def test_experts_that_transformers_fuses_are_put_and_the_rest_is_adopted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("mixtral", tmp_path / "model")
    assert any("experts.3.w1" in name for name in load_file(folder / "model.safetensors"))
    caplog.set_level(logging.INFO, "tierstore")
    with opened(folder, tmp_path / "store") as store:
        tiered = compare(folder, store)
        assert adopted(store) == len(tiered.structure.blocks) - 6  # embedding, norm, head
        save_pretrained(tiered, tmp_path / "saved")
    assert "converted for transformers" in caplog.text
    ours, theirs = load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_names_without_the_prefix_of_the_class(name: str, tmp_path: Path) -> None:
    """A folder of the bare model, as GPT-2's on the Hub is; the head is tied, or missing and made."""
    folder = save(name, tmp_path / "whole", tie_word_embeddings=True)
    bare = getattr(plain(folder), plain(folder).base_model_prefix)
    bare.save_pretrained(tmp_path / "bare")
    with opened(folder, tmp_path / "store") as store:
        compare(tmp_path / "bare", store)
        assert adopted(store) == len(store)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_unexpected_weights_are_reported_and_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("llama", tmp_path / "model", tie_word_embeddings=False)

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.3.mlp.down_proj.weight"], weights["lm_head.weight"]
        weights["something.else"] = torch.ones(3)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old files: not worth a word

    rewrite(folder, change)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    reports = []
    try:
        torch.manual_seed(7)
        expected = plain(folder)
        reports.append(caplog.text)
        caplog.clear()
        torch.manual_seed(7)
        with opened(folder, tmp_path / "store") as store, torch.no_grad():
            model, _ = from_pretrained(folder, store)
            assert same(model(tokens()).logits, expected(tokens()).logits)
            assert adopted(store) == len(store) - 2
        reports.append(caplog.text)
    finally:
        logger.removeHandler(caplog.handler)
    for report in reports:
        assert "down_proj" in report
        assert "something.else" in report
        assert "inv_freq" not in report
    told = [sorted(line for line in report.splitlines() if "MISSING" in line or "UNEXPECTED" in line) for report in reports]
    assert told[0] == told[1]


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_weight_that_files_hold_twice(equal: bool, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", tie_word_embeddings=True)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if not equal:
            weights["lm_head.weight"][50, 7] += 1

    rewrite(folder, change)
    expected = plain(folder)
    assert (expected.lm_head.weight is expected.model.embed_tokens.weight) == equal
    with opened(folder, tmp_path / "store") as store:
        tiered = compare(folder, store)
        assert len(tiered.structure.weights) == len(list(expected.parameters()))


def test_a_commit_is_gone_on_with_and_not_the_files(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with opened(folder, tmp_path / "store") as store:
        model, tiered = from_pretrained(folder, store)
        optimizer = TieredOptimizer(tiered, torch.optim.SGD, lr=0.1)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            trained = model(tokens()).logits
        store.commit()
    with opened(folder, tmp_path / "store") as store, torch.no_grad():
        model, tiered = from_pretrained(folder, store)
        assert tiered.resumed
        assert same(model(tokens()).logits, trained)
    with opened(folder, tmp_path / "store") as store, pytest.raises(TensorError, match="does not fit"):
        from_pretrained(folder, store, dtype=torch.bfloat16)


def align(model: torch.nn.Module) -> None:
    """Have the parameters begin where a store has them: convolutions give other bits where they begin elsewhere."""
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 64)
        begin = -room.data_ptr() // 4 % 64
        parameter.data = room[begin : begin + parameter.numel()].view(parameter.shape).copy_(parameter.data)


def test_models_with_buffers_of_their_own(tmp_path: Path) -> None:
    """Persistent buffers come from the file, others are computed as the class does."""
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35)
    torch.manual_seed(0)
    model = transformers.MobileNetV2ForImageClassification(config)
    images = torch.randn(4, 3, 32, 32)
    model.train()(images)  # moves the statistics of batch norm
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    expected = transformers.MobileNetV2ForImageClassification.from_pretrained(folder)
    align(expected)
    with TierStore(gpu="3MB", ram="20MB", nvme=tmp_path / "store", device="cpu") as store, torch.no_grad():
        ours, tiered = from_pretrained(folder, store, model_class=transformers.AutoModelForImageClassification)
        assert same(ours(images).logits, expected(images).logits)
        save_pretrained(tiered, tmp_path / "saved")
    again = transformers.MobileNetV2ForImageClassification.from_pretrained(tmp_path / "saved")
    align(again)
    assert same(again(images).logits, expected(images).logits)


# -- what is refused ------------------------------------------------------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, kind: type[TierstoreError], match: str, **options: Any) -> TierstoreError:
    with TierStore(gpu="1MB", ram="2MB", nvme=tmp_path / "store", device="cpu") as store:
        with pytest.raises(kind, match=match) as caught:
            from_pretrained(folder, store, **options)
        assert list(store) == []
    return caught.value


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def change(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "HuggingFaceTB" / "SmolLM2-135M", tmp_path, OptionError, "hf download")


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, tmp_path, OptionError, r"quantised model \(gptq\)")
    configure(folder, quantization_config=None, text_config={"quantization_config": {"quant_method": "bitsandbytes"}})
    refused(folder, tmp_path, OptionError, r"quantised model \(bitsandbytes\)")


@pytest.mark.parametrize(("name", "match"), [("model.gguf", "GGUF"), ("pytorch_model.bin", "pickles"), ("x.txt", "no weights")])
def test_other_files_than_safetensors_are_refused(name: str, match: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, tmp_path, OptionError, match)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    (folder / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    configure(folder, model_type="mine", auto_map={"AutoConfig": "modeling_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"})
    refused(folder, tmp_path, OptionError, "never run")
    configure(folder, model_type="llama")  # one that transformers has: its own class is taken
    with opened(folder, tmp_path / "store2") as store:
        from_pretrained(folder, store)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel"}])
def test_code_that_a_configuration_names_is_never_fetched(key: str, value: object, tmp_path: Path) -> None:
    """With the package `kernels`, transformers downloads and runs what these name."""
    folder = save("mixtral", tmp_path / "model")
    change(folder, **{key: value})
    with opened(folder, tmp_path / "store") as store, pytest.raises(OptionError, match=r"someone/kernel.* of the Hub, which is never run"):
        from_pretrained(folder, store)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As with the package `kernels` installed: what transformers would download and run."""
    names: list[str] = []

    def fetch(name: str, *_: object, **__: object) -> object:
        names.append(name)
        raise ImportError(f"{name} would have been fetched")

    for module in ("modeling_utils", "integrations.hub_kernels"):
        monkeypatch.setattr(f"transformers.{module}.is_kernels_available", lambda: True)
    for place in ("modeling_utils.lazy_import_flash_attention", "integrations.hub_kernels.get_kernel"):
        monkeypatch.setattr(f"transformers.{place}", fetch)
    return names


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"])
@pytest.mark.parametrize(
    "value",
    ["flash_attention_2", "flash_attention_3", {"": "flash_attention_2"}, "paged|flash_attention_2", "sonicmoe", "deepgemm"],
    ids=str,
)
def test_what_may_be_fetched_is_not_taken_from_a_configuration(
    key: str, value: object, fetched: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain name can stand for a kernel of the Hub, too. The model runs as it does without that line."""
    folder = save("mixtral", tmp_path / "model")
    expected = plain(folder)(tokens()).logits
    change(folder, **{key: value})
    with opened(folder, tmp_path / "store") as store, torch.no_grad():
        model, _ = from_pretrained(folder, store)
        assert model.config._attn_implementation in ("sdpa", "eager")
        assert same(model(tokens()).logits, expected)
    assert fetched == []
    assert str(value if isinstance(value, str) else value[""]) in caplog.text  # type: ignore[index]


def test_what_the_user_asks_for_is_his(fetched: list[str], tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    change(folder, attn_implementation="someone/kernel")
    with opened(folder, tmp_path / "store") as store:
        model, _ = from_pretrained(folder, store, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
    assert fetched == []
    with opened(folder, tmp_path / "store2") as store, pytest.raises(OptionError, match="flash-attn2 would have been fetched"):
        from_pretrained(folder, store, attn_implementation="kernels-community/flash-attn2")
    assert fetched == ["kernels-community/flash-attn2"]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_what_transformers_has_itself_is_taken_from_a_configuration(name: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    change(folder, attn_implementation=name)
    with opened(folder, tmp_path / "store") as store:
        model, _ = from_pretrained(folder, store)
        assert model.config._attn_implementation == name


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "abc"},
        {"num_attention_heads": 5},
        {"dtype": "import os"},
        {"dtype": "int8"},
        {"hidden_act": "nope"},
        {"model_type": ["llama"]},
        {"rope_parameters": {"rope_type": "nope"}},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    change(folder, **changes)
    with opened(folder, tmp_path / "store") as store, pytest.raises(OptionError, match=re.escape(str(folder))):
        from_pretrained(folder, store)
    assert not list((tmp_path / "store").glob("*.safetensors"))


@pytest.mark.parametrize("size", ["5GB", "50kB"])
def test_a_model_is_not_saved_over_its_own_files(size: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    before = contents(folder)
    with opened(folder, tmp_path / "store") as store:
        model, _ = from_pretrained(folder, store)
        with pytest.raises(OptionError, match="is the folder of the model"):
            model.save_pretrained(tmp_path / "store" / ".." / "model", max_shard_size=size)
        assert contents(folder) == before
        with torch.no_grad():
            assert same(model(tokens()).logits, plain(folder)(tokens()).logits)


def test_another_class_than_the_model_has(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    refused(folder, tmp_path, OptionError, "no model of type 'llama'", model_class=transformers.AutoModelForSeq2SeqLM)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    rewrite(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    error = refused(folder, tmp_path, TensorError, "model.norm.weight")
    assert str(folder / "model.safetensors") in str(error)


def test_an_index_that_leads_astray(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text(encoding="utf-8"))
    for name, match in (("../outside.safetensors", "outside of its folder"), ("model-9.safetensors", "not there")):
        (tmp_path / "outside.safetensors").write_bytes((folder / good["weight_map"]["model.norm.weight"]).read_bytes())
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.norm.weight": name}}), encoding="utf-8")
        refused(folder, tmp_path, ModelFileError, match)
    other = next(name for name in good["weight_map"].values() if name != good["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "model.norm.weight": other}}), encoding="utf-8")
    refused(folder, tmp_path, ModelFileError, "which it has not")
    index.write_text("[]", encoding="utf-8")
    refused(folder, tmp_path, ModelFileError, "not a JSON object")


@posix
@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors", "config.json"])
def test_a_link_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    source = "model.safetensors" if name != "config.json" else name
    (tmp_path / "elsewhere").mkdir()
    (folder / source).rename(tmp_path / "elsewhere" / source)
    (folder / name).symlink_to(tmp_path / "elsewhere" / source)
    error = refused(folder, tmp_path, ModelFileError, "is a link that leads out of its folder")
    assert str(folder / name) in str(error)
    assert str(tmp_path / "elsewhere" / source) in str(error)
    (folder / name).unlink()
    (tmp_path / "elsewhere" / source).rename(folder / "within")
    (folder / name).symlink_to("within")
    with opened(folder, tmp_path / "store2") as store:
        compare(folder, store) if name != "other.safetensors" else from_pretrained(folder, store)


@posix
@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "additional_chat_templates/tool.jinja"])
def test_a_link_of_a_tokenizer_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    (tmp_path / "outside").write_text("secret", encoding="utf-8")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ModelFileError, match="is a link that leads out of its folder"):
        load_tokenizer(folder)


@posix
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "a shard"])
def test_a_link_of_many_files_that_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", max_shard_size="60KB")
    victim = folder / name if name != "a shard" else sorted(folder.glob("model-*.safetensors"))[1]
    victim.rename(tmp_path / "outside")
    victim.symlink_to("../outside")
    error = refused(folder, tmp_path, ModelFileError, "is a link that leads out of its folder")
    assert str(victim) in str(error)
    assert str(tmp_path / "outside") in str(error)


@posix
@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_a_snapshot_of_the_hugging_face_cache(size: str, tmp_path: Path) -> None:
    """Its files are links to blobs beside it; the folder itself may be come to by links of the user's own."""
    folder = save("llama", tmp_path / "model", max_shard_size=size)
    home = tmp_path / "hub" / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "0123").mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(home / "blobs" / f"{number:040x}")
        (home / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{number:040x}")
    (tmp_path / "mine").symlink_to(home / "snapshots" / "0123")
    for number, path in enumerate((home / "snapshots" / "0123", tmp_path / "mine")):
        total = sum(file.stat().st_size for file in (home / "blobs").iterdir())
        with TierStore(gpu=total // 2, ram=ram_for(int(total * 0.6)), nvme=tmp_path / f"store{number}", device="cpu") as store:
            compare(path, store)
            assert adopted(store) == len(store)
    link = home / "snapshots" / "0123" / "config.json"
    link.unlink()
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (home / "blobs" / f"{0:040x}").rename(other / "config")
    link.symlink_to("../../../models--org--other/blobs/config")
    with TierStore(gpu="1MB", ram="2MB", device="cpu") as store, pytest.raises(ModelFileError, match="leads out of its folder"):
        from_pretrained(home / "snapshots" / "0123", store)  # another repository's


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:100], whole[:-100], struct.pack("<Q", 1 << 60) + whole[8:], b""):
        path.write_bytes(broken)
        error = refused(folder, tmp_path, ModelFileError, "cannot be read")
        assert str(path) in str(error)


def test_values_may_not_be_looked_at_before_they_are_there(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with TierStore(gpu="1MB", ram="2MB", device="cpu") as store:
        with pytest.raises(TierstoreError, match="before its values are there"):
            from_pretrained(folder, store, adapt=lambda model: model.half())
        with pytest.raises(OptionError, match="returned no model"):
            from_pretrained(folder, store, adapt=lambda model: 3)
        model, _ = from_pretrained(folder, store)
        with pytest.raises(PlaceholderError):
            model.state_dict()


def test_a_model_that_failed_to_attach_leaves_nothing(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with TierStore(gpu="16KB", ram="2MB", device="cpu") as store:
        with pytest.raises(TierstoreError):
            from_pretrained(folder, store)
        assert list(store) == []


def test_making_the_same_model_twice_draws_nothing(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with TierStore(gpu="1MB", ram="2MB", device="cpu") as store:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        from_pretrained(folder, store)
        assert torch.equal(torch.get_rng_state(), before)
    assert make("llama").dtype == torch.float32
