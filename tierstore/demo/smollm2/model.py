"""What the streamed and the plain run ask of the model alike: its tokenizer, its loss on text, its answer to a prompt.

Both run the ordinary `LlamaForCausalLM` of transformers. Imports nothing of tierstore.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

TOKENIZER, WEIGHTS = "tokenizer.json", "model.safetensors"
"""Names of a model's files in Hugging Face's layout; a third is "config.json"."""

PROMPT, EXPECTED = "The capital of France is", "Paris"
ANSWER_TOKENS = 8


def load_config(directory: Path) -> LlamaConfig:
    """The configuration, without a cache of keys and values: training has no use for one."""
    return LlamaConfig.from_pretrained(directory, use_cache=False, local_files_only=True)


def load_tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / TOKENIZER))


def silence_transformers() -> None:
    """No progress bars amid a run's own lines, and no advice that is not about it."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)


def language_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean loss in nats of each token of (batch, window) after those before it; the first of each window is given."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


@torch.no_grad()
def evaluate(model: Any, batches: Iterable[Tensor], device: torch.device) -> float:
    """Mean loss over batches in nats per token, without learning from them."""
    total, count = 0.0, 0
    for tokens in batches:
        num_predicted = tokens.numel() - len(tokens)
        total += language_loss(model, tokens.to(device)).item() * num_predicted
        count += num_predicted
    return total / count


@torch.no_grad()
def complete(model: Any, tokenizer: Tokenizer, prompt: str, num_tokens: int, device: torch.device) -> str:
    """The prompt and the likeliest tokens after it, one at a time."""
    tokens = tokenizer.encode(prompt).ids
    for _ in range(num_tokens):
        logits = model(input_ids=torch.tensor([tokens], device=device), logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
    text: str = tokenizer.decode(tokens)
    return text


def parameter_bytes(model: nn.Module) -> int:
    """Of all parameters; what two modules share counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
