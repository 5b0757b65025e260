"""Opening a store: from the arguments of `TierStore` to a running engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch

from tierstore.catalog import PAGE
from tierstore.errors import OptionError, SizeError
from tierstore.hardware import held_bytes, measure_hardware, resolve_budgets, resolve_device
from tierstore.mover.budget import NUM_SLOTS, RING_SLOTS, slot_bytes
from tierstore.mover.engine import Engine
from tierstore.mover.runtime import Machine
from tierstore.mover.streams import Copies, CudaCopies, ThreadCopies, lane_bytes
from tierstore.nvme.directory import Directory
from tierstore.placement import LIMITS, Placement
from tierstore.policies import Policy, resolve
from tierstore.residency import Tier
from tierstore.scheduler import Scheduler
from tierstore.tiers.device import DeviceArena
from tierstore.tiers.ram import HostArena
from tierstore.trace import Link
from tierstore.units import LinkRates

log = logging.getLogger("tierstore")


@dataclass(frozen=True)
class Options:
    """The arguments of `TierStore`, as given."""

    gpu: int | str
    ram: int | str
    nvme: str | os.PathLike[str] | None
    device: str | torch.device | None
    nvme_limit: int | str | None
    page_locked: bool | Literal["auto"]
    policy: str | Policy
    direct_io: bool | Literal["auto"]
    checksum: bool
    keep: int
    generation: int | None


def open_engine(options: Options) -> Engine:
    """Open directory and arenas, and start the engine. Blocks: memory is touched and page-locked.

    Raises:
        SizeError, OptionError, CapacityError, BusyError, DirectoryError, ShardError, TierFullError: see `TierStore`.
    """
    check_options(options)
    device = resolve_device(options.device)
    policy = resolve(options.policy)
    budgets = resolve_budgets(
        options.gpu,
        options.ram,
        options.nvme_limit,
        device=device,
        hardware=measure_hardware(device, options.nvme),
        nvme_held_bytes=held_bytes(options.nvme),
    )
    directory = None
    if options.nvme is not None:
        directory = Directory.open(
            options.nvme,
            limit=None if options.nvme_limit in (None, "auto") else budgets.nvme_limit_bytes,
            checksum=options.checksum,
            keep=options.keep,
            generation=options.generation,
            direct_io=options.direct_io,
        )
    try:
        return _assemble(options, device, policy, budgets.gpu_bytes, budgets.ram_bytes, directory)
    except BaseException:
        if directory is not None:
            asyncio.run(directory.close())
        raise


def check_options(options: Options) -> None:
    """Refuse what can be refused by its look alone.

    Raises:
        OptionError: An option that is out of range, of the wrong type or without meaning for this store.
    """
    switch, whole = 'True, False or "auto"', "a whole number"
    wanted = {
        "page_locked": (options.page_locked in (True, False, "auto"), switch),
        "direct_io": (options.direct_io in (True, False, "auto"), switch),
        "checksum": (isinstance(options.checksum, bool), "True or False"),
        "keep": (type(options.keep) is int and options.keep >= 1, f"{whole} from 1 on"),
        "generation": (options.generation is None or type(options.generation) is int, f"{whole}, or None for the newest"),
        "nvme": (options.nvme is None or _is_path(options.nvme), "the path of one directory, or None"),
    }
    for option, (right, need) in wanted.items():
        if not right:
            have = repr(getattr(options, option))
            raise OptionError(f"{option}= is not understood", need=need, have=have, remedy=f"give {option}= as such, or leave it out")
    if options.nvme is None and (options.generation is not None or options.keep != 1):
        raise OptionError(
            "keep= and generation= are about commits", need="a directory", have="nvme=None", remedy="name a directory with nvme="
        )


def _is_path(value: object) -> bool:
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
        os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        return False
    return isinstance(path, str) and path != "" and "\0" not in path


def _assemble(
    options: Options, device: torch.device, policy: Policy, gpu_bytes: int, ram_bytes: int, directory: Directory | None
) -> Engine:
    cuda = device.type == "cuda"
    slot = slot_bytes(ram_bytes)
    transfer_bytes = slot * (NUM_SLOTS + (RING_SLOTS if cuda else 0))
    if ram_bytes < transfer_bytes + PAGE:
        raise SizeError(
            f"ram={options.ram!r} is too small to hold any block beside transfer space",
            need=f"at least {transfer_bytes + PAGE} bytes",
            have=f"{ram_bytes} bytes",
            remedy="raise ram=",
            option="ram",
            size=options.ram,
        )
    runtime = Machine()
    rates = LinkRates()
    lane = lane_bytes(gpu_bytes) if cuda else 0
    placement = Placement(
        gpu_bytes=gpu_bytes - lane,
        ram_bytes=max(0, ram_bytes - transfer_bytes),
        has_nvme=directory is not None,
        policy=policy,
        seconds_per_byte={
            Link.H2D: 1 / rates.h2d_bytes_per_s,
            Link.D2H: 1 / rates.d2h_bytes_per_s,
            Link.NVME_READ: 1 / rates.nvme_read_bytes_per_s,
            Link.NVME_WRITE: 1 / rates.nvme_write_bytes_per_s,
        },
        limits=LIMITS,
        clock=runtime.clock,
    )
    with contextlib.ExitStack() as undo:
        arena, host, transfer = _reserve(options, device, gpu_bytes, placement.capacity_bytes(Tier.RAM), transfer_bytes, undo)
        copies: Copies = CudaCopies(arena, host, transfer, (slot * NUM_SLOTS, slot), lane) if cuda else ThreadCopies(arena, host)
        undo.callback(copies.close)
        engine = Engine(
            Scheduler(placement, runtime.clock),
            device=arena,
            host=host,
            copies=copies,
            directory=directory,
            transfer=transfer,
            slot_bytes=slot,
            runtime=runtime,
            checksum=options.checksum,
            direct_io=options.direct_io,
        )
        undo.pop_all()
    if directory is not None:
        recover(engine, directory)
        if directory.committed is not None:
            log.info("resumed generation %d with %d blocks", directory.committed.generation, len(directory.entries))
    return engine


def recover(engine: Engine, directory: Directory) -> None:
    """Book the blocks that the directory held when it was opened."""
    for entry in directory.entries.values():
        record = engine.scheduler.recover(entry.block)
        engine.shards[record] = entry.shard
        engine.committed_versions[record] = record.version
        engine.total_bytes += record.nbytes


def _reserve(
    options: Options, device: torch.device, gpu_bytes: int, ram_bytes: int, transfer_bytes: int, undo: contextlib.ExitStack
) -> tuple[DeviceArena, HostArena, HostArena]:
    """The arenas: device, host and transfer space. `undo` frees them again.

    Raises:
        CapacityError: There is not so much memory.
        OptionError: Page-locking was demanded, and refused.
    """
    cuda = device.type == "cuda"
    lock_pages = cuda and options.page_locked is not False
    threads = min(16, os.cpu_count() or 1)
    arena = DeviceArena(gpu_bytes, device)
    # Transfer space first: where the driver locks only so much, what remains pageable is copied through it.
    transfer = HostArena(transfer_bytes, page_lock=lock_pages, threads=threads)
    undo.callback(transfer.close)
    host = HostArena(max(1, ram_bytes), page_lock=lock_pages and transfer.page_lock_error is None, threads=threads)
    undo.callback(host.close)
    refused = host.page_lock_error or transfer.page_lock_error
    if options.page_locked is True and (not cuda or refused is not None):
        have = refused or "no driver to lock pages for: the device is the CPU"
        remedy = 'lower ram= or use page_locked="auto"'
        raise OptionError("the RAM tier cannot be page-locked", need=f"{host.nbytes + transfer.nbytes} bytes", have=have, remedy=remedy)
    return arena, host, transfer
