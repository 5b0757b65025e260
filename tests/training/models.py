"""Small models for training tests: each a function of a seed, and the batches that go with it.

Made of many small layers rather than a few large ones: half the parameters' bytes must be room for a layer and its update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32
VOCABULARY = 30


class Mlp(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.dropout(self.down(torch.relu(self.up(y)) * self.gate(y)))


class Attention(nn.Module):
    """Takes a mask by keyword, returns a tuple with something that is no tensor."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp = Mlp(width, dropout)
        self.heads = heads
        self.dropout = dropout

    def forward(self, x: Tensor, *, bias: Tensor | None = None, info: dict[str, int] | None = None) -> tuple[Tensor, dict[str, int] | None]:
        batch, time, width = x.shape
        y = self.norm(x)
        q, k, v = (part(y).view(batch, time, self.heads, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return self.mlp(x), info


class Language(nn.Module):
    """Embedding, attention layers with a learned bias that the model owns itself, a tied head, dropout."""

    def __init__(self, layers: int = 6, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Attention(WIDTH, dropout=dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.bias = nn.Parameter(torch.zeros(1, 1, 8, 8))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x, _ = block(x, bias=self.bias, info={"layers": len(self.blocks)})
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class Stack(nn.Module):
    """Nothing but equal layers between two linear ones."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.into = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Mlp(WIDTH) for _ in range(layers)])
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.out(x).float(), targets)


class Twice(nn.Module):
    """A layer that is used twice, weights shared between layers, a frozen layer, and one that is frozen in part."""

    def __init__(self, layers: int = 7) -> None:
        super().__init__()
        self.into = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Mlp(WIDTH) for _ in range(layers)])
        self.layers[3].up.weight = self.layers[1].up.weight
        self.layers[4].requires_grad_(False)
        self.layers[5].down.requires_grad_(False)
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.into(x)
        for index in (0, 1, 2, 0, *range(3, len(self.layers)), 2):
            x = self.layers[index](x)
        return F.mse_loss(self.out(x).float(), targets)


class Experts(nn.Module):
    """Each layer sends the batch to one of its experts: the others get no gradient."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 3)
            self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).mean((0, 1)).softmax(0)
            chosen = int(weights.argmax())
            return x + torch.tanh(self.experts[chosen](x)) * weights[chosen]

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Experts.Layer() for _ in range(layers)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


class Vision(nn.Module):
    """Convolutions with batch norm, whose buffers change in the forward pass, and a class token that the model owns."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spatial = nn.ModuleList([nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False) for _ in range(2)])
            self.pointwise = nn.ModuleList([nn.Conv2d(24, 24, 1, bias=False) for _ in range(2)])
            self.norms = nn.ModuleList([nn.BatchNorm2d(24) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for spatial, pointwise, norm in zip(self.spatial, self.pointwise, self.norms, strict=True):
                x = x + torch.relu(norm(pointwise(spatial(x))))
            return x

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.layers = nn.ModuleList([Vision.Layer() for _ in range(layers)])
        self.scale = nn.Parameter(torch.ones(24, 1, 1))
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = self.stem(images) * self.scale
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x.mean((2, 3))).float(), targets)


class Seq2Seq(nn.Module):
    """Layers of the decoder all look at what the encoder came to, each twice: its gradient is a sum over them."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(WIDTH, WIDTH)
            self.key = nn.Linear(WIDTH, WIDTH)
            self.value = nn.Linear(WIDTH, WIDTH)
            self.mlp = Mlp(WIDTH)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            mixed = F.scaled_dot_product_attention(self.query(x), self.key(memory), self.value(memory))
            return self.mlp(x + mixed)

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList([Mlp(WIDTH) for _ in range(layers // 2)])
        self.decoder = nn.ModuleList([Seq2Seq.Cross() for _ in range(layers // 2)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        memory = self.embedding(tokens)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embedding(targets)
        for layer in self.decoder:
            x = layer(x, memory=memory)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


class Recurrent(nn.Module):
    """Modules that keep a second list of their parameters, and return what has no rows of the batch in front."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([nn.GRU(16, 16, num_layers=3, batch_first=True) for _ in range(layers)])
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)[0]
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


class Uneven(nn.Module):
    """Layers of very different sizes, small ones between large ones: extents do not fit where others were, and blocks are moved."""

    class Layer(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, hidden)
            self.down = nn.Linear(hidden, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.down(torch.relu(self.up(x))))

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.into = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Uneven.Layer((37, 3, 61, 17, 1, 50, 29)[number % 7]) for number in range(2 * layers)])
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.out(x).float(), targets)


class Wide(nn.Module):
    """Layers that need nothing beside two matrices, as many and as wide as wanted: what a step takes can be told from the shapes."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Wide.Layer(width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Zoo:
    """One kind of model.

    Attributes:
        make: Builds it with so many layers, 6 or more.
        layers: As many as let half the parameters be room for a layer and its update.
        layers_of_16_bits: The same for elements of 16 bits, which on a CPU are updated whole parameters at a time.
        batch: Makes a batch of so many rows from a generator.
        splits: Whether its layers may be split into micro-batches.
    """

    make: Callable[[int], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    splits: bool = True
    layers: int = 6
    layers_of_16_bits: int = 10


def _tokens(rows: int, generator: torch.Generator) -> Batch:
    return (torch.randint(VOCABULARY, (rows, 8), generator=generator), torch.randint(VOCABULARY, (rows, 8), generator=generator))


def _rows(rows: int, generator: torch.Generator) -> Batch:
    return torch.randn(rows, 8, generator=generator), torch.randn(rows, 4, generator=generator)


def _images(rows: int, generator: torch.Generator) -> Batch:
    return torch.randn(rows, 3, 6, 6, generator=generator), torch.randint(5, (rows,), generator=generator)


MODELS = {
    "language": Zoo(Language, _tokens),
    "stack": Zoo(Stack, _rows),
    "twice": Zoo(Twice, _rows),
    "experts": Zoo(Experts, _tokens),
    "vision": Zoo(Vision, _images, splits=False, layers=9, layers_of_16_bits=20),
    "seq2seq": Zoo(Seq2Seq, _tokens),
    "recurrent": Zoo(Recurrent, _tokens, splits=False),
    "uneven": Zoo(Uneven, _rows, layers_of_16_bits=14),
}


def build(name: str, layers: int = 6, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name].make(layers)


def batches(name: str, count: int, rows: int, seed: int = 1) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield MODELS[name].batch(rows, generator)
