"""`chunked_loss`: the bits of chunks under checkpointing, and no tensor of all tokens times the vocabulary."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.training.harness import same
from tierstore import TierStore
from tierstore.errors import OptionError, TrainingError
from tierstore.training import TieredOptimizer, attach, chunked_loss

WIDTH, VOCABULARY = 32, 300


class Model(nn.Module):
    """Embedding and head share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def by_hand(model: Model, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """What the docstring says."""

    def compute(rows: Tensor, of_rows: Tensor) -> Tensor:
        logits = model.head(model.norm(rows))
        return F.cross_entropy(logits.float(), of_rows, ignore_index=-100, reduction="sum")

    pieces = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    total = torch.stack([checkpoint(compute, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total / (targets != -100).sum()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCABULARY, (2, 3, 9), generator=generator)
    targets[0, :4] = -100
    return tokens, targets


@pytest.mark.parametrize("chunk", [4, 8, 27, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_chunks_under_checkpointing(chunk: int, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Model().to(dtype)
    streamed = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(3):
        tokens, targets = batch(step)
        losses.append(by_hand(plain, plain(tokens), targets, chunk))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    with TierStore(gpu="120KB", ram="400KB", nvme=tmp_path / "swap", device="cpu") as store:
        tiered = attach(streamed, store)
        driven = TieredOptimizer(tiered, torch.optim.SGD, lr=0.1, momentum=0.9, when="deferred")
        for step in range(3):
            tokens, targets = batch(step)
            loss = chunked_loss(streamed.head, streamed(tokens), targets, norm=streamed.norm, chunk=chunk)
            assert same(loss.detach(), losses[step].detach())
            loss.backward()
            driven.step()
            driven.zero_grad()
        assert store.stats().tiers["gpu"].evictions
        assert store.stats().links["d2h"].bytes
        tiered.detach()
        store.commit()
    for name, parameter in plain.named_parameters():
        assert same(dict(streamed.named_parameters())[name].detach(), parameter.detach()), name


def test_modules_that_are_not_attached() -> None:
    torch.manual_seed(0)
    one, other = Model(), Model()
    other.load_state_dict(one.state_dict())
    tokens, targets = batch(0)
    by_hand(one, one(tokens), targets, 5).backward()
    chunked_loss(other.head, other(tokens), targets, norm=other.norm, chunk=5).backward()
    for parameter, twin in zip(one.parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None
        assert twin.grad is not None
        assert same(parameter.grad, twin.grad)


@pytest.mark.parametrize("attached", [True, False])
def test_no_tensor_of_all_tokens_times_the_vocabulary(attached: bool, tmp_path: Path) -> None:
    model = Model()
    tokens, targets = batch(0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
            nonlocal largest
            result = func(*args, **(kwargs or {}))  # type: ignore[operator, misc, dict-item]
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape[0] != WIDTH:
                    largest = max(largest, tensor.numel())
            return result

    with TierStore(gpu="200KB", ram="400KB", device="cpu") as store:
        if attached:
            attach(model, store)
        with Watch():
            chunked_loss(model.head, model(tokens), targets, norm=model.norm, chunk=4).backward()
    assert largest == 4 * VOCABULARY


def test_a_function_of_ones_own_and_evaluation(tmp_path: Path) -> None:
    model = Model()
    tokens, targets = batch(0)

    def squares(logits: Tensor, of_rows: Tensor) -> Tensor:
        return (logits.gather(1, of_rows.clamp(min=0)[:, None]) ** 2).sum()

    with torch.no_grad():
        pieces = zip(model(tokens).flatten(0, 1).split(7), targets.flatten().split(7), strict=True)
        expected = torch.stack([squares(model.head(rows), of_rows) for rows, of_rows in pieces]).sum()
    with TierStore(gpu="200KB", ram="400KB", device="cpu") as store, torch.no_grad():
        attach(model, store)
        assert same(chunked_loss(model.head, model(tokens), targets, squares, chunk=7), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    model, other = Model(), nn.LayerNorm(WIDTH)
    tokens, targets = batch(0)
    with pytest.raises(OptionError, match="a target for each row"):
        chunked_loss(model.head, model(tokens), targets[:1])
    with pytest.raises(OptionError, match="must return one number"):
        chunked_loss(model.head, model(tokens), targets, lambda logits, of_rows: logits)
    with TierStore(gpu="200KB", ram="400KB", device="cpu") as store:
        attach(model, store)
        with pytest.raises(TrainingError, match="same store"):
            chunked_loss(model.head, model(tokens), targets, norm=other)
