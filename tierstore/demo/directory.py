"""The directory of a run: its store opened, on the right device and with the right budgets, or removed for a fresh start."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tierstore import TierStore
from tierstore.errors import ShardError

R = TypeVar("R")

STORE = "store"
"""The store's NVMe tier, within the directory of a run."""


class DemoError(Exception):
    """The demo cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for. None leaves the choice to the demo, or to the run that is continued."""

    directory: Path
    device: str | None = None
    policy: str = "lookahead"
    gpu: str | None = None
    ram: str | None = None
    steps: int | None = None
    seed: int | None = None
    fresh: bool = False
    check: bool = False


@dataclass(frozen=True, slots=True)
class Budgets:
    """A demo's own, for what the command line leaves open."""

    gpu: str
    ram: str
    nvme_limit: str


def default_device() -> str:
    """Where a new run computes unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_store(options: Options, budgets: Budgets, began_on: Callable[[TierStore], str]) -> TierStore:
    """Open the store of a run, on the device that it began on unless another is asked for.

    Args:
        began_on: Tells that device from a store that holds a commit.
    """
    device = options.device or default_device()
    store = _open_on(options, budgets, device)
    try:
        first = began_on(store) if store.committed is not None else device
    except BaseException:
        store.close()
        raise
    if options.device is None and first != device:
        store.close()
        store = _open_on(options, budgets, first)
    return store


def _open_on(options: Options, budgets: Budgets, device: str) -> TierStore:
    options.directory.mkdir(parents=True, exist_ok=True)
    return TierStore(
        gpu=options.gpu or budgets.gpu,
        ram=options.ram or budgets.ram,
        nvme=options.directory / STORE,
        nvme_limit=budgets.nvme_limit,
        device=device,
        policy=options.policy,
    )


def read_record(store: TierStore, parse: Callable[[Mapping[str, Any]], R]) -> R:
    """What the last commit tells of the run.

    Raises:
        DemoError: Another program made it, or another demo.
    """
    assert store.committed is not None
    try:
        return parse(store.committed.metadata or {})
    except ValueError as error:
        raise DemoError(f"the directory holds a store that this demo did not write ({error}): choose another --dir") from error


def remove_run(options: Options, budgets: Budgets, read: Callable[[TierStore], object], files: Sequence[str]) -> None:
    """Delete what an earlier run left, and nothing else.

    Args:
        read: Raises for a store that holds something else than a run of this demo.
        files: What the directory may hold beside the store.
    """
    directory = options.directory / STORE
    if directory.exists():
        try:
            # Opening it proves that it is a store, that the demo wrote it, and that no other process is at work in it.
            with _open_on(options, budgets, options.device or "cpu") as store:
                if store.committed is not None:
                    read(store)
        except ShardError:
            pass  # a damaged store is a reason to want a fresh one
        shutil.rmtree(directory)
    for name in files:
        (options.directory / name).unlink(missing_ok=True)
