"""Small random models of transformers, saved as model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tierstore.mover.budget import NUM_SLOTS, slot_bytes

VOCABULARY = 99
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {
    **SMALL,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
NO_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
GPT = {**SMALL, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
PLAIN = {key: value for key, value in NO_HEAD_DIM.items() if key != "num_key_value_heads"}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**NO_HEAD_DIM, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", NO_HEAD_DIM),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", NO_HEAD_DIM),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**PLAIN, "new_decoder_architecture": False}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", NO_HEAD_DIM),
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with random weights, the same each time."""
    import transformers

    model, config, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**options, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # transformers begins with norms of 1 and biases of 0, which would hide mix-ups
            parameter.add_(torch.randn_like(parameter) / 20)
    return made


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any) -> Path:
    make(name, dtype, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def ram_for(nbytes: int) -> int:
    """A budget of RAM that leaves so much for blocks beside transfer space."""
    return nbytes + NUM_SLOTS * slot_bytes(nbytes)


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


Change = Callable[[Any], Any]
