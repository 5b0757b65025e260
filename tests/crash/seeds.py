"""Many seeds of the crash suite: which runs belong to one, and what became of them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from tests.crash.cuts import run_cuts
from tests.crash.errors import run_errors
from tests.crash.store import run_store
from tests.simulation.seeds import Part
from tests.simulation.world import BrokenPromiseError

LEVELS = ("cuts", "errors", "store")

ERRORS_EVERY = 4
"""Of the changes of a life and the ways in which each can fail, one in so many is struck by a seed; others by other seeds."""


def run_seeds(level: str, first: int, end: int, stop: bool = False) -> Part:
    """Run seeds of one level one after the other.

    Args:
        level: One of `LEVELS`.
        first, end: The seeds.
        stop: At the first failure.
    """
    torch.set_num_threads(1)
    part = Part()
    with silence():
        for seed in range(first, end):
            failure = run_seed(level, seed, part)
            part.seeds += 1
            if failure is not None:
                part.failures.append((seed, str(failure)))
                if stop:
                    break
    gc.collect()
    return part


def run_seed(level: str, seed: int, part: Part) -> BrokenPromiseError | None:
    """Run one seed, and count what it did."""
    if level == "cuts":
        cuts = run_cuts(seed)
        part.steps += cuts.changes
        part.outcomes += {"changes": cuts.changes, "crashes": cuts.crashes, "openings": cuts.openings}
        return cuts.failure
    if level == "errors":
        errors = run_errors(seed, every=ERRORS_EVERY)
        part.steps += errors.changes
        part.outcomes += {"lives with an error": errors.runs, "errors": errors.changes}
        return errors.failure
    outcome, crashes = run_store(seed)
    part.steps += outcome.world.steps
    part.outcomes += outcome.outcomes
    part.outcomes += {"crashes": crashes}
    return outcome.failure


def work_of(level: str) -> partial[Part]:
    """`run_seeds` of one level, for `tests.simulation.seeds.report`."""
    return partial(run_seeds, level)


@contextmanager
def silence() -> Iterator[None]:
    """The store logs every error that it survives."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
