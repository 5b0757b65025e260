"""Ten architectures of transformers, built small from configs, attach with no code of their own and train bit-identically.

Needs `transformers`, which the extra `examples` brings; skipped without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.harness import same
from tierstore import TierStore
from tierstore.mover.budget import NUM_SLOTS, slot_bytes
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer, attach

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "max_position_embeddings": 32}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        make: Builds a model.
        batch: Keyword arguments of its forward pass, of so many rows.
        layers: Where its layers are: paths of module lists.
        splits: Whether micro-batches are tried too.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    layers: tuple[str, ...]
    splits: bool = False


def _tokens(rows: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, 99, (rows, 12))
    return {"input_ids": tokens, "labels": tokens}


def _masked(rows: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[0, 9:] = 0
    return {**_tokens(rows), "attention_mask": mask}


def _pairs(rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 99, (rows, 12)), "labels": torch.randint(3, 99, (rows, 7))}


def _images(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.randint(2, (rows,))}


def _of(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return make


ARCHITECTURES = {
    "llama": Architecture(
        _of("LlamaForCausalLM", "LlamaConfig", **TEXT, num_key_value_heads=2, tie_word_embeddings=True), _masked, ("model.layers",), True
    ),
    "qwen3": Architecture(
        _of("Qwen3ForCausalLM", "Qwen3Config", **TEXT, num_key_value_heads=2, head_dim=8), _tokens, ("model.layers",), True
    ),
    "gpt2": Architecture(
        _of("GPT2LMHeadModel", "GPT2Config", vocab_size=99, n_embd=32, n_layer=4, n_head=4, n_positions=32),
        _tokens,
        ("transformer.h",),
        True,
    ),
    "gemma2": Architecture(
        _of("Gemma2ForCausalLM", "Gemma2Config", **TEXT, num_key_value_heads=2, head_dim=8, sliding_window=8),
        _tokens,
        ("model.layers",),
        True,
    ),
    "mixtral": Architecture(
        _of("MixtralForCausalLM", "MixtralConfig", **TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1),
        _tokens,
        ("model.layers",),
    ),
    "mamba": Architecture(
        _of("MambaForCausalLM", "MambaConfig", vocab_size=99, hidden_size=32, num_hidden_layers=4, state_size=4),
        _tokens,
        ("backbone.layers",),
    ),
    "bert": Architecture(_of("BertForMaskedLM", "BertConfig", **TEXT), _masked, ("bert.encoder.layer",)),
    "t5": Architecture(
        _of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=99,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        _pairs,
        ("encoder.block", "decoder.block"),
    ),
    "bart": Architecture(
        _of(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=99,
            d_model=32,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=32,
        ),
        _pairs,
        ("model.encoder.layers", "model.decoder.layers"),
    ),
    "vit": Architecture(
        _of(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        ),
        _images,
        ("vit.encoder.layer", "vit.layers"),
    ),
}


def steps(model: nn.Module, architecture: Architecture, optimizer: Any) -> list[Tensor]:
    torch.manual_seed(3)
    losses = []
    for _ in range(3):
        loss = model(**architecture.batch(4)).loss
        loss.backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def layers_of(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    modules = dict(model.named_modules())
    return [layer for path in architecture.layers if path in modules for layer in modules[path].children()]


def compare(architecture: Architecture, micro_batch: int | None, directory: Path) -> None:
    torch.manual_seed(0)
    resident = architecture.make()
    streamed = copy.deepcopy(resident)
    for module in resident.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False  # keys that went through a cache lie elsewhere in memory; `attach` sees to it by itself
    reference = resident_reference(resident, layers_of(resident, architecture), micro_batch=micro_batch)
    expected = steps(resident, architecture, reference.optimizer(torch.optim.AdamW, lr=1e-2))
    total = sum(parameter.numel() * 4 for parameter in resident.parameters())
    gpu, ram = max(total // 2, 90_000), max(total, 140_000)
    with TierStore(gpu=gpu, ram=ram + NUM_SLOTS * slot_bytes(ram), nvme=directory, device="cpu") as store:
        tiered = attach(streamed, store, micro_batch=micro_batch)
        found = steps(streamed, architecture, TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when="deferred"))
        stats = store.stats()
        tiered.detach()
        store.commit()
    assert all(same(one, other) for one, other in zip(found, expected, strict=True)), (found, expected)
    twins = dict(streamed.named_parameters())
    assert [name for name, parameter in resident.named_parameters() if not same(parameter.detach(), twins[name].detach())] == []
    assert stats.tiers["gpu"].evictions
    assert stats.links["nvme_read"].bytes
    assert stats.links["nvme_write"].bytes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_trains_bit_identically(name: str, tmp_path: Path) -> None:
    compare(ARCHITECTURES[name], None, tmp_path / "swap")


@pytest.mark.parametrize("name", [name for name, architecture in ARCHITECTURES.items() if architecture.splits])
def test_it_trains_bit_identically_in_micro_batches(name: str, tmp_path: Path) -> None:
    compare(ARCHITECTURES[name], 3, tmp_path / "swap")
