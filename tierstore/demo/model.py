"""The model's mathematics: parts, their first weights, forward functions, schedule. Imports torch and nothing of tierstore.

Both runs use these functions, the streamed one part by part and the plain one end to end.

[Note: The same bits with and without gradients]
The streamed run computes each layer twice, first without recording gradients and then again with. torch picks other kernels for some
composite operations when an input requires gradients (`rms_norm`, `linear` on three dimensions), so these are spelt out in operations
that have one implementation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY = 256
"""Bytes are the tokens, so no tokenizer is needed."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Config:
    """One training run. Two runs of equal configurations give equal bits.

    Attributes:
        layers: Transformer layers between embedding and head.
        width: Features per token, a multiple of `heads`.
        taps: Tokens that a short causal convolution looks at, the present one included; it also tells positions apart.
        context: Tokens per window.
        batch: Windows per step.
        steps: Optimizer steps of the whole run; the learning rate falls to nothing over them.
        peak_lr: Learning rate after `warmup_steps`.
        clip_norm: Largest global gradient norm.
        threads: Compute threads on a CPU. One: the bits then do not depend on how many cores a machine has, and a second core
            is left to the store's transfers.
        device: "cpu" or "cuda"; the two round differently.
    """

    layers: int = 6
    width: int = 128
    heads: int = 4
    taps: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 160
    seed: int = 0
    peak_lr: float = 8e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip_norm: float = 1.0
    threads: int = 1
    device: str = "cpu"

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context


def parts(config: Config) -> tuple[str, ...]:
    """The model's parts in forward order: "embedding", "layer0", ..., "head"."""
    return ("embedding", *(f"layer{i}" for i in range(config.layers)), "head")


def initial_weights(config: Config, part: str) -> dict[str, Tensor]:
    """First weights of one part, fp32 on the CPU, from a seed of its own: a part can be made without making those before it."""
    index = parts(config).index(part)
    generator = torch.Generator().manual_seed(config.seed * 100_003 + index)
    width, taps = config.width, config.taps

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(std)

    def identity_taps() -> Tensor:
        return torch.cat([torch.ones(1, width), torch.zeros(taps - 1, width)])

    if part == "embedding":
        return {"tokens": normal(VOCABULARY, width, std=1.0), "taps": normal(taps, width, std=0.5)}
    if part == "head":
        return {"gain": torch.ones(width), "out": normal(VOCABULARY, width, std=0.3 * width**-0.5)}
    residual_std = (2 * config.layers) ** -0.5
    return {
        "attention_gain": torch.ones(width),
        "attention_taps": identity_taps(),
        "qkv": normal(3 * width, width, std=width**-0.5),
        "proj": normal(width, width, std=0.5 * residual_std * width**-0.5),
        "mlp_gain": torch.ones(width),
        "mlp_taps": identity_taps(),
        "up": normal(4 * width, width, std=width**-0.5),
        "down": normal(width, 4 * width, std=residual_std * (4 * width) ** -0.5),
    }


# -- forward ------------------------------------------------------------------------------------------------------------


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    """(batch, time) tokens to (batch, time, width) features."""
    return _mix(F.embedding(tokens, weights["tokens"]), weights["taps"])


def layer(weights: Weights, x: Tensor, heads: int) -> Tensor:
    """One pre-norm transformer layer, (batch, time, width) to the same."""
    batch, time, width = x.shape
    h = _mix(_normalise(x, weights["attention_gain"]), weights["attention_taps"])
    qkv = _linear(h, weights["qkv"]).view(batch, time, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # each (batch, heads, time, width / heads)
    future = torch.full((time, time), float("-inf"), device=x.device).triu(1)
    attention = torch.softmax(q @ k.transpose(-1, -2) * (width // heads) ** -0.5 + future, dim=-1)
    x = x + _linear((attention @ v).transpose(1, 2).reshape(batch, time, width), weights["proj"])
    h = _mix(_normalise(x, weights["mlp_gain"]), weights["mlp_taps"])
    return x + _linear(F.relu(_linear(h, weights["up"])).square(), weights["down"])


def loss(weights: Weights, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of the head's predictions; `targets` is (batch, time)."""
    logits = _linear(_normalise(x, weights["gain"]), weights["out"])
    return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


def _normalise(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return (x.reshape(-1, weight.shape[1]) @ weight.t()).view(*x.shape[:-1], weight.shape[0])


def _mix(x: Tensor, taps: Tensor) -> Tensor:
    """Causal convolution, each feature by itself: row k of `taps` weighs the token k places back."""
    mixed = x * taps[0]
    for back in range(1, taps.shape[0]):
        mixed = mixed + F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] * taps[back]
    return mixed


# -- schedule and surroundings ------------------------------------------------------------------------------------------


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of a step, counted from 0: a short rise, a plateau, then linearly down to nothing."""
    rise = (step + 1) / config.warmup_steps
    fall = (config.steps - step) / (0.6 * config.steps)
    return config.peak_lr * min(1.0, rise, fall)


@contextlib.contextmanager
def deterministic(config: Config) -> Iterator[None]:
    """Ask torch for results that depend on nothing but the inputs; what was set before is restored."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS may vary from run to run
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic  # its flag is made at run time, unseen by type checkers
    fill, threads = memory.fill_uninitialized_memory, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.set_deterministic_debug_mode("error")  # as `use_deterministic_algorithms`, which imports torch's compiler: seconds
    memory.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
