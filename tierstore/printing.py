"""How a directory looks on a terminal: what `verify`, `inspect` and `export` print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from tierstore.export import Exported
from tierstore.nvme.contents import BlockRow, Contents, GenerationRow
from tierstore.nvme.reading import file_of
from tierstore.nvme.recovery import some
from tierstore.nvme.verify import BlockDamage, GenerationReport, Report
from tierstore.units import format_bytes

MAX_TENSORS = 12
"""Damaged tensors of one block that are listed one by one."""

MAX_METADATA = 300
MAX_VALUE = 60
"""Characters of the user's metadata that are shown: in all, and of one member."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar on standard error while bytes are read, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=total)
            return lambda nbytes: bar.advance(task, nbytes)

        yield begin


NO_CHECKSUMS = "written with checksum=False, or adopted and not read before the commit"


def count(number: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _say(console: Console, text: str | Text, *, indent: int = 0, style: str = "") -> None:
    for line in Text(str(text)).wrap(console, max(20, console.width - indent)):
        console.print(" " * indent + line.plain.rstrip(), style=style, highlight=False, markup=False, soft_wrap=True)


def _table(*headings: str) -> Table:
    """Headings that begin with > stand to the right, as their numbers do."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


# -- verify -----------------------------------------------------------------------------------------------------------------


def print_report(console: Console, report: Report, seconds: float) -> None:
    """The damage first, then what is whole."""
    if report.store is not None:
        _say(console, f"Store {report.store}")
    for problem in report.problems:
        _say(console, f"DAMAGED: {problem}", style="bold red")
    for generation in report.generations:
        _print_generation(console, generation)
    for note in report.notes:
        _say(console, f"Note: {note}")
    speed = f", {format_bytes(report.read_bytes / seconds)}/s" if seconds > 0.1 else ""
    _say(console, f"Read {count(report.num_shards, 'shard')} ({format_bytes(report.read_bytes)}) in {seconds:.1f} s{speed}.")
    _say(console, _verdict(report), style="bold green" if report.good else "bold red")


def _print_generation(console: Console, generation: GenerationReport) -> None:
    what = f"Generation {generation.generation}"
    if generation.problem is not None:
        _say(console, f"{what}: DAMAGED: {generation.problem}", style="bold red")
        return
    blocks = f"{count(generation.num_blocks, 'block')}, {format_bytes(generation.payload_bytes)}"
    if generation.damaged:
        _say(console, f"{what}: DAMAGED in {len(generation.damaged)} of {blocks}", style="bold red")
        for damage in generation.damaged:
            _print_damage(console, damage)
    else:
        _say(console, f"{what}: good ({blocks})", style="green")
    if generation.unchecked:
        listed = some(generation.unchecked, ", ")
        _say(
            console,
            f"not checked: {count(len(generation.unchecked), 'block')} without checksums ({listed}): {NO_CHECKSUMS}",
            indent=2,
            style="yellow",
        )


def _print_damage(console: Console, damage: BlockDamage) -> None:
    _say(console, f"block {damage.block!r} in {damage.file}", indent=2)
    for problem in damage.problems:
        _say(console, f"the file {problem}" if not problem.startswith("chunk") else problem, indent=4)
    if damage.within_bytes is not None and len(damage.tensors) > 1:
        _say(
            console,
            f"the damage lies within {format_bytes(damage.within_bytes)} that hold bytes of {count(len(damage.tensors), 'tensor')}, "
            f"any of which may be bad: {_some_tensors(damage)}",
            indent=4,
        )
    elif damage.whole:
        _say(console, "its tensor is bad" if len(damage.tensors) == 1 else f"all its {len(damage.tensors)} tensors are bad", indent=4)
    elif damage.tensors:
        _say(console, f"bad tensors: {_some_tensors(damage)}", indent=4)
    else:
        _say(console, "its tensors are good: the damage is in bytes that mean nothing", indent=4)


def _some_tensors(damage: BlockDamage) -> str:
    more = f" and {len(damage.tensors) - MAX_TENSORS} more" if len(damage.tensors) > MAX_TENSORS else ""
    return ", ".join(damage.tensors[:MAX_TENSORS]) + more


def _verdict(report: Report) -> str:
    """What is whole, and what a store would do with the directory."""
    verdict = _what_is_whole(report)
    if not report.foreign:
        return verdict + "."
    return f"{verdict}{', but' if report.good else '. But'} {_until_moved(report.foreign)}."


def _until_moved(foreign: list[str]) -> str:
    return f"no store opens the directory until {some(foreign, ', ')} {'is' if len(foreign) == 1 else 'are'} moved away"


def _what_is_whole(report: Report) -> str:
    if report.good:
        return "Everything is as it was written" if report.generations else "There is nothing to check"
    if not report.whole:
        return (
            "Damaged; no generation that was read is whole"
            if report.generations
            else "Damaged; there is no generation left, and no store opens the directory"
        )
    best = report.whole[-1]
    if best != report.opens:
        return f"Damaged; generation {best} is whole: open it with generation={best}"
    if not report.warns and not report.next_commit:
        return f"Damaged; generation {best}, the newest, is whole"
    verdict = f"Damaged; generation {best} is whole, and a store that is opened goes on from it{' with a warning' if report.warns else ''}"
    return verdict + (f". Its next commit {', and '.join(report.next_commit)}" if report.next_commit else "")


# -- inspect ----------------------------------------------------------------------------------------------------------------


def print_contents(console: Console, contents: Contents, *, tensors: bool) -> None:
    """Generations, then the blocks of the current one (or of the only one asked for), then the drive."""
    _say(console, contents.path, style="bold")
    if contents.store is not None:
        _say(console, f"store {contents.store}")
    for problem in contents.problems:
        _say(console, f"DAMAGED: {problem}", style="bold red")
    if contents.holder is not None:
        _say(console, f"open in process {contents.holder}")
    console.print()
    if not contents.generations:
        _say(console, "There is no generation." if contents.problems else "Nothing has been committed yet.")
    else:
        console.print(_generations(contents.generations))
        for row in contents.generations:
            if row.problem is not None:
                _say(console, f"generation {row.generation}: {row.problem}", style="red")
    shown = contents.current or next((row for row in reversed(contents.generations) if row.problem is None), None)
    if shown is not None:
        _print_blocks(console, shown, tensors=tensors)
    console.print()
    console.print(_disk(contents))
    left = [] if contents.holder is not None else contents.leftovers  # it is no advice to delete what a store is at work on
    if left:
        _say(console, f"left over: {some(left, ', ')}")
    if contents.foreign:
        _say(console, f"foreign: {_until_moved(contents.foreign)}", style="yellow")


def _generations(rows: list[GenerationRow]) -> Table:
    table = _table(">generation", "", "written", ">blocks", ">bytes")
    for row in rows:
        marks = [*(["current"] if row.current else []), *(["damaged"] if row.damaged else [])]
        figures = (f"{len(row.blocks):,}", format_bytes(row.payload_bytes)) if row.problem is None else ("", "")
        style = "red" if row.damaged else ""
        table.add_row(str(row.generation), ", ".join(marks), _local_time(row.committed), *figures, style=style)
    return table


def _local_time(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _print_blocks(console: Console, row: GenerationRow, *, tensors: bool) -> None:
    console.print()
    _say(console, f"Generation {row.generation}", style="bold")
    if row.metadata is not None:
        _say(console, f"metadata: {_metadata(row.metadata)}")
    console.print()
    table = _table("block", ">tensors", "dtypes", ">bytes", "shard", "")
    for block in row.blocks:
        name = Text(block.record.block.name, style="dim" if block.state else "")
        marks = [*(["frozen"] if block.record.block.frozen else []), *(["damaged"] if block.problem else [])]
        table.add_row(
            name,
            f"{len(block.record.block.tensors):,}",
            _some_dtypes(block),
            format_bytes(block.record.block.nbytes),
            f"{block.record.shard.number:08d}" if block.record.adopted is None else "adopted",
            Text(", ".join(marks), style="red" if block.problem else ""),
        )
        if tensors:
            for spec in block.record.block.tensors:
                shape = "x".join(map(str, spec.shape)) or "scalar"
                table.add_row(Text(f"  {spec.name}", style="dim"), "", spec.dtype, format_bytes(spec.nbytes), Text(shape, style="dim"), "")
    console.print(table)
    for block in row.blocks:
        if block.problem is not None:
            _say(console, f"block {block.record.block.name!r}: {file_of(block.record)} {block.problem}", style="red")
    for path in dict.fromkeys(file.path for block in row.blocks if block.record.adopted is not None for file in block.record.adopted.files):
        _say(console, f"adopted from {path}", style="dim")
    _say(console, "SHARD: block-*-SHARD.safetensors is its file" + (", or a tensor's shape" if tensors else ""), style="dim")


def _metadata(value: Any) -> str:
    """All of it, if that is short; else what is short of it first, and the beginning of what is long."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= MAX_METADATA:
        return text
    if not isinstance(value, dict):
        return text[:MAX_METADATA] + " ... (all of it with --json)"
    members = [(json.dumps(name, ensure_ascii=False), json.dumps(member, ensure_ascii=False)) for name, member in value.items()]
    members.sort(key=lambda member: len(member[1]) > MAX_VALUE)
    shown: list[str] = []
    left = MAX_METADATA
    for name, member in members:
        entry = f"{_cut(name)}: {_cut(member)}"
        if len(entry) > left:
            break
        left -= len(entry)
        shown.append(entry)
    if len(shown) < len(members):
        shown.append(f"{len(members) - len(shown)} more")
    return "{" + ", ".join(shown) + "} (all of it with --json)"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + " ..."


def _some_dtypes(block: BlockRow) -> str:
    dtypes = block.dtypes
    return ", ".join(dtypes[:2]) + (f" +{len(dtypes) - 2}" if len(dtypes) > 2 else "")


def _disk(contents: Contents) -> Table:
    table = _table("on the drive", ">files", ">bytes")
    names = {
        "current shards": "shards of the current generation",
        "older shards": "shards of older generations only",
        "left over": "in no generation: " + ("the store is at work on them" if contents.holder is not None else "left over"),
        "unclear": f"may belong to {contents.doubt}",
        "other": "lock, CURRENT and the like",
        "foreign": "not the store's",
    }
    for kind, share in [*contents.disk.items(), contents.total()]:
        if share.files or kind == "total":
            table.add_row(names.get(kind, kind), f"{share.files:,}", format_bytes(share.bytes))
    return table


# -- export -----------------------------------------------------------------------------------------------------------------


def print_exported(console: Console, exported: Exported, seconds: float) -> None:
    """What was written, and what was not."""
    if exported.qualified:
        _say(console, "Some tensors of different blocks have the same name: all are exported as BLOCK.TENSOR.")
    if exported.left_out:
        _say(console, f"Left out: {count(len(exported.left_out), 'block')} ({some(exported.left_out, ', ')})")
    if exported.unchecked:
        listed = some(exported.unchecked, ", ")
        _say(
            console, f"Not checked: {count(len(exported.unchecked), 'block')} without checksums ({listed}): {NO_CHECKSUMS}", style="yellow"
        )
    for note in exported.notes:
        _say(console, f"Note: {note}", style="yellow")
    for way, number in sorted(exported.shared.items()):
        _say(console, f"Shared by {way}: {number} of {count(len(exported.files), 'file')}")
    if exported.not_shared:
        left = ", ".join(f"{number} {why}" for why, number in exported.not_shared.items())
        number = exported.num_blocks - exported.not_shared.total()
        _say(console, f"Shared: {number} of {count(exported.num_blocks, 'block')}; copied: {left}")
    what = f"{count(exported.num_tensors, 'tensor')} of {count(exported.num_blocks, 'block')}, {format_bytes(exported.total_bytes)}"
    where = f"in {count(len(exported.files), 'file')} in {exported.out}"
    _say(console, f"Exported generation {exported.generation}: {what}, {where} ({seconds:.1f} s).", style="bold green")
