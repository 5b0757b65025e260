"""The text: the help topics that Python carries (`pydoc_data.topics`), split by topic, as tokens, cut into windows.

Imports nothing of tierstore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics as PYDOC_TOPICS

import torch
from tokenizers import Tokenizer
from torch import Tensor

HELD_OUT_ONE_IN = 8
"""One topic in this many is kept from training, chosen by its name alone."""

END = "<|endoftext|>"
"""Stands between topics."""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens, topics joined in order of their names.

    Attributes:
        train, held_out: (tokens,) int64 each. No paragraph of the second occurs in the first.
        characters: Of all topics.
        digest: Changes whenever a token of either does.
    """

    train: Tensor
    held_out: Tensor
    characters: int
    digest: str


def load(tokenizer: Tokenizer, topics: Mapping[str, str] | None = None) -> Text:
    """Split and tokenize `topics` (default: Python's own, some hundred thousand tokens)."""
    topics = PYDOC_TOPICS if topics is None else topics
    held_out = {name: topics[name] for name in sorted(topics) if is_held_out(name)}
    # Topics repeat one another: "specialnames" has most of "attribute-access" in it, word for word.
    known = {paragraph for topic in held_out.values() for paragraph in topic.split("\n\n")}
    train = {name: _without(topics[name], known) for name in sorted(topics) if name not in held_out}
    end = tokenizer.token_to_id(END)
    tokens = [torch.tensor([index for text in part.values() for index in (*tokenizer.encode(text).ids, end)]) for part in (train, held_out)]
    digest = hashlib.sha256(len(tokens[0]).to_bytes(8, "little") + torch.cat(tokens).numpy().tobytes()).hexdigest()
    return Text(*tokens, sum(map(len, topics.values())), digest)


def is_held_out(name: str) -> bool:
    """Whether a topic is kept from training. A hash of its name decides, so a topic more or less moves no other one across."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % HELD_OUT_ONE_IN == 0


def _without(topic: str, paragraphs: set[str]) -> str:
    return "\n\n".join(paragraph for paragraph in topic.split("\n\n") if paragraph not in paragraphs)


# -- windows ------------------------------------------------------------------------------------------------------------


def training_order(text: Text, window: int, seed: int) -> Tensor:
    """The order in which windows are learnt: every one once before any comes again. A position in it is all a commit must remember."""
    return torch.randperm(len(text.train) // window, generator=torch.Generator().manual_seed(seed))


def training_batch(text: Text, order: Tensor, step: int, batch: int, window: int) -> Tensor:
    """(batch, window) tokens that a step learns from."""
    places = torch.arange(step * batch, (step + 1) * batch) % len(order)
    return torch.stack([text.train[start : start + window] for start in (order[places] * window).tolist()])


def held_out_batches(text: Text, count: int, batch: int, window: int) -> list[Tensor]:
    """About `count` windows spread evenly over the held-out topics, as (batch, window) tokens each; the last may hold fewer."""
    total = len(text.held_out) // window
    count = min(count, total)
    starts = [index * total // count * window for index in range(count)]
    return list(torch.stack([text.held_out[start : start + window] for start in starts]).split(batch))
