"""The text: the help topics that Python carries (`pydoc_data.topics`), split by topic, as tokens, cut into windows.

Imports nothing of tierstore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pydoc_data.topics import topics as PYDOC_TOPICS
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

if TYPE_CHECKING:
    from tierstore.demo.smollm2.recipe import Recipe

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
    parts = _tokens(tokenizer, train.values()), _tokens(tokenizer, held_out.values())
    digest = hashlib.sha256(len(parts[0]).to_bytes(8, "little") + torch.cat(parts).numpy().tobytes()).hexdigest()
    return Text(parts[0], parts[1], sum(map(len, topics.values())), digest)


def _tokens(tokenizer: Tokenizer, topics: Iterable[str]) -> Tensor:
    end = tokenizer.token_to_id(END)
    return torch.tensor([token for topic in topics for token in (*tokenizer.encode(topic).ids, end)])


def is_held_out(name: str) -> bool:
    """Whether a topic is kept from training. A hash of its name decides, so a topic more or less moves no other one across."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % HELD_OUT_ONE_IN == 0


def _without(topic: str, paragraphs: set[str]) -> str:
    return "\n\n".join(paragraph for paragraph in topic.split("\n\n") if paragraph not in paragraphs)


# -- windows ------------------------------------------------------------------------------------------------------------


def training_batches(text: Text, recipe: Recipe, first: int = 0) -> Iterator[Tensor]:
    """The (batch, window) tokens of each step from `first` on, to the last of the recipe.

    The windows come in an order drawn from the recipe's seed, every one once before any comes again, so the number of steps taken is all
    that a run must remember to go on.
    """
    window, batch = recipe.window, recipe.batch
    order = torch.randperm(len(text.train) // window, generator=torch.Generator().manual_seed(recipe.seed))
    for step in range(first, recipe.steps):
        places = torch.arange(step * batch, (step + 1) * batch) % len(order)
        yield torch.stack([text.train[start : start + window] for start in (order[places] * window).tolist()])


def held_out_batches(text: Text, count: int, batch: int, window: int) -> list[Tensor]:
    """About `count` windows spread evenly over the held-out topics, as (batch, window) tokens each; the last may hold fewer."""
    total = len(text.held_out) // window
    count = min(count, total)
    starts = [index * total // count * window for index in range(count)]
    return list(torch.stack([text.held_out[start : start + window] for start in starts]).split(batch))
