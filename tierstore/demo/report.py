"""The end of a run in words: tables made from its record alone."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tierstore.demo.record import Ledger, Record, Score
from tierstore.monitor.tui import LINK_ARROWS
from tierstore.units import format_bytes


def tables(record: Record) -> RenderableType:
    """The run in three small tables."""
    return Group(Text(), _learning_table(record), Text(), tier_table(record), Text(), link_table(record))


def _learning_table(record: Record) -> Table:
    config = record.config
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rate = record.step * config.tokens_per_step / record.seconds if record.seconds else 0.0
    table.add_row("training", f"{record.step:,} steps of {config.tokens_per_step:,} bytes in {record.seconds:.0f} s ({rate:,.0f} a second)")
    table.add_row("training state", f"{format_bytes(record.state_bytes)}: fp32 weights, gradients and two moments")
    if record.losses:
        table.add_row("training loss", f"{record.losses[-1]:.3f} nats per byte in the last step")
    if record.score is not None:
        table.add_row("held-out loss", Text(_verdict(record.score), style="bold green" if beats_bigram(record.score) else "bold red"))
        counts = f"bigram {record.score.bigram:.3f}, unigram {record.score.unigram:.3f}"
        table.add_row("", f"{counts}, on the same {record.score.num_bytes:,} bytes")
    table.add_row("kept between leases", f"no tensor of the state, in {record.looks} looks at all living tensors")
    return table


def beats_bigram(score: Score) -> bool:
    return score.held_out < score.bigram


def _verdict(score: Score) -> str:
    return f"{score.held_out:.3f} nats per byte: {'better' if beats_bigram(score) else 'no better'} than counting pairs"


def tier_table(record: Ledger) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("tier", "budget", "peak", "state / budget", "hits", "misses", "hit rate", "evictions"):
        table.add_column(heading, justify="left" if heading == "tier" else "right")
    for name, tier in record.tiers.items():
        row = [name, format_bytes(tier.budget_bytes), format_bytes(tier.peak_bytes), f"{record.overflow(name):.2f}"]
        if tier.hit_rate is not None:
            row += [f"{tier.hits:,}", f"{tier.misses:,}", f"{tier.hit_rate:.0%}", f"{tier.evictions:,}"]
        table.add_row(*row)
    return table


def link_table(record: Ledger) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("link", "", "bytes", "per step", "transfers"):
        table.add_column(heading, justify="left" if heading in ("link", "") else "right")
    for name, link in record.links.items():
        per_step = format_bytes(link.bytes / max(1, record.step))
        table.add_row(name, LINK_ARROWS.get(name, ""), format_bytes(link.bytes), per_step, f"{link.transfers:,}")
    return table
