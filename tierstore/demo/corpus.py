"""The text: Python's own standard library, split by file, cut into windows, and the entropies to beat. Imports nothing of tierstore."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

HELD_OUT_ONE_IN = 20
"""One file in this many is kept from training, chosen by its name alone."""

LEAST_BYTES = 1_000_000

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class CorpusError(Exception):
    """This Python carries no sources to learn from."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sources as bytes, files joined in order of their names.

    Attributes:
        train: What the model learns from.
        held_out: Whole files that it never sees.
        num_files: (training, held-out).
        digest: Changes whenever a byte of either split does.
    """

    train: Bytes
    held_out: Bytes
    num_files: tuple[int, int]
    digest: str


def load(root: Path | None = None) -> Corpus:
    """Read the `.py` files under `root` (default: the standard library), tests left out.

    Raises:
        CorpusError: There is too little text, as in a Python shipped without sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in sorted(_sources(root)):
        splits[is_held_out(name)].append(path.read_bytes())
    train, held_out = (b"".join(files) for files in splits)
    if len(train) + len(held_out) < LEAST_BYTES or not held_out:
        raise CorpusError(
            f"the demo learns from the standard library's own sources and needs {LEAST_BYTES:,} bytes of .py files; "
            f"{root} has {len(train) + len(held_out):,}. Use a Python that ships its sources, such as one from python.org"
        )
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train + held_out).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), (len(splits[0]), len(splits[1])), digest)


def is_held_out(name: str) -> bool:
    """Whether a file is kept from training. A hash of its name decides, so a file more or less moves no other one across."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % HELD_OUT_ONE_IN == 0


def _sources(root: Path) -> list[tuple[str, Path]]:
    """(name relative to root with forward slashes, path) of each file; the name also fixes the order on every system."""
    found = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED]
        paths = [Path(directory, name) for name in files if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return found


# -- windows ------------------------------------------------------------------------------------------------------------


def num_windows(text: Bytes, context: int) -> int:
    """Windows of `context` bytes that `text` holds, each with the byte that follows it."""
    return (len(text) - 1) // context


def training_order(corpus: Corpus, context: int, seed: int) -> Tensor:
    """The order in which windows are learnt: every one once before any comes again. A position in it is all a commit must remember."""
    return torch.randperm(num_windows(corpus.train, context), generator=torch.Generator().manual_seed(seed))


def training_batch(corpus: Corpus, order: Tensor, position: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (batch, context) int64 each, of the windows from `position` in `order` on."""
    places = (torch.arange(position, position + batch) % len(order)).tolist()
    return _gather(corpus.train, [int(order[place]) * context for place in places], context)


def held_out_batches(corpus: Corpus, count: int, batch: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """About `count` windows spread evenly over the held-out files, in batches."""
    total = num_windows(corpus.held_out, context)
    count = min(count, total)
    starts = [index * total // count * context for index in range(count)]
    return [_gather(corpus.held_out, starts[first : first + batch], context) for first in range(0, count, batch)]


def _gather(text: Bytes, starts: list[int], context: int) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(np.stack([text[start : start + context + 1] for start in starts]).astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# -- entropies ----------------------------------------------------------------------------------------------------------


def entropies(train: Bytes, previous: npt.NDArray[np.integer], following: npt.NDArray[np.integer]) -> tuple[float, float]:
    """What predicting each byte of `following` costs with counts from `train`, in nats per byte: (unigram, bigram).

    The unigram counts each byte once more than it was seen. The bigram leans on the unigram as if it had seen it once after each
    byte (a Dirichlet prior of mass 1), so that pairs never seen cost much and not infinitely much.

    Args:
        previous: The byte before each of `following`, equally long.
    """
    unigram = np.bincount(train, minlength=256) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1].astype(np.int64) * 256 + train[1:], minlength=256 * 256).reshape(256, 256) + unigram
    bigram = pairs / pairs.sum(axis=1, keepdims=True)
    return float(-np.log(unigram[following]).mean()), float(-np.log(bigram[previous, following]).mean())
