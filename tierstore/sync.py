"""`TierStore`: the thin, thread-safe, blocking face of the store."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from tierstore.inputs import source_of, tier_of
from tierstore.mover import operations
from tierstore.mover.calls import Call
from tierstore.mover.critical import Uninterrupted
from tierstore.mover.operations import Tensors
from tierstore.nvme.layouts import Layout, claims
from tierstore.opening import Options, open_engine
from tierstore.policies import Policy
from tierstore.store import CommitBase, Leased, StoreBase, UseBase, make, unwrap, warn_of_loss

T = TypeVar("T")


class Use(UseBase):
    """`with store.use(...)`."""

    def __enter__(self) -> Leased:
        self._check_unused()
        try:
            future = self._begin(threading.get_ident())
            if future is not None:
                assert self._ticket is not None
                try:
                    self._engine.runtime.wait(future, self._timeout)
                except TimeoutError as error:
                    if future.done() and future.exception() is error:
                        raise
                    raise self._timed_out() from None
                self._engine.finish_wait(self._ticket)
            return self._yield()
        except BaseException:
            self._drop()
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._end(kind is not None)
        except BaseException:
            self._drop()
            raise


class CommitHandle(CommitBase):
    """A commit under way."""

    def result(self, timeout: float | None = None) -> int:
        """The generation, once the commit is durable.

        Raises:
            TimeoutError: Not yet; the commit goes on.
            TierstoreError: It failed; the previous commit stands.
        """
        return self._call.engine.runtime.wait(self._call.result, timeout)


class TierStore(StoreBase):
    """Tensors on three tiers: the device, page-locked RAM, and safetensors shards in a directory.

    Sizes are bytes or text: `"7GB"` is 7e9, `"7GiB"` 7 * 2**30, `"80%"` a share of what the hardware has.

    Args:
        gpu: Budget on the compute device. With no accelerator that is the CPU, and the tier ordinary memory.
        ram: Budget in host memory, transfer space included.
        nvme: The directory; made if it is absent, resumed if it holds a commit. None: two tiers, and no `commit`.
        device: The compute device; None: CUDA where torch has it, else the CPU.
        nvme_limit: Budget of the directory; None: the free space less 5 %.
        page_locked: Register host memory with the driver: True (or raise), False, or as much as can be.
        policy: What is evicted and what prefetched: a name, a class or an object (`tierstore.policies`).
        direct_io: Bypass the page cache: True (or raise), False, or where the file system allows it.
        checksum: Compute and verify checksums of shards.
        keep: Generations that stay on disk.
        generation: Open this older generation instead of the newest.

    Raises:
        SizeError: A size that does not parse, or that this machine does not have.
        OptionError: An unknown device, policy or option.
        CapacityError: Memory that could not be reserved.
        BusyError: Another store has the directory open.
        DirectoryError: The directory is foreign, no directory, not writable or of a newer format.
        ShardError: The committed state is damaged.

    Methods may be called from any thread; a forked child must not use the store.
    """

    def __init__(
        self,
        gpu: int | str = "auto",
        ram: int | str = "auto",
        nvme: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        nvme_limit: int | str | None = None,
        page_locked: bool | Literal["auto"] = "auto",
        policy: str | Policy = "lookahead",
        direct_io: bool | Literal["auto"] = "auto",
        checksum: bool = True,
        keep: int = 1,
        generation: int | None = None,
    ) -> None:
        """Open the store; see the class."""
        self._engine = None
        self._engine = open_engine(Options(gpu, ram, nvme, device, nvme_limit, page_locked, policy, direct_io, checksum, keep, generation))

    def __enter__(self) -> TierStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._finish(lambda: self.engine.call(coroutine))

    def _finish(self, start: Callable[[], Call[T]]) -> T:
        """Start a call and wait for it. On Ctrl-C it is cancelled, and nothing of it is left."""
        engine = self.engine
        call: Call[T] | None = None
        try:
            with Uninterrupted():
                call = start()
            return engine.runtime.wait(call.result)
        except BaseException:
            if call is not None:
                call.cancel()
                engine.runtime.wait(call.ended)
            raise

    def put(self, name: str, tensors: torch.Tensor | Tensors, *, tier: str = "ram", frozen: bool = False) -> None:
        """Add a block. The bytes are copied in; the caller's tensors may change afterwards.

        Args:
            name: Any non-empty text, not in the store yet.
            tensors: One tensor, or a mapping of names to tensors; of any dtype that safetensors has.
            tier: Where it begins: "gpu", "ram" or "nvme".
            frozen: It will never be written.

        Raises:
            BlockExistsError: The name is taken.
            TensorError: A tensor that cannot be stored.
            CapacityError: The block is larger than a tier, or the tier is full and nothing can leave it.
        """
        source, single = source_of(name, tensors)
        self._run(make(self.engine, name, source, single, tier, frozen, threading.get_ident()))

    def adopt(self, path: str | os.PathLike[str], *, layout: Layout = "layers") -> tuple[str, ...]:
        """Register the tensors of a model where they lie, as blocks. Only headers are read; the files are never written.

        Bytes are read when a block is used, and what is clean leaves memory for nothing. The first write copies a block into the store:
        with `nvme=` into a shard of its own, without it into RAM, where it stays. A commit remembers adopted blocks by their files' paths,
        lengths and times: a file that has changed or is gone is an error that says so, and nothing wrong is served.

        Args:
            path: A safetensors file, or a folder: its `model.safetensors`, or what `model.safetensors.index.json` names, or all its
                safetensors files. Folders of the Hugging Face cache are taken as they are.
            layout: "layers": a block for each running number in names ("model.layers.3"), and one for each module beside ("model.norm").
                Or a function from a tensor's full name to its block's; None leaves the tensor out. Tensors keep their full names.

        Returns:
            The blocks' names, by the first file that has some of them and then by name, numbers as numbers.

        Raises:
            ModelFileError: A file is missing, damaged, outside of its folder, or has names that no block can have. Names file and tensor.
            BlockExistsError: A name is taken.
            SizeError: A block is larger than a tier.
            OptionError: The path or the layout is none.
            TransferError: The drive does not answer.

        Nothing is registered unless everything is.
        """
        model = self._run(self.engine.models.survey(path))
        planned = claims(model, layout)
        return self._run(operations.adopt(self.engine, model, planned))

    def use(self, *names: str, write: bool | str | Collection[str] = False, timeout: float | None = None) -> Use:
        """Lease blocks, all or none, for a `with` statement that yields their tensors on the device.

        Readers share a block, a writer has it alone. A thread may take again what it holds: reading inside reading, either
        inside writing. While leased, a block is not moved. Use the tensors on the stream that is current on entering and
        leaving, or order your own streams against it.

        Args:
            names: Blocks. One yields its mapping (or its tensor, if `put` as one), several a tuple in this order.
            write: Whether all, or which of them, may be written; those are dirty at exit, also after an exception.
            timeout: Seconds to wait at most; None: as long as it takes.

        Raises:
            BlockNotFoundError: No such block.
            CapacityError: They can never fit beside the caller's own leases.
            LeaseTimeoutError: `timeout` ended the wait; nothing is leased.
            LeaseError: Writing inside one's own read lease; or, on leaving, a block changed under a read lease.
            DeadlockError: Holders of leases wait for one another, and this call came last.
            FrozenError: A frozen block in `write`.
            TransferError, ShardError: The block could not be brought.
        """
        engine = self.engine
        if engine.unsettled:
            self._settle(names)
        return Use(engine, names, write, timeout)

    def _settle(self, names: Iterable[str] | None = None) -> None:
        """Have done what somebody put off until these blocks are asked for (None: any)."""
        unsettled = self.engine.unsettled
        if not unsettled:
            return
        for name in list(unsettled) if names is None else [name for name in names if isinstance(name, str) and name in unsettled]:
            finish = unsettled.get(name)
            if finish is not None:
                finish()

    def prefetch(self, *names: str) -> None:
        """Hint that these blocks are used soon. Returns at once; it may be ignored, and takes no space that a lease waits for."""
        self._hint(names)

    def read(self, name: str) -> torch.Tensor | dict[str, torch.Tensor]:
        """A copy of the newest values on the CPU. Takes no device memory, and of RAM only transfer space."""
        self._settle((name,))
        (record,) = self._records((name,))
        return unwrap(record, self._run(operations.read(self.engine, record, threading.get_ident())))

    def write(self, name: str, tensors: torch.Tensor | Tensors) -> None:
        """Replace values in place, wherever the block is. Takes no device memory, and of RAM only transfer space.

        Args:
            name: The block.
            tensors: Its tensor, or a mapping with some or all of its tensors; shapes and dtypes as they are.

        Raises:
            TensorError: Another name, shape or dtype. Nothing was changed.
            FrozenError: The block is frozen.
            LeaseError: Inside one's own lease of the block.
        """
        self._settle((name,))
        (record,) = self._records((name,))
        source, _ = source_of(name, tensors)
        operations.check_tensors(record.block, source.tensors)
        self._run(operations.write(self.engine, record, source, threading.get_ident()))

    def hold(self, name: str, tier: str) -> None:
        """Have a block stay on a tier until `unhold`; returns when it is there. A block has one hold, the last.

        Held on "gpu" or "ram" it is never evicted from there. Held on "nvme" it leaves the faster tiers after each use.

        Raises:
            CapacityError: Held blocks would leave no room for others to pass.
        """
        (record,) = self._records((name,))
        self._run(operations.hold(self.engine, record, tier_of(tier), threading.get_ident()))

    def unhold(self, name: str) -> None:
        """End a hold; without one, nothing."""
        self._unhold(name)

    def evict(self, name: str) -> None:
        """Take a block off the device and out of RAM (without `nvme`: off the device), writing back what is dirty.

        Raises:
            LeaseError: It is held, or the caller leases it. Leases of others are waited for.
        """
        (record,) = self._records((name,))
        self._run(operations.evict(self.engine, record, threading.get_ident()))

    def delete(self, name: str) -> None:
        """Remove a block, once nobody leases it. A commit that holds it stays complete until the next one."""
        (record,) = self._records((name,))
        self._run(operations.delete(self.engine, record, threading.get_ident()))

    def commit(self, metadata: Any = None, *, wait: bool = True) -> int | CommitHandle:
        """Make the present state of all blocks durable.

        Args:
            metadata: Any JSON value; comes back as `store.committed.metadata`.
            wait: Return when it is durable, or at once with a handle. Either way the state is that of the call, or of the first
                moment after it at which nobody holds a write lease: blocks that are to be written next are saved first.

        Returns:
            The generation, or a `CommitHandle`.

        Raises:
            LeaseError: Inside one's own write lease.
            NoDirectoryError: The store has no directory.
            OptionError: The metadata is not JSON.
            TierFullError, TransferError: It failed; the previous commit stands.
        """
        engine, owner = self.engine, threading.get_ident()
        self._settle()
        for write_state in list(engine.before_commit):
            write_state()
        if not wait:
            return CommitHandle(operations.start_commit(engine, owner, metadata, wait=False))
        return self._finish(lambda: operations.start_commit(engine, owner, metadata, wait=True))

    def flush(self) -> None:
        """Write all dirty blocks to the lowest tier, without making them durable."""
        self._settle()
        self._run(operations.flush(self.engine, threading.get_ident()))

    def close(self) -> None:
        """End cleanly. What was not committed is gone, and a warning counts it. Repeatable."""
        engine = self._engine
        if engine is None or engine.forked:
            return
        with Uninterrupted():
            call = engine.begin_close(operations.close(engine))
            if call is not None:  # on a thread of its own: it must come to its end even if Ctrl-C ends the wait for it
                try:
                    engine.runtime.start_thread(partial(operations.shut_down_after, engine, call), "tierstore-close")
                except RuntimeError:  # the system starts no more threads
                    operations.shut_down_after(engine, call)
        engine.runtime.wait(engine.ended)
        if call is not None:
            warn_of_loss(call.result.result())
