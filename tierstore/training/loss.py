"""The loss of many tokens over a large vocabulary, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tierstore.errors import OptionError
from tierstore.training.layers import Tiered, tiered_of

IGNORED = -100
"""A target that does not count, as `torch.nn.functional.cross_entropy` has it."""

LossFunction = Callable[[Tensor, Tensor], Tensor]


def chunked_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, fn: LossFunction | None = None, *, norm: nn.Module | None = None, chunk: int = 1024
) -> Tensor:
    """Final norm, head and loss over chunks of tokens, so that no tensor of all tokens times the vocabulary ever exists.

        loss = chunked_loss(model.lm_head, hidden, labels, norm=model.norm)

    Each chunk is computed once more in the backward pass, last chunk first. With attached modules, their parameters are leased once for
    all chunks. The result is that of `torch.stack([fn(head(norm(h)), t) for h, t in chunks]).sum()`, each chunk under
    `torch.utils.checkpoint`; for the mean, divided by the number of targets that count.

    Args:
        head: From (tokens, width) to (tokens, vocabulary).
        hidden: (..., width), the input of `norm`, or of `head`.
        targets: (...), one for each row of `hidden`. To predict the next token, shift them before.
        fn: Of (logits, targets) of one chunk, to the sum (not the mean), a single number, of its tokens' losses. None:
            cross-entropy in fp32, and the result is the mean over all targets but -100.
        norm: Applied before `head`.
        chunk: Tokens at once.

    Returns:
        A single number, to call `backward()` on.

    Raises:
        OptionError: Shapes that do not go together.
        TrainingError: `head` and `norm` are attached to different stores.
    """
    if hidden.dim() < 2 or hidden.shape[:-1] != targets.shape:
        need = f"targets of shape {tuple(hidden.shape[:-1])}"
        raise OptionError("chunked_loss() needs a target for each row", need=need, have=str(tuple(targets.shape)), remedy="give such")
    if not isinstance(chunk, int) or chunk < 1:
        raise OptionError("chunk= is not understood", need="a number of tokens", have=repr(chunk), remedy="give such")
    if not targets.numel():
        raise OptionError("chunked_loss() was given no tokens", need="at least one", have="0", remedy="leave empty batches out")
    losses = _losses(head, norm, hidden.flatten(0, -2), targets.flatten(), fn or _cross_entropy, chunk)
    total = losses.sum()
    return total if fn is not None else total / (targets != IGNORED).sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def _losses(head: nn.Module, norm: nn.Module | None, hidden: Tensor, targets: Tensor, fn: LossFunction, chunk: int) -> Tensor:
    """The loss of each chunk."""

    def compute(rows: Tensor, of_rows: Tensor) -> Tensor:
        logits: Any = head(rows if norm is None else norm(rows))
        loss = fn(logits, of_rows)
        if loss.numel() != 1:
            remedy = "have fn return the sum over its tokens"
            raise OptionError("fn= of chunked_loss() must return one number", have=str(tuple(loss.shape)), remedy=remedy)
        return loss.reshape(1)

    modules = [module for module in (norm, head) if module is not None]
    tiered: Tiered | None = tiered_of(modules)
    if tiered is not None:
        result: Tensor = tiered.run_together(modules, compute, (hidden, targets), chunk)
        return result
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([compute(rows, of_rows) for rows, of_rows in pieces])
    return torch.cat([checkpoint(compute, rows, of_rows, use_reentrant=False) for rows, of_rows in pieces])
