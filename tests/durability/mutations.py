"""Damage to a directory at rest: one change to one file, or two files exchanged; and what a store may make of it.

A directory is a dictionary here, from file name to content, so that the same damage can be judged in memory and on a drive.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tierstore import TierStore

PAGE = 4096
GPU, RAM = 16 * PAGE, 32 * PAGE
COMMITS = 5
KEEP = 2

Contents = dict[str, bytes]
Values = dict[str, dict[str, bytes]]


@dataclass
class History:
    """A store's life.

    Attributes:
        snapshots: Its directory after each commit and after closing.
        values: The bytes of each tensor of each block, by generation.
        other: Another store's directory after as many commits: the same blocks with other values.
    """

    snapshots: list[Contents] = field(default_factory=list)
    values: dict[int, Values] = field(default_factory=dict)
    other: list[Contents] = field(default_factory=list)

    @property
    def last(self) -> Contents:
        return self.snapshots[-1]


def contents_of(path: Path) -> Contents:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def live(path: Path, seed: int, *, checksum: bool = True) -> tuple[list[Contents], dict[int, Values]]:
    """Some commits: two blocks of one shape that change each time, one that changes now and then, one that never does."""
    generator = torch.Generator().manual_seed(seed)
    snapshots, values = [], {}
    with TierStore(GPU, RAM, path, device="cpu", keep=KEEP, checksum=checksum) as store:
        for name in ("alpha", "beta"):
            store.put(name, {"weight": torch.randn(40, 50, generator=generator), "bias": torch.randn(7, generator=generator)})
        store.put("gamma", torch.randn(3000, generator=generator).to(torch.bfloat16))
        store.put("delta", {"ids": torch.arange(600) + seed, "none": torch.empty(0, 3)}, frozen=True)
        for generation in range(1, COMMITS + 1):
            for name in ("alpha", "beta"):
                with store.use(name, write=True) as block:
                    block["weight"].add_(torch.randn(40, 50, generator=generator))
            if generation % 2:
                with store.use("gamma", write=True) as gamma:
                    gamma.neg_()
            assert store.commit({"generation": generation, "seed": seed}) == generation
            values[generation] = values_of(store)
            snapshots.append(contents_of(path))
    snapshots.append(contents_of(path))
    return snapshots, values


def values_of(store: TierStore) -> Values:
    values: Values = {}
    for name in store:
        value = store.read(name)
        values[name] = {key: bytes_of(one) for key, one in ({name: value} if isinstance(value, torch.Tensor) else value).items()}
    return values


def write_history(path: Path) -> History:
    snapshots, values = live(path / "one", 1)
    return History(snapshots, values, live(path / "other", 2)[0])


# -- damage ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """What was done, in words, the files that are not what they were, and the directory as it is now."""

    what: str
    files: tuple[str, ...]
    contents: Contents


def is_shard(name: str) -> bool:
    return name.startswith("block-")


def _changed(history: History, what: str, **changes: bytes | None) -> Damage:
    contents: Contents = dict(history.last)
    for name, content in changes.items():
        if content is None:
            del contents[name]
        else:
            contents[name] = content
    return Damage(what, tuple(name for name in changes if contents.get(name) != history.last.get(name)), contents)


def flip(rng: random.Random, history: History, name: str) -> Damage:
    data = bytearray(history.last[name])
    if not data:
        return _changed(history, f"a byte in the empty {name}", **{name: b"\x01"})
    where = rng.randrange(len(data)) if rng.random() < 0.7 else rng.randrange(min(len(data), 512))
    bit = rng.randrange(8)
    data[where] ^= 1 << bit
    return _changed(history, f"bit {bit} of byte {where} of {name}", **{name: bytes(data)})


def truncate(rng: random.Random, history: History, name: str) -> Damage:
    data = history.last[name]
    length = rng.choice([0, len(data) - 1, len(data) // PAGE * PAGE - PAGE, rng.randrange(len(data) + 1)])
    return _changed(history, f"{name} cut to {length}", **{name: data[: max(0, length)]})


def extend(rng: random.Random, history: History, name: str) -> Damage:
    more = rng.choice([b"\0", b"\n", b"}", bytes(PAGE), rng.randbytes(rng.randrange(1, 9000))])
    return _changed(history, f"{name} longer by {len(more)}", **{name: history.last[name] + more})


def zero_page(rng: random.Random, history: History, name: str) -> Damage:
    data = bytearray(history.last[name])
    start = rng.randrange(max(1, len(data))) // PAGE * PAGE
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    return _changed(history, f"zeros at {start} of {name}", **{name: bytes(data)})


def rubbish(rng: random.Random, history: History, name: str) -> Damage:
    return _changed(history, f"{name} overwritten", **{name: rng.randbytes(len(history.last[name]))})


def delete(rng: random.Random, history: History, name: str) -> Damage:
    return _changed(history, f"{name} deleted", **{name: None})


def exchange(rng: random.Random, history: History, name: str) -> Damage:
    """With another of its kind, if there is one of the same length then with that."""
    last = history.last
    alike = [other for other in last if other != name and is_shard(other) == is_shard(name)]
    same = [other for other in alike if len(last[other]) == len(last[name])]
    other = rng.choice(same or alike)
    return _changed(history, f"{name} and {other} exchanged", **{name: last[other], other: last[name]})


def rename(rng: random.Random, history: History, name: str) -> Damage:
    """One of its kind has gone, and another has its name."""
    last = history.last
    other = rng.choice([other for other in last if other != name and is_shard(other) == is_shard(name)])
    return _changed(history, f"{name} renamed to {other}", **{name: None, other: last[name]})


def roll_back(rng: random.Random, history: History, name: str) -> Damage:
    """An old version: of this file, of another generation of the same block, or one that had been dropped."""
    old = rng.choice(history.snapshots[:-1])
    if name in old and old[name] != history.last[name]:
        return _changed(history, f"an old version of {name}", **{name: old[name]})
    kind = name.rsplit("-", 1)[0]
    candidates = sorted(other for other in old if other.rsplit("-", 1)[0] == kind and old[other] != history.last[name])
    if not candidates:
        return delete(rng, history, name)
    source = rng.choice(candidates)
    if rng.random() < 0.3:
        return _changed(history, f"the dropped {source} is back", **{source: old[source]})
    return _changed(history, f"an old {source} as {name}", **{name: old[source]})


def foreign(rng: random.Random, history: History, name: str) -> Damage:
    """A file of another store under the same name, or of another kind."""
    other = history.other[-1]
    source = name if name in other and rng.random() < 0.8 else rng.choice(sorted(other))
    return _changed(history, f"another store's {source} as {name}", **{name: other[source]})


def foreign_manifest(rng: random.Random, history: History, name: str) -> Damage:
    """A manifest of another store that is whole, and names shards that are all there with the right length."""
    source = rng.choice([source for source in history.other[-1] if source.startswith("manifest-")])
    return _changed(history, f"another store's {source}, which names the same shards", **{source: history.other[-1][source]})


def foreign_current(rng: random.Random, history: History, name: str) -> Damage:
    return _changed(history, "another store's CURRENT", CURRENT=rng.choice(history.other)["CURRENT"])


def left_over(rng: random.Random, history: History, name: str) -> Damage:
    """What a killed process leaves beside: a process id, temporary files, shards that nobody claims."""
    extra = rng.choice(
        ["tierstore.pid", "CURRENT.tmp", f"manifest-{COMMITS + 1:08d}.json.tmp", "tierstore.probe", "block-alpha-00000099.safetensors"]
    )
    return _changed(history, f"{extra} beside", **{extra: rng.choice([b"", b"1\n", history.last[name], rng.randbytes(100)])})


KINDS: list[Callable[[random.Random, History, str], Damage]] = [
    *(flip, flip, flip, flip, flip, truncate, extend, zero_page, rubbish, delete),
    *(exchange, rename, roll_back, foreign, foreign_manifest, foreign_current, left_over),
]


def draw(seed: int, history: History) -> Damage:
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    shards = [name for name in history.last if is_shard(name)]
    manifests = [name for name in history.last if name.startswith("manifest-")]
    name = rng.choice([rng.choice(shards), rng.choice(manifests), rng.choice(sorted(history.last))])
    return kind(rng, history, name)


# -- what is allowed ------------------------------------------------------------------------------------------------------


def check_opened(history: History, damage: Damage, committed: Any, values: Values, metadata: Any) -> None:
    """Everything could be read: it is the newest generation, or the one before where the newest manifest was damaged."""
    newest = f"manifest-{COMMITS:08d}.json"
    allowed = {COMMITS} if newest not in damage.files else {COMMITS - 1}
    assert committed in allowed, f"{damage.what}: generation {committed} was opened"
    assert metadata == {"generation": committed, "seed": 1}, damage.what
    assert values == history.values[committed], f"{damage.what}: wrong values were served"


def check_refused(history: History, damage: Damage, error: Exception) -> None:
    """The error names a file that is not what it was, or a block or generation that such a file holds."""
    said = str(error)
    assert damage.files, f"{damage.what}: nothing was damaged, but {said}"
    hints = {name for name in damage.files if name in said}
    for name in damage.files:
        if is_shard(name):
            hints |= {block for block in history.values[COMMITS] if block in name and repr(block) in said}
        elif name.startswith("manifest-"):
            hints |= {name for number in [int(name[9:17])] if f"generation {number}" in said}
            if damage.contents.get(name) in history.other[-1].values():  # whole in itself: either it or the shard is not the right one
                hints |= {block for block in history.values[COMMITS] if repr(block) in said}
        elif name == "CURRENT":
            hints |= {name for _ in [0] if "generation" in said}
    assert hints, f"{damage.what}: the error names nothing of it: {said}"


def check_kept(history: History, damage: Damage, left: Mapping[str, bytes]) -> None:
    """Opening, reading and closing took away nothing that a repair by hand would need: neither what is whole nor what is damaged.

    Only an older generation whose manifest is gone looks like one that was dropped, and its own shards like those of a killed process.
    """
    older, newest = (f"manifest-{number:08d}.json" for number in (COMMITS - 1, COMMITS))
    given_up = older not in damage.contents and damage.contents.get(newest) == history.last[newest]
    for name, content in damage.contents.items():
        if given_up and is_shard(name) and name.encode() not in history.last[newest]:
            continue
        if name in history.last and name != "tierstore.lock":
            assert left.get(name) == content, f"{damage.what}: {name} was changed or deleted"
