"""The planted bugs: small changes of the text of one module each.

`right` must occur exactly once in the module, so a mutant whose place has changed fails loudly and is planted anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.gpu.prove import FRESH_MUTANTS
from tests.gpu.prove import MUTANTS as ON_CUDA


@dataclass(frozen=True)
class Mutant:
    """A bug.

    Attributes:
        name: What the store would do wrong.
        module: The file it is planted in, below `tierstore/`.
        right, wrong: The text there, and what takes its place.
        suite: What catches it: "simulation", a level of the crash suite ("crash cuts", "crash errors", "crash store"), or a test file.
        rare: It takes hundreds of seeds, so only nightly runs plant it.
        at_large: Nothing catches it yet: either the suites are too weak, or what it breaks is no longer needed.
    """

    name: str
    module: str
    right: str
    wrong: str
    suite: str = "simulation"
    rare: bool = False
    at_large: bool = False


ENGINE, PLACEMENT, SCHEDULER, EXTENTS = "mover/engine.py", "placement.py", "scheduler.py", "extents.py"
OPERATIONS, SHARDS, BUDGET = "mover/operations.py", "nvme/shards.py", "mover/budget.py"
DIRECTORY, SHELF, RECOVERY = "nvme/directory.py", "nvme/shelf.py", "nvme/recovery.py"
MODELS = "mover/models.py"
CUTS, ERRORS = "crash cuts", "crash errors"
ADOPT = "tests/test_adopt.py"

MUTANTS = (
    # -- waits and wake-ups
    Mutant("a request wakes nobody", ENGINE, "submit(request)\n        self.wake()\n", "submit(request)\n"),
    Mutant(
        "the end of a lease wakes nobody",
        ENGINE,
        "                attend = not stays and self._has_work()\n",
        "                attend = False\n",
    ),
    Mutant(
        "a copy that has landed wakes nobody",
        ENGINE,
        "        self._reports.append((order, error, self.clock.now_ns()))\n        self._look_again()\n",
        "        self._reports.append((order, error, self.clock.now_ns()))\n",
    ),
    Mutant("a caller who queues for a lease wakes nobody", ENGINE, "return future, future is not None or (", "return future, False and ("),
    Mutant(
        "close() does not wait for transfers under way",
        ENGINE,
        "while self.placement.flying and self.failure is None:",
        "while False:",
        rare=True,
    ),
    Mutant(
        "a cancelled call does not wait for its copy on a host thread",
        ENGINE,
        "            while not future.done():\n                await asyncio.wait([future])\n            raise",
        "            raise",
        rare=True,
    ),
    # -- leases
    Mutant("a leased block is evicted", PLACEMENT, "            return not record.leased\n", "            return True\n"),
    Mutant(
        "a block is leased before its bytes have landed",
        SCHEDULER,
        "if not gpu.valid or gpu.moving or",
        "if not (gpu.valid or gpu.loading) or",
    ),
    Mutant("a block is leased while it is being moved", SCHEDULER, "if not gpu.valid or gpu.moving or", "if not gpu.valid or"),
    Mutant("a block is written while it is being copied out", SCHEDULER, "(gpu.readers == 0 and self.", "(self."),
    Mutant(
        "a writer does not wait for readers",
        SCHEDULER,
        "if any(reader != owner for reader in record.readers) or record.commit_pending:",
        "if record.commit_pending:",
    ),
    Mutant(
        "a cancelled wait keeps the lease that it was granted meanwhile",
        ENGINE,
        "                lease, request.lease = request.lease, None\n            elif",
        "                pass\n            elif",
    ),
    Mutant(
        "a cancelled wait leaves its request queued",
        ENGINE,
        "                self.scheduler.cancel(request)\n                self._futures.pop(request, None)\n        if lease",
        "                pass\n        if lease",
    ),
    # -- extents
    Mutant(
        "an extent is given away while a copy still reads it",
        PLACEMENT,
        "or copy.readers:\n                    coming = True",
        ":\n                    coming = True",
    ),
    Mutant(
        "a compaction moves what a transfer still uses",
        PLACEMENT,
        "            return record.copy(tier).settled\n",
        "            return True\n",
    ),
    Mutant(
        "a block counts as moved before its bytes have moved",
        PLACEMENT,
        "copy.offset, copy.moving = move.target, True",
        "copy.offset, copy.moving = move.target, False",
    ),
    Mutant(
        "the hole of a compaction is freed twice",
        PLACEMENT,
        "        self.arenas[order.tier].release(order.hole)\n",
        "        self.arenas[order.tier].release(order.hole)\n        self.arenas[order.tier].release(order.hole)\n",
    ),
    Mutant(
        "a cancelled request keeps its extents",
        SCHEDULER,
        "            self._end_save(request)\n        self._unreserve(request)\n",
        "            self._end_save(request)\n",
    ),
    Mutant("two transfers share one slot of transfer space", BUDGET, "offset = self._free.pop()", "offset = self._free[-1]"),
    Mutant(
        "what a lease reads is overwritten by write()",
        SCHEDULER,
        "return record.gpu.settled and record.ram.settled and not record.nvme_writing",
        "return True",
    ),
    Mutant(
        "read() does not keep the copy that it reads from",
        SCHEDULER,
        "                request.records[0].copy(request.tier).readers += 1\n            self._hosts",
        "                request.tier = request.tier\n            self._hosts",
    ),
    # -- newest values
    Mutant(
        "RAM still serves what was written on the device",
        "leases.py",
        "        self.placement.supersede_ram(record)\n",
        "",
    ),
    Mutant(
        "a write-back counts as newest though the block was written meanwhile",
        PLACEMENT,
        "            if order.version != record.version:\n                self._outdated(record)\n            else:\n                "
        "record.ram.apply(Event.CR",
        "            if True:\n                record.ram.apply(Event.CR",
    ),
    Mutant(
        "a spill counts as the newest version", PLACEMENT, "record.nvme_version = order.version", "record.nvme_version = record.version"
    ),
    Mutant(
        "a dirty block that comes to RAM counts as clean",
        PLACEMENT,
        "record.ram.apply(Event.CREATED if self.has_nvme and record.nvme_version != record.version else Event.LOADED)",
        "record.ram.apply(Event.LOADED)",
    ),
    Mutant(
        "write() forgets that RAM's bytes are newer",
        OPERATIONS,
        "                    if placement.has_nvme:\n                        placement.revive_ram(record, Event.WRITE)\n",
        "",
    ),
    Mutant(
        "write() leaves the old bytes on the device",
        OPERATIONS,
        "                    if record.gpu.state is not State.ABSENT:\n                        placement.discard(record, Tier.GPU)\n",
        "",
    ),
    Mutant(
        "write() tells too late that the device's bytes are others",
        OPERATIONS,
        "engine.device.invalidate([record.id])",
        "placement.left_device.append(record.id)",
        rare=True,
    ),
    # -- commits
    Mutant(
        "a commit misses what is dirty",
        ENGINE,
        "                    capture.needs[record] = version\n",
        "                    pass\n",
    ),
    Mutant("a commit takes whatever is written next", ENGINE, "if capture.needs.get(record) == version:", "if record in capture.needs:"),
    Mutant(
        "a block is written before a commit has saved it",
        SCHEDULER,
        "for reader in record.readers) or record.commit_pending:",
        "for reader in record.readers):",
    ),
    Mutant("a commit does not wait for writers", SCHEDULER, "if request.commit and (self._locked or", "if False and (self._locked or"),
    Mutant(
        "a committed shard is rewritten in place",
        SHARDS,
        "and not (self.references or self.suspect or self.discarded)",
        "and not (self.suspect or self.discarded)",
    ),
    Mutant(
        "a shard of a commit under way is let go",
        ENGINE,
        "                del capture.needs[record]\n                self.directory.retain(shard)\n",
        "                del capture.needs[record]\n                shard.references += 0\n",
    ),
    # -- model files
    Mutant(
        "an adopted block is written before it has a home",
        SCHEDULER,
        "return not write or record.writer == owner or (gpu.readers == 0 and self._has_home(record))",
        "return not write or record.writer == owner or gpu.readers == 0",
        suite=ADOPT,
    ),
    Mutant(
        "RAM keeps an adopted block that could be read again",
        PLACEMENT,
        "            return not record.leased\n        return self.backed(record)\n",
        "            return not record.leased\n        return self.has_nvme\n",
        suite=ADOPT,
    ),
    Mutant(
        "a model file that changes while it is read is believed",
        MODELS,
        "if (what := difference(file, await handle.stat())) is not None:",
        "if (what := None) is not None:",
        suite=ADOPT,
    ),
    Mutant(
        "what is read again from a model file is not checked",
        MODELS,
        "if shard.chunks is not None and found != shard.chunks[chunk]:",
        "if False:",
        suite=ADOPT,
    ),
    Mutant(
        "a model file's last page is read short",
        MODELS,
        "            if done + outcome >= piece.needed:\n",
        "            if done + outcome >= piece.needed // 2:\n",
        suite=ADOPT,
    ),
    Mutant(
        "a model file that has changed is not told at opening",
        RECOVERY,
        "    if different:\n        blocks = [",
        "    if False:\n        blocks = [",
        suite=ADOPT,
    ),
    Mutant(
        "a model file that had another header at opening is read",
        MODELS,
        "        if not shard.header_unverified:\n",
        "        if True:\n",
        suite=ADOPT,
    ),
    Mutant(
        "the room that adopted blocks pass through is given away",
        "fitness.py",
        "    if not passing or homes + need + passing <= capacity:\n",
        "    if True:\n",
        suite=ADOPT,
    ),
    Mutant(
        "a link may lead out of a model's folder",
        "nvme/model_files.py",
        "if not any(real.startswith(place + os.sep) for place in allowed):",
        "if False:",
        suite="tests/nvme/test_model_files.py",
    ),
    # -- who goes first
    Mutant("a demand evicts what another demand has just brought", PLACEMENT, "return record in protect and not", "return False and not"),
    Mutant(
        "a prefetch takes the space that a demand lacks", SCHEDULER, "if not self._starved and not self.closing:", "if not self.closing:"
    ),
    Mutant(
        "extents reserved by others are not given up in a standstill",
        SCHEDULER,
        "                    self._unreserve(other)\n                return True",
        "                    pass\n                return True",
        at_large=True,
    ),
    Mutant(
        "in a standstill the wrong one gets its turn",
        SCHEDULER,
        "self._favourite = request.sequence",
        "self._favourite = request.sequence + 1",
        rare=True,
    ),
    Mutant(
        "a standstill is not broken",
        SCHEDULER,
        "        if not self._at_standstill:\n            return self._refuse_hopeless()\n",
        "        return False\n",
    ),
    # -- failures
    Mutant("a failed read is tried for ever", PLACEMENT, "record.load_error = error\n", "pass\n"),
    Mutant(
        "a failed write-back loses the newest copy",
        PLACEMENT,
        "                record.ram.apply(Event.SAVE_FAILED)\n",
        "                record.ram.apply(Event.SAVED)\n",
    ),
    Mutant(
        "a shard counts as whole after a write in place has failed",
        SHARDS,
        "return not (self.broken or self.writing)",
        "return not self.writing",
        suite="tests/nvme/test_recovery.py",
    ),
    # -- the commit protocol, each sync in turn
    Mutant("shards are not synced", SHELF, "            await file.sync(shard.file_bytes)\n", "            pass\n", suite=CUTS),
    Mutant(
        "the manifest is not synced",
        DIRECTORY,
        "save(final + names.TEMPORARY, data, sync=True)",
        "save(final + names.TEMPORARY, data, sync=False)",
        suite=CUTS,
    ),
    Mutant(
        "the manifest gets its name before the names of the shards are durable",
        DIRECTORY,
        "            await self.files.sync_directory(self.path)\n        except OSError as error:\n"
        "            if isinstance(error, StalledError):\n",
        "        except OSError as error:\n            if isinstance(error, StalledError):\n",
        suite=CUTS,
    ),
    Mutant(
        "a commit returns before the name of its manifest is durable",
        DIRECTORY,
        "            await self.files.replace(final + names.TEMPORARY, final)\n            await self.files.sync_directory(self.path)\n",
        "            await self.files.replace(final + names.TEMPORARY, final)\n",
        suite=CUTS,
    ),
    Mutant(
        "CURRENT is not synced, on which a commit relies where directories cannot be",
        DIRECTORY,
        "encode_hint(Hint(self._store, generation)), sync=True)",
        "encode_hint(Hint(self._store, generation)), sync=False)",
        suite=CUTS,
    ),
    Mutant(
        "shards are let go before their manifest is gone for good",
        DIRECTORY,
        "            await self.files.sync_directory(self.path)\n            if not self.files",
        "            if not self.files",
        suite=CUTS,
    ),
    Mutant(
        "shards are let go too early where directories cannot be synced",
        DIRECTORY,
        "                await self._save_holder(sync=True)",
        "                await self._save_holder(sync=False)",
        suite=CUTS,
        rare=True,
    ),
    Mutant(
        "what is found at opening is not made durable",
        DIRECTORY,
        "        try:\n            await self.files.sync_directory(self.path)\n"
        "        except OSError as error:\n            raise recovery",
        "        try:\n            pass\n        except OSError as error:\n            raise recovery",
        suite=CUTS,
    ),
    Mutant(
        "what is found at opening is not made durable where directories cannot be synced",
        DIRECTORY,
        "await self._save_holder(sync=not self.files.syncs_directories)",
        "await self._save_holder(sync=False)",
        suite=CUTS,
    ),
    # -- the commit protocol, its order
    Mutant(
        "the manifest is written before the shards are synced",
        DIRECTORY,
        "await self._sync_all([entry.shard for entry in entries if not entry.shard.synced])",
        "late = asyncio.ensure_future(self._sync_all([entry.shard for entry in entries if not entry.shard.synced]))  # noqa: F841, RUF006",
        suite=CUTS,
    ),
    Mutant(
        "old generations are dropped before the new one has its name",
        DIRECTORY,
        "        self._doubtful.add(generation)\n        for entry in entries:\n",
        "        await self._reclaim()\n        self._doubtful.add(generation)\n        for entry in entries:\n",
        suite=CUTS,
    ),
    Mutant(
        "shards are let go though their manifest could not be dropped",
        DIRECTORY,
        "            self._doubtful.update(gone)\n            return False\n",
        "",
        suite=ERRORS,
    ),
    Mutant(
        "a commit in doubt does not keep its shards",
        DIRECTORY,
        "        self._generations[generation] = [entry.shard for entry in entries]\n        self._useless.add(generation)\n"
        "        self._doubtful.add(generation)\n        for entry in entries:\n            self.retain(entry.shard)\n        try:\n"
        "            await self.files.replace(final + names.TEMPORARY, final)\n            await self.files.sync_directory(self.path)\n"
        '        except OSError as error:\n            raise io_error(error, "naming the manifest", path=final) from error\n',
        "        self._useless.add(generation)\n        self._doubtful.add(generation)\n        try:\n"
        "            await self.files.replace(final + names.TEMPORARY, final)\n            await self.files.sync_directory(self.path)\n"
        '        except OSError as error:\n            raise io_error(error, "naming the manifest", path=final) from error\n'
        "        self._generations[generation] = [entry.shard for entry in entries]\n"
        "        for entry in entries:\n            self.retain(entry.shard)\n",
        suite=ERRORS,
    ),
    Mutant(
        "one generation too few is kept where directories cannot be synced",
        DIRECTORY,
        "return self._keep if self.files.syncs_directories else self._keep + 1",
        "return self._keep",
        suite=ERRORS,
    ),
    Mutant(
        "a sync that failed is tried again on the same file",
        SHELF,
        "        shard.suspect = True\n",
        "",
        suite=ERRORS,
    ),
    Mutant(
        "what is read back after a failed sync is taken as it is",
        SHELF,
        "copy.chunks is not None and copy.chunks != shard.chunks:",
        "copy.chunks is not None and False:",
        suite=ERRORS,
    ),
    Mutant("what is rewritten in place still counts as durable", SHELF, "        old.synced = False\n", "", suite=ERRORS),
    # -- the commit protocol, whose file it is
    Mutant("a shard with a name elsewhere is rewritten in place", SHELF, "(await file.stat()).links != 1", "False", suite=CUTS),
    Mutant("a freed file with a name elsewhere is rewritten", SHELF, "or status.links != 1 or", "or", suite=CUTS),
    Mutant(
        "a shard that a kept generation needs is rewritten",
        SHELF,
        "        shard.discarded = True\n        if not shard.references:\n            self._let_go(shard)\n",
        "        shard.discarded = True\n        self._let_go(shard)\n",
        suite=CUTS,
    ),
    Mutant(
        "a shard that is being committed is rewritten",
        DIRECTORY,
        "            self.retain(entry.shard)\n        self._num_commits += 1",
        "            entry.shard.references += 0\n        self._num_commits += 1",
        suite=CUTS,
    ),
    # -- space, and failed syncs
    Mutant(
        "what finds no room does not wait for commits",
        DIRECTORY,
        "            await self._commit_ended.wait()\n            return True\n",
        "            return False\n",
        suite="tests/test_disk_use.py",
    ),
    Mutant(
        "any number of commits are saved side by side",
        SCHEDULER,
        " or self.waiting.saving_commits > SAVING_COMMITS",
        "",
        suite="tests/test_disk_use.py",
    ),
    Mutant(
        "what a failed sync may have dropped counts as saved",
        SHELF,
        "shard.spare = self.on_suspect(shard)",
        "shard.spare = False",
        suite="tests/faults/test_lost_syncs.py",
    ),
    Mutant(
        "close() forgets a commit behind others",
        ENGINE,
        "            fixed = [capture for capture in self.captures if capture.request.started or capture.request.resolved]\n",
        "            fixed = [capture for capture in self.captures[:1] if capture.request.started]\n            self.captures = []\n",
        suite="tests/test_commit.py",
    ),
    Mutant(
        "commits in doubt pile up",
        DIRECTORY,
        "return self._doubtful | {",
        "return {",
        suite="tests/nvme/test_recovery.py",
    ),
    Mutant(
        "without checksums, what a failed sync may have dropped is believed",
        SHELF,
        "    if shard.suspect and shard.chunks is None:\n",
        "    if False:\n",
        suite="tests/crash/test_found.py",
    ),
    # -- recovery
    Mutant(
        "CURRENT is believed rather than the manifests",
        RECOVERY,
        "    newest = max(found.manifests)\n",
        "    newest = found.hint if found.hint in found.manifests else max(found.manifests)\n",
        suite=CUTS,
    ),
    Mutant(
        "another store's manifest counts as this one's",
        RECOVERY,
        "        if manifest.store != found.store:\n",
        "        if False:\n",
        suite="tests/durability/test_mutations.py",
    ),
    Mutant(
        "CURRENT is not asked which store this is",
        RECOVERY,
        "    if hint is not None and (hint.store in said or not said):\n        found.store = hint.store\n"
        "    elif hint is None and len(said) <= 1:\n",
        "    if len(said) <= 1:\n",
        suite="tests/durability/test_mutations.py",
    ),
    Mutant(
        "each commit says another store",
        DIRECTORY,
        "_manifest_bytes, self._store, generation",
        "_manifest_bytes, self.files.draw_identity(), generation",
        suite=CUTS,
    ),
    Mutant(
        "a manifest's checksum is not checked",
        "nvme/manifest.py",
        "if frame is None or int(frame[1], 16) != checksum(body):",
        "if frame is None:",
        suite=CUTS,
    ),
    Mutant(
        "what a crash has left over stays",
        DIRECTORY,
        "elif unclaimed or names.is_temporary(name):",
        "elif names.is_temporary(name):",
        suite=CUTS,
    ),
    # -- blocks without content
    Mutant(
        "RAM still serves what a lease is writing whole",
        EXTENTS,
        "        self.supersede_ram(record)\n        record.gpu.apply(Event.WRITE)\n        self.policy.admitted",
        "        record.gpu.apply(Event.WRITE)\n        self.policy.admitted",
    ),
    Mutant(
        "what is on its way to RAM counts as what a lease is writing whole",
        EXTENTS,
        "        record.version += 1\n        if record.blank:\n",
        "        if record.blank:\n",
        suite="tests/test_blank_scheduler.py",
    ),
    Mutant(
        "RAM keeps what is used up",
        EXTENTS,
        "        if record.blank and self.has_nvme and record.ram.state is not State.ABSENT and record.ram.settled:\n",
        "        if False:\n",
    ),
    Mutant(
        "blank blocks are not counted any more once they have had content",
        EXTENTS,
        "            record.blank = False\n            self.blank_bytes -= record.nbytes\n",
        "            record.blank = False\n",
    ),
    Mutant(
        "a commit waits for blocks without content",
        "requests.py",
        "record.born is not None and not record.blank and (",
        "record.born is not None and (",
    ),
    Mutant(
        "a commit has the version of who comes right behind it",
        ENGINE,
        "            capture.versions = capture.request.versions\n",
        "            capture.versions = {each: each.version for each in self.placement.records.values() if capture.request.covers(each)}\n",
        suite="tests/test_blank.py",
    ),
    Mutant(
        "a lease that comes too late, or that an exception leaves, uses its blocks up",
        SCHEDULER,
        "        lease.spent = frozenset(record.id for record, version in lease.begun if record.version == version)\n        self.release",
        "        self.release",
    ),
    Mutant(
        "what can never be leased keeps the room that it was given at once",
        SCHEDULER,
        "                    self._unreserve(request)  # what `try_use` had begun\n",
        "                    pass\n",
        suite="tests/test_blank_scheduler.py",
    ),
    Mutant(
        "who writes a block whole fails for its bytes",
        SCHEDULER,
        "isinstance(request, Use | Place) and not _may_be_blank(request, record):\n                return record.load_error",
        "isinstance(request, Use | Place):\n                return record.load_error",
        suite="tests/test_blank_scheduler.py",
    ),
    Mutant(
        "autograd is told too late that a fresh lease has taken the extent",
        ENGINE,
        "                self.device.invalidate(self.placement.left_device)\n            ticket.span = scheduler.note_use",
        "                pass\n            ticket.span = scheduler.note_use",
        suite="tests/test_blank.py",
    ),
    Mutant(
        "the declaration of a block wakes nobody",
        OPERATIONS,
        "                engine.total_bytes += record.nbytes\n        engine.wake()\n\n\nasync def _make_on_nvme",
        "                engine.total_bytes += record.nbytes\n\n\nasync def _make_on_nvme",
        suite="tests/test_blank.py",
    ),
    # -- the CUDA path, which the simulation runs on streams of its own
    *(
        Mutant(name, "mover/streams.py", right, wrong, "tests/simulation/test_extents.py" if name in FRESH_MUTANTS else "simulation")
        for name, (right, wrong) in ON_CUDA.items()
    ),
)
