"""A GPT with the shapes of GPT-3's sizes, and its batches. Imports nothing of tierstore but the loss that any model may call."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tierstore.training import chunked_loss

VOCABULARY = 50_304
"""GPT-2's, rounded up to a multiple of 64."""

CONTEXT = 1024
"""Tokens of a row."""

LOSS_TOKENS = 512
"""Tokens whose logits, 50,304 for each, are on the device at once."""


@dataclass(frozen=True)
class Shape:
    """Widths as in table 2.1 of Language Models are Few-Shot Learners (2020)."""

    layers: int
    width: int
    heads: int

    @property
    def parameters(self) -> int:
        """Weights and biases; the embedding is the head too."""
        layer = 12 * self.width**2 + 13 * self.width
        return self.layers * layer + (VOCABULARY + CONTEXT + 2) * self.width

    @property
    def layer_parameters(self) -> int:
        return 12 * self.width**2 + 13 * self.width


SHAPES = {
    "tiny": Shape(4, 64, 4),
    "350M": Shape(24, 1024, 16),
    "1.3B": Shape(24, 2048, 16),
    "6.7B": Shape(32, 4096, 32),
    "9B": Shape(44, 4096, 32),
}


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class Gpt(nn.Module):
    """The loss of the next tokens; embedding and head are one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Embedding(CONTEXT, shape.width)
        self.layers = nn.ModuleList([Block(shape.width, shape.heads) for _ in range(shape.layers)])
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return chunked_loss(self.head, self.hidden(tokens), targets, norm=self.norm, chunk=LOSS_TOKENS)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return x


class Draws:
    """First values of parameters: drawn once, and used again from another place on for each: billions of draws take minutes.

    The place follows from the module's name, so that models filled in different orders are the same.
    """

    NUMBER = (1 << 22) - 3

    def __init__(self, layers: int) -> None:
        self._values = torch.randn(self.NUMBER, generator=torch.Generator().manual_seed(0)) * 0.02
        self._scaled = 1 / math.sqrt(2 * layers)
        self._at = 0

    @torch.no_grad()
    def __call__(self, name: str, module: nn.Module) -> None:
        """As GPT-2: normal, less for what is added to the residual stream; biases 0, norms 1."""
        # The head's weight is the embedding's: whichever is filled last, it is this.
        self._at = zlib.crc32(("embedding" if name == "head" else name).encode()) % self.NUMBER
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                parameter.fill_(float(key == "weight"))
            elif key == "bias":
                parameter.zero_()
            else:
                self._draw(parameter.view(-1))
                if name.endswith((".out", ".down")):
                    parameter.mul_(self._scaled)

    def _draw(self, flat: Tensor) -> None:
        done = 0
        while done < flat.numel():
            count = min(flat.numel() - done, self.NUMBER - self._at)
            flat[done : done + count].copy_(self._values[self._at : self._at + count])
            done += count
            self._at = (self._at + count) % self.NUMBER


def batches(rows: int, tokens: int, device: torch.device, *, vocabulary: int = VOCABULARY) -> Iterator[tuple[Tensor, Tensor]]:
    """Random tokens and those that follow, the same in each run; on the device already.

    From page-locked memory: a copy from any other would have the host wait for all that is queued, in each step.
    """
    generator = torch.Generator().manual_seed(1)
    while True:
        drawn = torch.randint(vocabulary, (rows, tokens + 1), generator=generator, pin_memory=device.type == "cuda")
        drawn = drawn.to(device, non_blocking=True)
        yield drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
