"""A small live display of tiers and links for any loop: it reads `store.stats()` and nothing else.

    with TierDisplay(store) as display:
        for step, batch in enumerate(data):
            ...
            display.update(f"step {step}  loss {loss:.3f}")

On a terminal it redraws in place; elsewhere (a log file, a pipe) it prints a plain line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tierstore.counters import LinkStats, Stats, TierStats
from tierstore.units import format_bytes, format_rate

__all__ = ["LINK_ARROWS", "Countable", "TierDisplay", "plain_summary", "tier_tables"]

LINK_ARROWS = {"h2d": "ram → gpu", "d2h": "gpu → ram", "nvme_read": "nvme → ram", "nvme_write": "ram → nvme"}
"""Where the bytes of each link go."""

BAR_WIDTH = 16


class Countable(Protocol):
    """Anything with a store's counters."""

    def stats(self) -> Stats: ...


class TierDisplay:
    """Shows a line of the caller's above the tiers' fill and the links' bytes. For one thread, the one that trains.

    Args:
        store: What to watch.
        console: Where to draw; by default standard output.
        every_s: Least time between two redraws on a terminal.
        plain_every_s: Least time between two lines elsewhere.
        transient: Take the display off the terminal at the end.
    """

    def __init__(
        self,
        store: Countable,
        *,
        console: Console | None = None,
        every_s: float = 0.25,
        plain_every_s: float = 5.0,
        transient: bool = False,
    ) -> None:
        self._store = store
        self._console = console or Console()
        self._every_s = every_s if self._console.is_terminal else plain_every_s
        self._live = Live(console=self._console, auto_refresh=False, transient=transient) if self._console.is_terminal else None
        self._drawn_s = float("-inf")
        self._link_bytes: dict[str, int] = {}

    def __enter__(self) -> TierDisplay:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def update(self, headline: RenderableType, *, plain: str | None = None, force: bool = False) -> bool:
        """Show the present state, unless the last time was a moment ago.

        Args:
            headline: What the loop has to say, drawn above the tables on a terminal.
            plain: The same for a line of text; by default `headline` itself.
            force: Show it however short the time since the last update.

        Returns:
            Whether anything was shown.
        """
        now_s = time.monotonic()
        elapsed_s = now_s - self._drawn_s
        if elapsed_s < self._every_s and not force:
            return False
        stats = self._store.stats()
        if self._live is None:
            # As text and unwrapped: a log wants one line per line, and brackets in it are not markup.
            self._console.print(Text(f"{headline if plain is None else plain}  {plain_summary(stats)}"), soft_wrap=True)
        else:
            rates = {name: (stats.links[name].bytes - before) / elapsed_s for name, before in self._link_bytes.items()}
            self._live.update(Group(headline, tier_tables(stats, rates)), refresh=True)
        self._link_bytes = {name: link.bytes for name, link in stats.links.items()}
        self._drawn_s = now_s
        return True


def plain_summary(stats: Stats) -> str:
    """Tiers and links in one line of text."""
    tiers = (f"{name} {format_bytes(tier.used_bytes)} of {format_bytes(tier.capacity_bytes)}" for name, tier in stats.tiers.items())
    links = (f"{name} {format_bytes(link.bytes)}" for name, link in stats.links.items())
    return f"[{', '.join(tiers)}; {', '.join(links)}]"


def tier_tables(stats: Stats, rates: Mapping[str, float]) -> RenderableType:
    """Tiers and links as tables.

    Args:
        rates: Bytes per second by link, for the links where it is known.
    """
    tiers = _table("tier", "", "used", "budget", "peak", "hit rate", "evictions")
    for name, tier in stats.tiers.items():
        tiers.add_row(name, _bar(tier), *_tier_cells(tier))
    links = _table("link", "", "bytes", "rate", "transfers")
    for name, link in stats.links.items():
        links.add_row(name, LINK_ARROWS.get(name, ""), *_link_cells(link, rates.get(name)))
    return Group(Text(), tiers, Text(), links)


def _table(*headings: str) -> Table:
    """Two columns on the left, numbers of steady width behind them: nothing jumps while they change, and all fits 80 columns."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right", min_width=8 if place > 1 else None, no_wrap=True)
    return table


def _bar(tier: TierStats) -> ProgressBar:
    return ProgressBar(total=max(1, tier.capacity_bytes), completed=tier.used_bytes, width=BAR_WIDTH, finished_style="bar.complete")


def _tier_cells(tier: TierStats) -> tuple[str, ...]:
    hit_rate = "" if tier.hit_rate is None else f"{tier.hit_rate:.0%}"
    evictions = "" if tier.hit_rate is None and not tier.evictions else f"{tier.evictions:,}"
    return format_bytes(tier.used_bytes), format_bytes(tier.capacity_bytes), format_bytes(tier.peak_bytes), hit_rate, evictions


def _link_cells(link: LinkStats, rate: float | None) -> tuple[str, ...]:
    return format_bytes(link.bytes), "" if rate is None else format_rate(rate), f"{link.transfers:,}"
