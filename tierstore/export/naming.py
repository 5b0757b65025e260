"""How an export's files get their names, and what they replace loses its own.

[Note: Nothing half-written]
All files are written under names that end in `.tmp`, and synced. Only then is an export touched that is to be replaced: its files are
set aside, under names that end in `.old.tmp`, the index first. The new files get their names, and the new index gets its name last;
when that is on the drive, what was set aside is deleted. The directory is synced wherever the order matters, which a power cut could
change otherwise: behind the temporary names, behind the loss of the old index, and before and behind the name of the new one. So
whoever finds an index, also after a power cut, finds all that it names, of one export.

A failure takes the new names away, the index first, and gives the old ones back, the index last: `out` is as it was. What can still
happen: the drive may refuse that, too. Then there is no index or the new one with all that it names; the old files stay as
`.old.tmp`, and a warning says so. Likewise for a process that is killed here, without the warning. The next export into `out`
removes everything of that kind.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Coroutine, Sequence
from typing import Any

from tierstore.export.layout import INDEX, is_export
from tierstore.nvme import names
from tierstore.nvme.files import Files
from tierstore.nvme.recovery import some
from tierstore.threads import StalledError

log = logging.getLogger("tierstore")

_ASIDE = ".old" + names.TEMPORARY


class Naming:
    """Names in one directory, for one export. See [Note: Nothing half-written].

    Args:
        files: The file system.
        out: The directory.
    """

    def __init__(self, files: Files, out: str) -> None:
        self._files = files
        self._out = out
        self._made: list[str] = []  # temporary names that may be there
        self._aside: list[str] = []  # names whose files may have been set aside
        self._named: list[str] = []  # names that may be those of new files
        self._complete = False
        self._answers = True

    def path(self, name: str) -> str:
        return os.path.join(self._out, name)

    async def make(self, name: str) -> str:
        """The path to write a file to that will be called `name`. There is nothing there: what is, is not written to."""
        path = self.path(name + names.TEMPORARY)
        await self.discard(path)
        if name not in self._made:
            self._made.append(name)
        return path

    async def publish(self, parts: Sequence[str]) -> list[str]:
        """Name what was made: these, and then the index.

        Returns:
            What was replaced and could not be removed.

        Raises:
            OSError: Not done; `undo` is to follow.
        """
        present = await self._files.listdir(self._out)
        new = {name + names.TEMPORARY for name in self._made}
        for name in sorted(present):
            if name not in new and name.endswith(names.TEMPORARY) and is_export(name.removesuffix(names.TEMPORARY).removesuffix(".old")):
                await self._files.unlink(self.path(name))  # of an export that was killed
        old = sorted(filter(is_export, present), key=lambda name: (name != INDEX, name))
        if old:
            await self._files.sync_directory(self._out)
        for name in old:
            self._aside.append(name)
            await self._files.replace(self.path(name), self.path(name + _ASIDE))
            if name == INDEX:
                await self._files.sync_directory(self._out)
        for name in parts:
            await self._name(name)
        await self._files.sync_directory(self._out)
        await self._name(INDEX)
        await self._files.sync_directory(self._out)
        self._complete = True
        return [name + _ASIDE for name in self._aside if not await self._try(self.discard(self.path(name + _ASIDE)))]

    async def _name(self, name: str) -> None:
        self._named.append(name)
        await self._files.replace(self.path(name + names.TEMPORARY), self.path(name))

    async def undo(self) -> None:
        """After a failure: leave `out` as it was, unless the new export is all there. Raises nothing: the first failure counts."""
        if self._complete:
            return
        for name in self._made:
            await self._try(self.discard(self.path(name + names.TEMPORARY)))
        if not await self._give_back():
            kept = some([name + _ASIDE for name in self._aside], ", ")
            there = f"; what was there before may be called {kept} now" if kept else ""
            log.warning("%s could not be left as it was, and may hold parts of an export%s", self._out, there)

    async def _give_back(self) -> bool:
        """Each step only if the one before it was done, so that no index meets files that are not its own."""
        sync = self._files.sync_directory
        for name in reversed(self._named):
            if not await self._try(self.discard(self.path(name))):
                return False
            if name == INDEX and not await self._try(sync(self._out)):
                return False
        for name in reversed(self._aside):
            if name == INDEX and not await self._try(sync(self._out)):
                return False
            if not await self._try(self._restore(name)):
                return False
        return not (self._aside or self._named) or await self._try(sync(self._out))

    async def _restore(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was not set aside any more
            await self._files.replace(self.path(name + _ASIDE), self.path(name))

    async def _try(self, step: Coroutine[Any, Any, object]) -> bool:
        """Whether a step was done. None is begun any more once the drive has not answered: each would wait as long again."""
        if not self._answers:
            step.close()
            return False
        try:
            await step
        except OSError as error:
            self._answers = not isinstance(error, StalledError)
            return False
        return True

    async def discard(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await self._files.unlink(path)
