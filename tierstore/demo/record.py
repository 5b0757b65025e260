"""What a run has to tell, kept in the commit's metadata: it survives the process, and the report needs nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tierstore.counters import Stats
from tierstore.demo.model import Config

FORMAT = 2


@dataclass(slots=True)
class TierRecord:
    """Counters of one tier over all processes of the run; budget and peak are the largest."""

    budget_bytes: int = 0
    peak_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float | None:
        total = self.hits + self.misses
        return self.hits / total if total else None


@dataclass(slots=True)
class LinkRecord:
    """Counters of one link over all processes of the run; `by_kind` splits the bytes into demand, write-back, prefetch and so on."""

    bytes: int = 0
    transfers: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Score:
    """The finished model on the held-out windows, in nats per byte, beside counts of bytes on the very same windows."""

    held_out: float
    unigram: float
    bigram: float
    num_bytes: int


@dataclass(slots=True, kw_only=True)
class Ledger:
    """What the run of any demo counts, from its first process to its last.

    Attributes:
        state_bytes: Of parameters, gradients and optimizer state together.
        step: Steps taken.
        losses: Training loss of each step, in nats per token.
        held_out: (steps taken, held-out loss) now and then.
        seconds: Spent training.
        starts: Processes that worked on it.
    """

    state_bytes: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    starts: int = 1
    tiers: dict[str, TierRecord] = field(default_factory=dict)
    links: dict[str, LinkRecord] = field(default_factory=dict)

    def overflow(self, tier: str) -> float:
        """How many times over the whole state fills a tier."""
        return self.state_bytes / self.tiers[tier].budget_bytes


def read_fields(data: Mapping[str, Any], format_: int | str) -> dict[str, Any]:
    """The fields of a record from its JSON, those of `Ledger` as it has them.

    Raises:
        ValueError: It was written by something else, or by a demo of another format.
        KeyError, TypeError: A field is missing, or is of another kind.
    """
    fields = dict(data)
    if fields.pop("format", None) != format_:
        raise ValueError(f"needs format {format_} of the demo's record, found {data.get('format')!r}")
    fields["held_out"] = [(step, loss) for step, loss in fields["held_out"]]
    fields["tiers"] = {name: TierRecord(**tier) for name, tier in fields["tiers"].items()}
    fields["links"] = {name: LinkRecord(**link) for name, link in fields["links"].items()}
    return fields


@dataclass(slots=True)
class Record(Ledger):
    """One run of the demo that trains on bytes; its losses are in nats per byte.

    Attributes:
        corpus: Digest of the text.
        position: Training windows consumed: where the data goes on.
        looks: Times the audit looked for tensors kept between leases.
    """

    config: Config
    corpus: str
    position: int = 0
    entropies: tuple[float, float] = (0.0, 0.0)
    looks: int = 0
    score: Score | None = None

    @property
    def finished(self) -> bool:
        return self.score is not None

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It was written by something else, or by a demo of another format.
        """
        try:
            fields = read_fields(data, FORMAT)
            fields["config"] = Config(**fields["config"])
            fields["entropies"] = tuple(fields["entropies"])
            fields["score"] = fields["score"] and Score(**fields["score"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the record of the run lacks something: {error}") from error


class Tally:
    """Adds this process's counters to those that the run brought along."""

    def __init__(self, record: Ledger) -> None:
        self._record = record
        self._tiers = {name: dataclasses.replace(tier) for name, tier in record.tiers.items()}
        self._links = {name: dataclasses.replace(link) for name, link in record.links.items()}

    def take(self, stats: Stats) -> None:
        """Bring the record up to date with the store's counters, which begin at nothing in each process."""
        for name, tier in stats.tiers.items():
            before = self._tiers.get(name, TierRecord())
            self._record.tiers[name] = TierRecord(
                budget_bytes=max(before.budget_bytes, tier.capacity_bytes),
                peak_bytes=max(before.peak_bytes, tier.peak_bytes),
                hits=before.hits + tier.hits,
                misses=before.misses + tier.misses,
                evictions=before.evictions + tier.evictions,
            )
        for name, link in stats.links.items():
            start = self._links.get(name, LinkRecord())
            by_kind = {kind: start.by_kind.get(kind, 0) + nbytes for kind, nbytes in link.bytes_by_kind.items()}
            self._record.links[name] = LinkRecord(start.bytes + link.bytes, start.transfers + link.transfers, {**start.by_kind, **by_kind})
