"""Adapters over a frozen model that stays in its files, and other frozen parts: as PEFT and plain torch train them, bit for bit."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.huggingface.folders import contents, ram_for, save, tokens, weight_bytes
from tests.training.harness import same
from tierstore import TierStore
from tierstore.cli import main
from tierstore.errors import ModelFileError, OptionError, TrainingError
from tierstore.training import TieredOptimizer, attach

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tierstore.huggingface import from_pretrained, save_pretrained  # noqa: E402  # needs transformers

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by its old name

STEPS = 4


def lora(**changes: Any) -> Any:
    options = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **changes}
    return peft.LoraConfig(**options)


def with_lora(**changes: Any) -> Any:
    return lambda model: peft.get_peft_model(model, lora(**changes))


def resident(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False
    return model


def train(model: Any, optimizer: Any, clip: Any, first: int = 0, steps: int = STEPS) -> list[float]:
    model.train()
    losses = []
    for step in range(first, steps):
        torch.manual_seed(100 + step)  # dropout
        batch = tokens(4, 12, seed=step)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_resident(model: Any) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return train(model, optimizer, lambda: torch.nn.utils.clip_grad_norm_(trained, 0.5))


def budgets(folder: Path) -> dict[str, Any]:
    total = weight_bytes(folder)
    return {"gpu": total // 2, "ram": ram_for(int(total * 0.9)), "device": "cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_train_as_peft_trains_them(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", dtype, hidden_size=64, intermediate_size=256, num_hidden_layers=8)
    before = contents(folder)
    torch.manual_seed(5)
    plain = peft.get_peft_model(resident(folder), lora())
    expected = train_resident(plain)
    plain.save_pretrained(tmp_path / "plain")
    torch.manual_seed(5)
    with TierStore(**budgets(folder), nvme=tmp_path / "store") as store:
        model, tiered = from_pretrained(folder, store, adapt=with_lora())
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when="deferred")
        assert train(model, optimizer, lambda: optimizer.clip_grad_norm_(0.5)) == expected
        trained = [block.name for block in tiered.structure.blocks if block.trainable]
        assert len(trained) == 8
        assert all(store.info(name).hold == "gpu" for name in trained)
        frozen = [block.name for block in tiered.structure.blocks if not block.trainable]
        assert all(store.info(name).adopted for name in frozen)
        stats = store.stats()
        assert stats.tiers["gpu"].evictions
        assert stats.links["nvme_read"].bytes
        assert stats.links["nvme_write"].bytes == 0
        model.save_pretrained(tmp_path / "ours")
        store.commit()
        adapters = sum(store.info(name).nbytes for name in store if name not in frozen)
        assert store.stats().links["nvme_write"].bytes <= adapters
    assert contents(folder) == before
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    configs = [(tmp_path / name / "adapter_config.json").read_text(encoding="utf-8") for name in ("ours", "plain")]
    assert configs[0] == configs[1]
    again = peft.PeftModel.from_pretrained(resident(folder), tmp_path / "ours").eval()
    with torch.no_grad():
        assert same(again(tokens()).logits, plain.eval()(tokens()).logits)


def test_adapters_go_on_where_they_were_committed(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", torch.bfloat16, hidden_size=64, intermediate_size=256)
    results = []
    for parts in ([STEPS], [2, STEPS]):
        directory = tmp_path / f"store{len(parts)}"
        first = 0
        for last in parts:
            torch.manual_seed(5)
            with TierStore(**budgets(folder), nvme=directory) as store:
                model, tiered = from_pretrained(folder, store, adapt=with_lora())
                optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when="deferred", master_dtype=torch.float32)
                assert (tiered.resume() or {"step": 0})["step"] == first
                train(model, optimizer, lambda optimizer=optimizer: optimizer.clip_grad_norm_(0.5), first, last)
                first = last
                save_pretrained(tiered, tmp_path / f"adapters{len(parts)}")
                store.commit({"step": last})
        results.append((tmp_path / f"adapters{len(parts)}" / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("how", ["touched", "longer", "gone"])
def test_adapters_are_to_be_had_whatever_became_of_the_model(how: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", torch.bfloat16, hidden_size=64, intermediate_size=256)
    file = folder / "model.safetensors"
    options = budgets(folder)
    with TierStore(**options, nvme=tmp_path / "store") as store:
        model, tiered = from_pretrained(folder, store, adapt=with_lora())
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, master_dtype=torch.float32)
        train(model, optimizer, lambda: optimizer.clip_grad_norm_(0.5))
        trained = [block.name for block in tiered.structure.blocks if block.trainable]
        frozen = [block.name for block in tiered.structure.blocks if not block.trainable]
        expected: dict[str, Any] = {name: store.read(name) for name in trained}
        store.commit()
    data = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes(data + b"x" * (how == "longer"))
    with TierStore(**options, nvme=tmp_path / "store") as store:
        for name in trained:
            found: Any = store.read(name)
            assert all(same(found[key], value) for key, value in expected[name].items())
        if how != "touched":
            with pytest.raises(ModelFileError, match=re.escape(str(file))):
                store.read(frozen[0])
            store.commit()
        else:
            _, tiered = from_pretrained(folder, store, adapt=with_lora())
            save_pretrained(tiered, tmp_path / "adapters")
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(tmp_path / "store"), str(out), *(f"--only={name}" for name in trained)])
    assert result.exit_code == 0, result.output
    exported = {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items()}
    values = {key: value for block in expected.values() for key, value in block.items()}
    assert exported.keys() == values.keys()
    assert all(same(exported[key], value) for key, value in values.items())


def test_a_model_is_not_saved_beside_adapters(tmp_path: Path) -> None:
    """What loads them looks for the model that adapter_config.json names, and not for the one beside it."""
    folder = save("llama", tmp_path / "model")
    out = tmp_path / "out"
    with TierStore(**budgets(folder), nvme=tmp_path / "store") as store:
        _, tiered = from_pretrained(folder, store, adapt=with_lora())
        save_pretrained(tiered, out)
        save_pretrained(tiered, out)  # over themselves they may
    before = contents(out)
    with TierStore(**budgets(folder), nvme=tmp_path / "store2") as store:
        model, tiered = from_pretrained(folder, store)
        with pytest.raises(OptionError, match="adapter_config") as caught:
            model.save_pretrained(out)
        assert str(out) in str(caught.value)
        assert contents(out) == before
        save_pretrained(tiered, tmp_path / "other")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")(tokens()).logits, resident(folder)(tokens()).logits)


def test_modules_to_save_begin_as_what_they_copy(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", tie_word_embeddings=False)
    torch.manual_seed(5)
    plain = peft.get_peft_model(resident(folder), lora(modules_to_save=["lm_head"]))
    expected = train_resident(plain)
    torch.manual_seed(5)
    with TierStore(**budgets(folder), nvme=tmp_path / "store") as store:
        model, tiered = from_pretrained(folder, store, adapt=with_lora(modules_to_save=["lm_head"]))
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        assert train(model, optimizer, lambda: optimizer.clip_grad_norm_(0.5)) == expected
        model.save_pretrained(tmp_path / "ours")
        assert store.stats().tiers["gpu"].evictions
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("frozen", ["embed_tokens", "layers.0.", "layers.2.mlp", "q_proj", "norm"])
def test_any_part_may_be_frozen(frozen: str, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model", tie_word_embeddings=False)
    before = contents(folder)

    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)

    plain = resident(folder)
    freeze(plain)
    expected = train_resident(plain)
    with TierStore(**budgets(folder), nvme=tmp_path / "store") as store:
        model, tiered = from_pretrained(folder, store, adapt=freeze)
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when="deferred")
        assert train(model, optimizer, lambda: optimizer.clip_grad_norm_(0.5)) == expected
        still = [block.name for block in tiered.structure.blocks if not block.trainable]
        assert still
        assert all(store.info(name).adopted for name in still)
        assert store.stats().tiers["gpu"].evictions
        assert store.stats().links["nvme_read"].bytes
        model.save_pretrained(tmp_path / "ours")
    assert contents(folder) == before
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(same(ours[name], value) for name, value in plain.state_dict().items())


def test_a_peft_model_with_values_attaches_by_itself(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    torch.manual_seed(5)
    plain = peft.get_peft_model(resident(folder), lora())
    expected = train_resident(plain)
    torch.manual_seed(5)
    model = peft.get_peft_model(resident(folder), lora())
    with TierStore(**budgets(folder), nvme=tmp_path / "store") as store:
        tiered = attach(model, store)
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        assert train(model, optimizer, lambda: optimizer.clip_grad_norm_(0.5)) == expected
        save_pretrained(tiered, tmp_path / "ours")
        assert store.stats().tiers["gpu"].evictions
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    plain.save_pretrained(tmp_path / "plain")
    theirs = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert all(same(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str)
def test_what_begins_from_the_weights_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    with (
        TierStore(**budgets(folder), nvme=tmp_path / "store") as store,
        pytest.raises(TrainingError, match="before its values are there"),
    ):
        from_pretrained(folder, store, adapt=with_lora(**changes))


def test_adapted_models_generate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save("llama", tmp_path / "model")
    caplog.set_level(logging.INFO, "tierstore")
    plain = peft.get_peft_model(resident(folder), lora(init_lora_weights=False)).eval()
    plain.save_pretrained(tmp_path / "adapters")

    def load(model: Any) -> Any:
        return peft.PeftModel.from_pretrained(model, tmp_path / "adapters")

    with TierStore(**budgets(folder), nvme=tmp_path / "store") as store:
        model, _ = from_pretrained(folder, store, adapt=load)
        ours = model.eval().generate(input_ids=tokens(), max_new_tokens=8, do_sample=False)
        assert torch.equal(ours, plain.generate(input_ids=tokens(), max_new_tokens=8, do_sample=False))
        assert store.stats().tiers["gpu"].evictions
