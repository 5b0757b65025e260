"""A small live display of tiers and links for any loop: it reads `store.stats()` and nothing else.

    with TierDisplay(store) as display:
        for step, batch in enumerate(data):
            ...
            display.update(f"step {step}  loss {loss:.3f}")

On a terminal it redraws in place; elsewhere (a log file, a pipe) it prints a plain line now and then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tierstore.clock import Clock, RealClock
from tierstore.counters import LinkStats, Stats, TierStats
from tierstore.units import format_bytes, format_duration, format_rate

__all__ = ["LINK_ARROWS", "Countable", "TierDisplay", "plain_summary", "share_table", "tier_tables"]

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
        plain_rates: Whether those lines tell the links' rates since the line before, instead of all bytes so far.
        transient: Take the display off the terminal at the end.
        clock: What `every_s`, `plain_every_s` and rates are measured with.
    """

    def __init__(
        self,
        store: Countable,
        *,
        console: Console | None = None,
        every_s: float = 0.25,
        plain_every_s: float = 5.0,
        plain_rates: bool = False,
        transient: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._console = console or Console()
        self._every_s = every_s if self._console.is_terminal else plain_every_s
        self._plain_rates = plain_rates
        self._transient = transient
        self._clock = clock or RealClock()
        self._live: Live | None = None
        self._drawn_s = self._counted_s = float("-inf")
        self._link_bytes: dict[str, int] = {}
        self._rates: dict[str, float] = {}

    def __enter__(self) -> TierDisplay:
        self.resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    @property
    def due(self) -> bool:
        """Whether `update` would show anything: worth asking before making a headline that costs something."""
        return self._clock.now_ns() / 1e9 - self._drawn_s >= self._every_s

    @property
    def plain(self) -> bool:
        """Whether lines are printed, instead of a terminal redrawn in place."""
        return not self._console.is_terminal

    def pause(self) -> None:
        """Take the display off the terminal, so that something else can draw there; until `resume`, do not update."""
        live, self._live = self._live, None
        if live is not None:
            live.transient = True
            live.stop()

    def resume(self) -> None:
        """Be ready to draw, below whatever the terminal shows by now."""
        if self._live is None and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=self._transient)  # a used one goes on where it was
            self._live.start()

    def update(
        self, headline: RenderableType, *, plain: str | None = None, below: RenderableType | None = None, force: bool = False
    ) -> bool:
        """Show the present state, unless the last time was a moment ago.

        Args:
            headline: What the loop has to say, drawn above the tables on a terminal.
            plain: The same for a line of text; by default `headline` itself.
            below: More of it, drawn below the tables on a terminal.
            force: Show it however short the time since the last update.

        Returns:
            Whether anything was shown.
        """
        now_s = self._clock.now_ns() / 1e9
        if now_s - self._drawn_s < self._every_s and not force:
            return False
        stats = self._store.stats()
        self._drawn_s = now_s
        counted_s = now_s - self._counted_s
        if counted_s > self._every_s / 2:  # the bytes of a moment tell nothing, as where the last update is a forced one
            self._rates = {name: (stats.links[name].bytes - before) / counted_s for name, before in self._link_bytes.items()}
            self._link_bytes = {name: link.bytes for name, link in stats.links.items()}
            self._counted_s = now_s
        if self._live is None:
            # As text and unwrapped: a log wants one line per line, and brackets in it are not markup.
            summary = plain_summary(stats, self._rates if self._plain_rates else {})
            self._console.print(Text(f"{headline if plain is None else plain}  {summary}"), soft_wrap=True)
        else:
            parts = [headline, tier_tables(stats, self._rates), *([below] if below is not None else [])]
            self._live.update(Group(*parts), refresh=True)
        return True


def plain_summary(stats: Stats, rates: Mapping[str, float] | None = None) -> str:
    """Tiers and links in one line of text.

    Args:
        rates: Bytes per second by link, told instead of bytes for the links where it is known.
    """
    rates = rates or {}
    tiers = (f"{name} {format_bytes(tier.used_bytes)} of {format_bytes(tier.capacity_bytes)}" for name, tier in stats.tiers.items())
    links = (f"{name} {format_rate(rates[name]) if name in rates else format_bytes(link.bytes)}" for name, link in stats.links.items())
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


def share_table(title: str, rows: Iterable[tuple[str, float, float]]) -> RenderableType:
    """What the parts of some time are, as a table like those of tiers and links.

    Args:
        title: Heading of the first column.
        rows: Of each part its name, its seconds, and its share of the whole.
    """
    table = _table(title, "", "time", "share")
    for name, seconds, share in rows:
        bar = ProgressBar(total=1.0, completed=min(1.0, share), width=BAR_WIDTH, finished_style="bar.complete")
        table.add_row(name, bar, format_duration(seconds), f"{share:.0%}")
    return table


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
